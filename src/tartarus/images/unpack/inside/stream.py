"""The uncompressed bytes of a blob: counted, digested and capped as they pass."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from types import ModuleType

# The bindings that Mercurial stores with; the standard library has zstd only from Python 3.14 on.
import zstandard

from tartarus.images.unpack.inside.refusal import Refused
from tartarus.images.unpack.limits import REPORT_EVERY, Limits

isal_zlib: ModuleType | None
try:
    # Two to three times as fast as zlib; kept by the maintainers of xopen. Where it has no wheel, zlib does.
    from isal import isal_zlib
except ImportError:
    isal_zlib = None

_IN_BYTES = 128 << 10
_OUT_BYTES = 1 << 20
_GZIP_WBITS = 31
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# What zstd's own program accepts unless told otherwise; a stream may ask for 2 GiB.
_ZSTD_MOST_WINDOW = 128 << 20

Chunks = Iterator[bytes]


class Stream:
    """Reads exactly what it is asked for, from a descriptor that holds a plain, gzip or zstd stream.

    `report` is called with the count of bytes so far, now and then. Everything raises Refused for a stream that is
    cut off, damaged, or longer than `limits` let a blob of its size be.
    """

    def __init__(self, fd: int, limits: Limits, report: Callable[[int], None]) -> None:
        size = os.fstat(fd).st_size
        self._most = min(limits.bytes, limits.ratio_free_bytes + limits.ratio * size)
        self._why_most = (
            f"a layer may have {limits.bytes} bytes"
            if self._most == limits.bytes
            else f"{size} bytes may become {self._most}, {limits.ratio} times as many and then some"
        )
        self._chunks = _chunks(fd)
        self._hash = hashlib.sha256()
        self._report = report
        self._reported = 0
        self._seen = 0
        self._rest = memoryview(b"")

    @property
    def position(self) -> int:
        """How many bytes were taken."""
        return self._seen - len(self._rest)

    def _more(self) -> bool:
        """Fetch the next chunk, when the last is used up; whether there is one."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        self._seen += len(chunk)
        if self._seen > self._most:
            raise Refused("the layer is too large when uncompressed", self._why_most)
        self._hash.update(chunk)
        self._rest = memoryview(chunk)
        if self._seen - self._reported >= REPORT_EVERY:
            self._reported = self._seen
            self._report(self._seen)
        return True

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes, in the pieces in which they come."""
        while count:
            if not self._rest and not self._more():
                raise Refused("the archive is cut off", f"{count} more bytes were promised")
            piece = self._rest[:count]
            self._rest = self._rest[len(piece) :]
            count -= len(piece)
            yield piece

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        piece = self._rest[:count]
        if len(piece) == count:
            self._rest = self._rest[count:]
            return bytes(piece)
        return b"".join(self.pieces(count))

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        for _ in self.pieces(count):
            pass

    def at_end(self) -> bool:
        """Whether nothing follows."""
        return not self._rest and not self._more()

    def only_zeros_follow(self) -> bool:
        """Read to the end, where tape-minded writers leave zeros; whether there was nothing else."""
        while True:
            # A translation that deletes zeros is the quickest look for anything else.
            if bytes(self._rest).translate(None, b"\0"):
                return False
            self._rest = memoryview(b"")
            if not self._more():
                return True

    def digest(self) -> str:
        """``sha256:…`` of everything fetched; meant for when `at_end` holds."""
        return f"sha256:{self._hash.hexdigest()}"


def _chunks(fd: int) -> Chunks:
    start = os.pread(fd, 4, 0)
    if start.startswith(_GZIP_MAGIC):
        return _gunzipped(fd)
    # A frame, or one that a reader skips, which some writers put first.
    if start == _ZSTD_MAGIC or (start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        return _unzstd(fd)
    return _plain(fd)


def _plain(fd: int) -> Chunks:
    while chunk := os.read(fd, _OUT_BYTES):
        yield chunk


def _gunzipped(fd: int) -> Chunks:
    """Every member of a gzip file; nothing but members."""
    library = isal_zlib or zlib
    data = os.read(fd, _IN_BYTES)
    while data:
        member = library.decompressobj(_GZIP_WBITS)
        while not member.eof:
            data = data or os.read(fd, _IN_BYTES)
            try:
                chunk = member.decompress(data, _OUT_BYTES)
            except library.error as error:
                raise Refused("the layer is damaged", f"gzip: {error}") from error
            if not data and not chunk and not member.eof:
                raise Refused("the layer is cut off", "its gzip stream does not end")
            data = member.unconsumed_tail
            if chunk:
                yield chunk
        data = member.unused_data or os.read(fd, _IN_BYTES)


def _unzstd(fd: int) -> Chunks:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MOST_WINDOW)
    with open(fd, "rb", buffering=0, closefd=False) as source:
        reader = decompressor.stream_reader(source, read_size=_IN_BYTES, read_across_frames=True)
        while True:
            try:
                chunk = reader.read(_OUT_BYTES)
            except zstandard.ZstdError as error:
                raise Refused("the layer is damaged", f"zstd: {error}") from error
            if not chunk:
                return
            yield chunk
