"""ADD of a local tar archive: its entries go through the same writer as every copied file.

The archive is read by the standard library's `tarfile`, through a stream that only goes forward and that counts:
what it decompresses to, and what one header makes us read. Nothing is extracted by `tarfile` itself.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Final, Protocol

from tartarus.images.accounts import MAX_ID
from tartarus.images.dockerfile.context import IGNORE_FILE, FileTree, Watch
from tartarus.images.dockerfile.layer import LayerWriter, Owner
from tartarus.images.stackview import Entry
from tartarus.model.errors import InvalidRequest

_BLOCK: Final = 512
_CHUNK: Final = 1 << 18
_MAX_HEADER: Final = 1 << 20
"""Bytes of headers for one member: long names and extended headers of any honest archive are far shorter."""
_LZMA_MEMORY: Final = 128 * 1024**2
"""Bytes that decompressing xz may take: its strongest preset takes 65 MiB (xz(1))."""
_LATEST_S: Final = 1 << 34
"""The year 2514, in seconds: later times are more than ext4 can keep."""
_BROKEN: Final = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, RecursionError, OverflowError)


class _Stream(io.RawIOBase):
    """The archive's decompressed bytes, forward only. `head` bounds what may be read until it is set again."""

    def __init__(self, inner: IO[bytes], watch: Watch) -> None:
        super().__init__()
        self._inner = inner
        self._watch = watch
        self._position = 0
        self.head = _MAX_HEADER
        self.last = b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or size > self.head:
            raise InvalidRequest("a header is too large", why=f"at most {_MAX_HEADER} bytes")
        data = self._take(size)
        self.head -= len(data)
        self.last = data
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._position:
            raise InvalidRequest("its entries overlap")
        while self._position < offset:
            if not self._take(min(_CHUNK, offset - self._position)):
                raise InvalidRequest("it ends too early")
        return offset

    def _take(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size and (data := self._inner.read(size)):
            parts.append(data)
            size -= len(data)
            self._position += len(data)
            if self._position > self._watch.limits.bytes:
                raise InvalidRequest(f"it unpacks to more than {self._watch.limits.bytes} bytes")
            self._watch.check()
        return b"".join(parts)

    def content(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, which are a file's content."""
        while size:
            data = self._take(min(_CHUNK, size))
            if not data:
                raise InvalidRequest("it ends too early")
            size -= len(data)
            yield data


def is_archive(source: FileTree, entry: Entry, watch: Watch) -> bool:
    """Whether a regular file is a tar archive, plain or compressed with gzip, bzip2 or xz: told by its content."""
    with os.fdopen(source.open(entry), "rb") as file:
        try:
            with _decompressed(file, watch) as inner:
                block = _Stream(inner, watch).read(_BLOCK)
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except InterruptedError:
            raise
        except (*_BROKEN, OSError):
            return False
    return True


def unpack(writer: LayerWriter, source: FileTree, entry: Entry, place: str, owner: Owner | None, watch: Watch) -> None:
    """Write an archive's entries below the canonical directory `place`, for `owner` if given, else for its own.

    Raises InvalidRequest for an archive that is damaged, too large, or names what can't be made.
    """
    name = posixpath.basename(entry.path)[:200]
    try:
        with os.fdopen(source.open(entry), "rb") as file, _decompressed(file, watch) as inner:
            stream = _Stream(inner, watch)
            for member in _members(stream, watch):
                _write(writer, stream, member, place, owner)
    except InvalidRequest as error:
        why = f"{error.what}: {error.why}".rstrip(": ")
        # What is in an archive is no matter of .dockerignore.
        fix = "" if IGNORE_FILE in error.fix else error.fix
        raise InvalidRequest(f"the archive {name!r} can't be unpacked", why=why, fix=fix) from error
    except _BROKEN as error:
        raise InvalidRequest(f"the archive {name!r} is damaged", why=str(error)) from error


def _decompressed(file: IO[bytes], watch: Watch) -> IO[bytes]:
    magic = file.read(6)
    file.seek(0)
    for start, make in _FORMATS.items():
        if magic.startswith(start):
            return _Compressed(file, make, watch)  # type: ignore[return-value]
    return file


class _Decoder(Protocol):
    """What the standard library's incremental decompressors have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gzip:
    """zlib's decompressor in the shape of the others. It reads gzip's headers in C, however long their names are."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Compressed(io.RawIOBase):
    """What a compressed file holds, never more of it in memory than is asked for.

    The library's own file classes know no bound for memory, and read gzip's headers byte by byte to no end.
    """

    def __init__(self, file: IO[bytes], make: Callable[[], _Decoder], watch: Watch) -> None:
        super().__init__()
        self._file = file
        self._make = make
        self._watch = watch
        self._decoder = make()

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert size > 0
        while True:
            self._watch.check()
            data = b""
            if self._decoder.eof:
                # One file may be several streams, one after the other, with zeros between them.
                data = self._decoder.unused_data.lstrip(b"\0")
                while not data:
                    data = self._file.read(_CHUNK)
                    if not data:
                        return b""
                    data = data.lstrip(b"\0")
                    self._watch.check()
                self._decoder = self._make()
            elif self._decoder.needs_input:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("the compressed data ends too early")
            out = self._decoder.decompress(data, size)
            if out:
                return out


_FORMATS: Final[dict[bytes, Callable[[], _Decoder]]] = {
    b"\x1f\x8b\x08": _Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY),
}


def _members(stream: _Stream, watch: Watch) -> Iterator[tarfile.TarInfo]:
    stream.head = _MAX_HEADER
    archive = tarfile.TarFile(fileobj=stream, mode="r", encoding="utf-8", errors="surrogateescape")
    while True:
        stream.head = _MAX_HEADER
        member = archive.next()
        if member is None:
            break
        archive.members = []  # type: ignore[attr-defined] # it would keep them all
        if member.size < 0:
            raise InvalidRequest("a size is negative")
        watch.count(member.size if member.isreg() else 0)
        yield member
    if stream.last.strip(b"\0"):
        # tarfile takes a header that is none for the end.
        raise InvalidRequest("it is damaged in the middle")


def _write(writer: LayerWriter, stream: _Stream, member: tarfile.TarInfo, place: str, owner: Owner | None) -> None:
    path = _below(place, member.name)
    if path == place and member.isdir():
        return
    whose = owner or Owner(member.uid, member.gid)
    if owner is None and not (0 <= member.uid <= MAX_ID and 0 <= member.gid <= MAX_ID):
        raise InvalidRequest(
            f"{member.name[:200]!r} belongs to {member.uid}:{member.gid}",
            why=f"sandboxes have ids 0 to {MAX_ID}",
            fix="give all of it to one user with --chown",
        )
    folder = writer.resolve(posixpath.dirname(path), create=owner or Owner())
    assert folder is not None
    path = posixpath.join(folder, posixpath.basename(path))
    mode = member.mode & 0o7777
    mtime_ns = int(min(max(member.mtime, 0), _LATEST_S)) * 10**9
    if member.isdir():
        if writer.is_directory(path):
            path = writer.resolve(path) or path
        writer.directory(path, mode, whose, mtime_ns)
    elif member.issparse():
        raise InvalidRequest(f"{member.name[:200]!r} is a sparse file", fix="pack it without --sparse")
    elif member.isreg():
        writer.file(path, stream.content(member.size), mode, whose, mtime_ns)
    elif member.issym():
        writer.symlink(path, member.linkname, whose, mtime_ns)
    elif member.islnk():
        target = _below(place, member.linkname)
        above = writer.resolve(posixpath.dirname(target))
        writer.hard_link(path, target if above is None else posixpath.join(above, posixpath.basename(target)))
    else:
        raise InvalidRequest(
            f"{member.name[:200]!r} is no file, directory or link", why="devices and pipes are not made"
        )


def _below(place: str, name: str) -> str:
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise InvalidRequest(f"{name[:200]!r} leads outside", why="it has '..' in it")
    return posixpath.join(place, *parts)
