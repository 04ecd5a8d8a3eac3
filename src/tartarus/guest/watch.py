"""Watching files in a guest: an endless, bounded stream of changes."""

from __future__ import annotations

import asyncio
import os
from collections import deque

from tartarus.guest.connection import Connection, Signal, Stream, fail, settle
from tartarus.guest.protocol import U32, BadFrame, Reader, ToHost
from tartarus.model.errors import FileFailed, TartarusError
from tartarus.model.sandbox import FileEvent

_MAX_WAITING = 4096
_KINDS = frozenset({"create", "write", "remove", "rename", "attrib", "overflow"})


class FileWatch(Stream):
    """An async iterator of changes. It ends when the watched path itself is gone; `aclose` ends it earlier.

    When nobody reads for long, what waits is replaced by one `overflow`: look again at everything.
    """

    __slots__ = ("_end", "_events", "_more", "_path", "_watching")

    def __init__(self, connection: Connection, path: str) -> None:
        super().__init__(connection)
        self._path = path
        self._events: deque[FileEvent] = deque()
        self._more = Signal(connection.loop)
        self._watching: asyncio.Future[None] = connection.loop.create_future()
        self._end: TartarusError | bool = False

    async def ready(self) -> None:
        """Return once every change will be seen. Raises FileFailed when the path can't be watched."""
        await asyncio.shield(self._watching)

    def __aiter__(self) -> FileWatch:
        return self

    async def __anext__(self) -> FileEvent:
        while not self._events:
            if isinstance(self._end, TartarusError):
                raise self._end
            if self._end:
                raise StopAsyncIteration
            await self._more.wait()
        return self._events.popleft()

    async def aclose(self) -> None:
        """Stop watching."""
        self.connection.cancel(self)
        self._finish(True)

    def on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        """Take an event, the sign that the watch stands, or its end."""
        if kind == ToHost.EVENT:
            self._on_event(payload)
        elif kind == ToHost.RESULT and not flags and not payload:
            if self._watching.done():
                self._finish(True)
            settle(self._watching, None)
        elif kind == ToHost.ERROR:
            reader = Reader(payload)
            (number,) = reader.take(U32)
            self._finish(FileFailed(f"can't watch {self._path} in the sandbox", why=os.strerror(number & 0xFFFF)))
        else:
            super().on_frame(kind, flags, payload)

    def on_lost(self, error: TartarusError) -> None:
        """The guest is gone."""
        self._finish(error)

    def _on_event(self, payload: bytes) -> None:
        reader = Reader(payload)
        event = FileEvent(reader.text(), reader.text())
        reader.done()
        if event.kind not in _KINDS:
            raise BadFrame(f"event of kind {event.kind!r}")
        if len(self._events) >= _MAX_WAITING:
            self._events.clear()
            event = FileEvent("overflow", self._path)
        self._events.append(event)
        self._more.wake()

    def _finish(self, end: TartarusError | bool) -> None:
        self.connection.forget(self)
        self._end = self._end or end
        if isinstance(end, TartarusError):
            fail(self._watching, end)
        else:
            settle(self._watching, None)
        self._more.wake()
