"""What a sandbox's main command wrote, kept on disk in bounded size and readable while it grows."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import struct
import time
from collections.abc import AsyncIterator, Container
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from tartarus.model.errors import NoSpace

_FRAME = struct.Struct("<QBI")
SEGMENT_BYTES = 8 * 1024**2
"""When the current file passes this size it becomes `….1`, which drops what was there: at most twice this is kept."""
_READ_BYTES = 256 * 1024
_STDERR = 2
_LAST_BYTES = 4096


class LogEntry(NamedTuple):
    """`time_ns`: Unix time in nanoseconds. `stream`: 1 stdout, 2 stderr."""

    time_ns: int
    stream: int
    data: bytes


class OutputLog:
    """One sandbox's log. The file appears with the first output."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._size = 0
        self._ended = False
        self._grew: asyncio.Event | None = None
        self._failed = False
        self.last_words = b""
        """The end of what came on the standard error since this daemon reads it."""

    @property
    def previous(self) -> Path:
        """The segment before the current one."""
        return self._path.with_name(self._path.name + ".1")

    @property
    def segments(self) -> list[Path]:
        """Its files, the older first; either may not be there."""
        return [self.previous, self._path]

    def append(self, stream: int, data: bytes) -> None:
        """Keep a piece of output. A full disk ends the log (the sandbox goes on) and is raised once as NoSpace."""
        if stream == _STDERR:
            self.last_words = (self.last_words + data[-_LAST_BYTES:])[-_LAST_BYTES:]
        if self._failed:
            return
        try:
            if self._fd < 0 or self._size > SEGMENT_BYTES:
                self._next_segment()
            written = os.writev(self._fd, [_FRAME.pack(time.time_ns(), stream, len(data)), data])
            if written != _FRAME.size + len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += written
        except OSError as error:
            self._fail()
            raise NoSpace("the sandbox's log can't be written", why=error.strerror or str(error)) from error
        self._wake()

    def sync(self) -> None:
        """What was kept so far is still there after the host went down. Blocks."""
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def end(self) -> None:
        """No more output will come; followers stop after what is there."""
        self._ended = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._wake()

    def _fail(self) -> None:
        """Nothing more is kept. Half a frame is no frame: a reader would take what follows for the rest of it."""
        self._failed = True
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)

    def _next_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            os.replace(self._path, self.previous)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = _whole_bytes(self._fd)
        if os.fstat(self._fd).st_size > self._size:
            os.ftruncate(self._fd, self._size)  # a daemon was killed while it wrote: half a frame is no frame

    def _wake(self) -> None:
        if self._grew is not None:
            self._grew.set()
            self._grew = None

    async def read(self, *, follow: bool = False) -> AsyncIterator[LogEntry]:
        """Entries from the oldest kept; with `follow`, go on until the log ends."""
        segment: FileIO | None = _open(self.previous) or _open(self._path)
        rest = b""
        try:
            while True:
                chunk = segment.read(_READ_BYTES) if segment is not None else b""
                if chunk:
                    entries, rest = _parse(rest + chunk)
                    for entry in entries:
                        yield entry
                    continue
                newer = _open(self._path)
                if newer is not None and not _same(segment, newer):
                    if segment is not None:
                        segment.close()
                    segment, rest = newer, b""
                    continue
                if newer is not None:
                    newer.close()
                if self._ended or not follow:
                    return
                await self._growth()
        finally:
            if segment is not None:
                segment.close()

    async def finished(self, limit_s: float) -> None:
        """Wait until the log has ended, but no longer than `limit_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not self._ended:
                    await self._growth()

    async def _growth(self) -> None:
        if self._grew is None:
            self._grew = asyncio.Event()
        await self._grew.wait()

    def remove(self) -> None:
        """Delete what was kept."""
        self.previous.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)


def finished(path: Path) -> OutputLog:
    """The log of a sandbox that has ended."""
    log = OutputLog(path)
    log.end()
    return log


def _whole_bytes(fd: int) -> int:
    """Where the last whole frame of a log ends."""
    at, size = 0, os.fstat(fd).st_size
    while size - at >= _FRAME.size:
        _, _, length = _FRAME.unpack(os.pread(fd, _FRAME.size, at))
        if size - at - _FRAME.size < length:
            break
        at += _FRAME.size + length
    return at


def _open(path: Path) -> FileIO | None:
    try:
        return FileIO(path, "rb")
    except FileNotFoundError:
        return None


def _same(one: FileIO | None, other: FileIO) -> bool:
    return one is not None and os.fstat(one.fileno()).st_ino == os.fstat(other.fileno()).st_ino


def _parse(data: bytes) -> tuple[list[LogEntry], bytes]:
    entries = []
    at = 0
    while len(data) - at >= _FRAME.size:
        time_ns, stream, size = _FRAME.unpack_from(data, at)
        if len(data) - at - _FRAME.size < size:
            break
        at += _FRAME.size
        entries.append(LogEntry(time_ns, stream, data[at : at + size]))
        at += size
    return entries, data[at:]


def remove_old(place: Path, cutoff: float, live: Container[str]) -> None:
    """Remove the logs of sandboxes that are not live any more, last written before `cutoff` (Unix seconds)."""
    for path in place.glob("sbx-*"):
        if path.stat().st_mtime < cutoff and path.name.split(".")[0] not in live:
            path.unlink(missing_ok=True)
