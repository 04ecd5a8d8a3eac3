"""A layer directory as an OCI layer: a deterministic pax archive, whiteouts and opaque directories as files again."""

from __future__ import annotations

import hashlib
import os
import stat

# The standard library's writer knows when a pax header is needed and how to write one.
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

from tartarus.images.unpack.inside.cursor import DIRECTORY, Parts
from tartarus.images.unpack.inside.extract import OPAQUE_NAME, WHITEOUT_PREFIX
from tartarus.images.unpack.inside.refusal import Refused
from tartarus.images.unpack.inside.trees import Entry, Sink, Taker, Xattrs, take
from tartarus.images.unpack.limits import Limits

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_LEVEL = 6
_GZIP_WBITS = 31
_PIECE = 1 << 20


def pack(path: str, out: int, limits: Limits, *, compressed: bool, id_base: int = 0) -> dict[str, Any]:
    """Write the archive of the directory `path` to `out`; its digests, before and after compression, and its size.

    `id_base`: what the sandbox's ids begin with where this is called; in the jail they are its own.
    """
    writer = _Writer(out, compressed=compressed)
    facts = take(os.open(path, DIRECTORY), limits, _Packer(writer.write, id_base), times=True)
    writer.write(_END)
    writer.finish()
    return {**facts, "diff_id": f"sha256:{writer.plain.hexdigest()}", "blob": f"sha256:{writer.blob.hexdigest()}",
            "size": writer.size}  # fmt: skip


class _Writer:
    """Digests before and after compression."""

    def __init__(self, out: int, *, compressed: bool) -> None:
        self._out = out
        self._compressor = zlib.compressobj(_LEVEL, wbits=_GZIP_WBITS) if compressed else None
        self.plain = hashlib.sha256()
        self.blob = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self.plain.update(data)
        self._pass_on(self._compressor.compress(data) if self._compressor else data)

    def finish(self) -> None:
        if self._compressor:
            self._pass_on(self._compressor.flush())

    def _pass_on(self, data: bytes) -> None:
        self.blob.update(data)
        self.size += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._out, view) :]


class _Packer(Taker):
    """Writes each thing of a tree as an entry."""

    def __init__(self, write: Callable[[bytes], None], id_base: int) -> None:
        self._write = write
        self._id_base = id_base

    def _header(
        self, entry: Entry, kind: bytes, *, size: int = 0, link: bytes = b"", xattrs: Xattrs | None = None
    ) -> bytes:
        info = _info(entry, kind, size, link, xattrs or {})
        info.uid, info.gid = (max(0, number - self._id_base) for number in (info.uid, info.gid))
        return _buffer(info)

    def directory(self, entry: Entry, xattrs: Xattrs, *, opaque: bool) -> None:
        self._write(self._header(entry, tarfile.DIRTYPE, xattrs=xattrs))
        if opaque:
            self._write(_marker((*entry.parts, OPAQUE_NAME)))

    def file(self, entry: Entry, xattrs: Xattrs, fill: Callable[[Sink], None]) -> None:
        size = entry.status.st_size
        self._write(self._header(entry, tarfile.REGTYPE, size=size, xattrs=xattrs))
        written = 0

        def sink(data: bytes, at: int) -> None:
            nonlocal written
            self._zeros(at - written)
            self._write(data)
            written = at + len(data)

        fill(sink)
        self._zeros(size - written + -size % _BLOCK)

    def _zeros(self, count: int) -> None:
        while count > 0:
            self._write(bytes(min(count, _PIECE)))
            count -= _PIECE

    def symlink(self, entry: Entry, target: bytes) -> None:
        self._write(self._header(entry, tarfile.SYMTYPE, link=target))

    def hard_link(self, entry: Entry, first: Parts) -> None:
        self._write(self._header(entry, tarfile.LNKTYPE, link=b"/".join(first)))

    def special(self, entry: Entry) -> None:
        if entry.is_whiteout:
            self._write(_marker((*entry.parts[:-1], WHITEOUT_PREFIX + entry.name)))
        else:
            self._write(self._header(entry, tarfile.FIFOTYPE))


def _info(entry: Entry, kind: bytes, size: int, link: bytes, xattrs: Xattrs) -> tarfile.TarInfo:
    if entry.name.startswith(WHITEOUT_PREFIX):
        raise Refused(f"{entry.path} can't be packed", "in a layer's archive that name marks a deletion")
    info = tarfile.TarInfo(os.fsdecode(b"/".join(entry.parts) or b"."))
    info.type = kind
    info.size = size
    info.linkname = os.fsdecode(link)
    info.mode = stat.S_IMODE(entry.status.st_mode)
    info.uid, info.gid = entry.status.st_uid, entry.status.st_gid
    info.mtime = int(entry.status.st_mtime_ns // 10**9)
    texts = {name: value.decode("utf-8", "surrogateescape") for name, value in sorted(xattrs.items())}
    info.pax_headers = {f"SCHILY.xattr.{name}": text for name, text in texts.items()}
    return info


def _marker(parts: Parts) -> bytes:
    info = tarfile.TarInfo(os.fsdecode(b"/".join(parts)))
    info.mode = 0
    return _buffer(info)


def _buffer(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
