"""Reads the files of a Debian package without ever unpacking one.

Our own, because a package from anywhere may be given: nothing here follows a name or makes a file, what a name says
is only compared, and every size has a limit. dpkg-deb would read the same with a host program, as root.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import zstandard

from tartarus.model.errors import InvalidRequest

MAGIC = b"!<arch>\n"
MAX_UNPACKED = 2 * 1024**3
"""What a package may hold in all, in bytes; Debian 13's largest kernel has 0.5 GiB."""
MAX_MEMBERS = 100_000
_MAX_NAME = 4096
_MAX_HEADER_DATA = 64 * 1024
_BLOCK = 512
_CHUNK = 256 * 1024
_WITHOUT_DATA = frozenset({tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE})
_XZ_MEMORY = 192 * 1024**2
_ZSTD_WINDOW = 128 * 1024**2


class Damaged(InvalidRequest):
    """A package that can't be read."""

    def __init__(self, why: str) -> None:
        super().__init__("this is no Debian package that can be read", why=why, fix="fetch it again")


class Member:
    """One regular file of the package; its content can be read once, before the next one is asked for."""

    def __init__(self, path: PurePosixPath, size: int, stream: _Stream) -> None:
        self.path = path
        self.size = size
        self._stream = stream
        self.left = size

    def chunks(self) -> Iterator[bytes]:
        """Its content."""
        while self.left:
            piece = self._stream.exactly(min(self.left, _CHUNK))
            self.left -= len(piece)
            yield piece

    def read(self, most: int) -> bytes:
        """All of its content. Raises InvalidRequest for more than `most` bytes."""
        if self.size > most:
            raise Damaged(f"{self.path} is larger than {most} bytes")
        return b"".join(self.chunks())


def files(package: BinaryIO) -> Iterator[Member]:
    """Every regular file in a package, in its order. Raises InvalidRequest (Damaged) for anything malformed."""
    try:
        stream = _Stream(_data(package))
        yield from _files(stream)
        stream.finish()
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, tarfile.TarError) as error:
        raise Damaged(str(error)) from error


def is_package(path: Path) -> bool:
    """Whether a file begins as a package does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class _Stream:
    """Blocks of any length, read by exact lengths; counts against the limit of the whole package."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._held = b""
        self._taken = 0

    def exactly(self, size: int) -> bytes:
        parts, missing = [], size
        self._taken += size
        if self._taken > MAX_UNPACKED:
            raise Damaged("it holds more than a kernel package does")
        while missing:
            if not self._held:
                self._held = next(self._blocks, b"")
                if not self._held:
                    raise Damaged("it ends too early")
            parts.append(self._held[:missing])
            self._held = self._held[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def finish(self) -> None:
        """Read to the end, where what packed it says whether it was all right."""
        for piece in self._blocks:
            self._taken += len(piece)
            if self._taken > MAX_UNPACKED:
                raise Damaged("it holds more than a kernel package does")


def _data(package: BinaryIO) -> Iterator[bytes]:
    """The unpacked tar of a package's files: the third member of its ar archive (deb(5))."""
    if package.read(len(MAGIC)) != MAGIC:
        raise Damaged("it does not begin as an ar archive")
    for expected in ("debian-binary", "control.tar", "data.tar"):
        header = package.read(60)
        if len(header) != 60 or header[58:] != b"`\n":
            raise Damaged(f"{expected} is missing")
        name = header[:16].decode("ascii", "replace").rstrip(" /")
        digits = header[48:58].strip()
        if not name.startswith(expected) or not digits.isdigit():
            raise Damaged(f"{name!r} stands where {expected} should")
        size = int(digits)
        if expected == "data.tar":
            return _unpacked(name.removeprefix(expected), _section(package, size))
        for _ in _section(package, size + size % 2):
            pass
    raise AssertionError


def _section(package: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        piece = package.read(min(size, _CHUNK))
        if not piece:
            raise Damaged("it ends too early")
        size -= len(piece)
        yield piece


def _unpacked(kind: str, packed: Iterator[bytes]) -> Iterator[bytes]:
    if kind == "":
        return packed
    if kind == ".xz":
        return _xz(packed)
    if kind == ".gz":
        return _gz(packed)
    if kind == ".zst":
        return _zst(packed)
    raise Damaged(f"its files are packed as {kind!r}, which no kernel's package is")


def _xz(packed: Iterator[bytes]) -> Iterator[bytes]:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    for piece in packed:
        data = piece
        while not unpacker.eof:
            if out := unpacker.decompress(data, _CHUNK):
                yield out
            data = b""
            if unpacker.needs_input:
                break
        else:
            return
    raise Damaged("it ends too early")


def _gz(packed: Iterator[bytes]) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    for piece in packed:
        data = piece
        while data and not unpacker.eof:
            if out := unpacker.decompress(data, _CHUNK):
                yield out
            data = unpacker.unconsumed_tail
    if not unpacker.eof:
        raise Damaged("it ends too early")


def _zst(packed: Iterator[bytes]) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    with unpacker.stream_reader(_Chunks(packed)) as reader:  # type: ignore[arg-type]
        while out := reader.read(_CHUNK):
            yield out


class _Chunks:
    """What zstandard reads from: it asks for `read` alone."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def read(self, size: int) -> bytes:  # noqa: ARG002 - a shorter or longer piece is as good
        return next(self._pieces, b"")


def _files(stream: _Stream) -> Iterator[Member]:
    long_name = ""
    for _ in range(MAX_MEMBERS):
        header = stream.exactly(_BLOCK)
        if not header.strip(b"\0"):
            return
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if info.size < 0:
            raise Damaged("a file of negative size")
        size = 0 if info.type in _WITHOUT_DATA else info.size
        member = Member(PurePosixPath(long_name or info.name), size, stream)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = member.read(_MAX_NAME).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type in {tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE}:
            member.read(_MAX_HEADER_DATA)
        else:
            long_name = ""
            if info.type in {tarfile.REGTYPE, tarfile.AREGTYPE}:
                yield member
        for _piece in member.chunks():
            pass
        stream.exactly(-size % _BLOCK)
    raise Damaged("it has too many files")
