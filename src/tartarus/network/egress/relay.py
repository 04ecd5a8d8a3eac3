"""Bytes from one socket to another and back, as fast as they go, until both ends have said all."""

from __future__ import annotations

import asyncio
import socket

_PIECE = 512 * 1024
"""Bytes that are moved at once: one buffer serves all connections, as none is kept in it between two turns."""
_TURNS = 4
_HALF_S = 120.0
"""How long the one end may say nothing after the other has said all."""
_buffer = bytearray(_PIECE)
_view = memoryview(_buffer)


class Relay:
    """Two sockets, which it does not own. `sent` and `received` count bytes from and to the first."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._out = _Way(self, near, far)
        self._back = _Way(self, far, near)
        self.moved_at = self._loop.time()

    @property
    def sent(self) -> int:
        """Bytes from the first to the second."""
        return self._out.count

    @property
    def received(self) -> int:
        """Bytes from the second to the first."""
        return self._back.count

    async def run(self, idle_s: float) -> bool:
        """Until both have ended, or one broke; False when nothing was said for so long. Safe to cancel."""
        try:
            self._out.begin()
            self._back.begin()
            while True:
                half = self._out.over or self._back.over
                left_s = self.moved_at + min(idle_s, _HALF_S if half else idle_s) - self._loop.time()
                if left_s <= 0:
                    return False
                done, _ = await asyncio.wait([self._done], timeout=min(left_s, _HALF_S))
                if done:
                    return True
        finally:
            self._out.stop()
            self._back.stop()

    def ended(self, *, broken: bool) -> None:
        """One way has ended."""
        if not self._done.done() and (broken or (self._out.over and self._back.over)):
            self._done.set_result(None)


class _Way:
    def __init__(self, relay: Relay, source: socket.socket, sink: socket.socket) -> None:
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._source, self._sink = source, sink
        self._left = memoryview(b"")
        self.count = 0
        self.over = False

    def begin(self) -> None:
        self._loop.add_reader(self._source, self._readable)

    def stop(self) -> None:
        self._loop.remove_reader(self._source)
        self._loop.remove_writer(self._sink)

    def _readable(self) -> None:
        try:
            for _ in range(_TURNS):
                count = self._source.recv_into(_buffer)
                if not count:
                    self._loop.remove_reader(self._source)
                    self._sink.shutdown(socket.SHUT_WR)
                    self._end()
                    return
                self.count += count
                self._relay.moved_at = self._loop.time()
                try:
                    sent = self._sink.send(_view[:count])
                except BlockingIOError:
                    sent = 0
                if sent < count:
                    self._left = memoryview(bytes(_view[sent:count]))
                    self._loop.remove_reader(self._source)
                    self._loop.add_writer(self._sink, self._writable)
                    return
                if count < _PIECE // 8:
                    return
        except BlockingIOError:
            return
        except OSError:
            self._end(broken=True)

    def _writable(self) -> None:
        try:
            self._left = self._left[self._sink.send(self._left) :]
        except BlockingIOError:
            return
        except OSError:
            self._end(broken=True)
            return
        self._relay.moved_at = self._loop.time()
        if not self._left:
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._readable)

    def _end(self, *, broken: bool = False) -> None:
        self.over = True
        self._relay.ended(broken=broken)
