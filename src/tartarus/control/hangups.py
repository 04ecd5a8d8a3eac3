"""Noticing at once that a client is gone, even while unread bytes of its own are still queued before the end.

A reader only sees the end of a stream after everything before it, and with backpressure on it may not
read for long; EPOLLHUP says so immediately. One epoll watches every connection that asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable, Iterator


class HangupWatcher:
    """Calls back once when a watched connection has been closed by its peer. One per event loop."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._on_ready)

    @contextlib.contextmanager
    def watching(self, fd: int, on_hangup: Callable[[], None]) -> Iterator[None]:
        """Call `on_hangup` if the peer of `fd` closes while inside; at once if it already has."""
        try:
            # No event asked for: EPOLLHUP and EPOLLERR always report, a half-close (EPOLLRDHUP) is no hang-up.
            self._epoll.register(fd, select.EPOLLONESHOT)
        except FileExistsError:  # an earlier request on this connection is still unwinding
            self._epoll.modify(fd, select.EPOLLONESHOT)
        except OSError:  # the connection was closed on our side before we came to it
            self._loop.call_soon(on_hangup)
            yield
            return
        self._callbacks[fd] = on_hangup
        try:
            yield
        finally:
            # The number may by now be another connection's, with a callback of its own.
            if self._callbacks.get(fd) is on_hangup:
                del self._callbacks[fd]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _on_ready(self) -> None:
        for fd, _ in self._epoll.poll(0):
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()
