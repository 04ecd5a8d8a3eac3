"""A compressed file, expanded: decompressors read foreign bytes, and do it in here."""

from __future__ import annotations

import bz2
import lzma
import os
from collections.abc import Iterator
from typing import Any

from tartarus.images.unpack.inside.refusal import Refused
from tartarus.images.unpack.inside.stream import Stream
from tartarus.images.unpack.limits import Limits

XZ_MAGIC, BZIP2_MAGIC = b"\xfd7zXZ\0", b"BZh"
_IN_BYTES = 128 << 10
_OUT_BYTES = 1 << 20


class _Expander(Stream):
    """Knows, beside what layers come in, what root file systems are published in."""

    def __init__(self, fd: int, limits: Limits) -> None:
        super().__init__(fd, limits, lambda _bytes: None)
        start = os.pread(fd, 6, 0)
        if start == XZ_MAGIC:
            self._chunks = _expanded(
                fd, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=limits.memory_bytes // 2)
            )
        elif start.startswith(BZIP2_MAGIC):
            self._chunks = _expanded(fd, bz2.BZ2Decompressor)

    def all(self) -> Iterator[memoryview]:
        """Everything, in the pieces in which it comes."""
        while not self.at_end():
            piece, self._rest = self._rest, memoryview(b"")
            yield piece


def expand(blob: int, out: int, limits: Limits) -> dict[str, Any]:
    """Write what the file `blob` expands to into `out`; how many bytes that are."""
    stream = _Expander(blob, limits)
    for piece in stream.all():
        rest = piece
        while rest:
            rest = rest[os.write(out, rest) :]
    return {"size": stream.position}


def _expanded(fd: int, make: Any) -> Iterator[bytes]:
    """Every stream of the file, one after another; nothing but streams."""
    data = os.read(fd, _IN_BYTES)
    while data:
        member = make()
        while not member.eof:
            if member.needs_input and not data and not (data := os.read(fd, _IN_BYTES)):
                raise Refused("the archive is cut off", "its compressed stream does not end")
            try:
                chunk = member.decompress(data, _OUT_BYTES)
            except (lzma.LZMAError, OSError, EOFError) as error:
                raise Refused("the archive is damaged", str(error)) from error
            data = b""
            if chunk:
                yield chunk
        data = member.unused_data or os.read(fd, _IN_BYTES)
