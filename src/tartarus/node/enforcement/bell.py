"""One descriptor of the loop's for all alarms of all sandboxes: asyncio itself can't wait for priority events."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

_AT_ONCE = 64


class Bell:
    """An epoll set in the loop. What is hung up is called with the descriptor, each time that wakes up."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._calls: dict[int, Callable[[int], None]] = {}
        self._loop.add_reader(self._epoll.fileno(), self._ring)

    def hang_up(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        """Call that when one of the epoll events happens."""
        self._calls[fd] = call
        self._epoll.register(fd, events)

    def take_down(self, fd: int) -> None:
        """No more of it; before it is closed."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Nobody is called any more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._calls.clear()

    def _ring(self) -> None:
        for fd, _ in self._epoll.poll(0, _AT_ONCE):
            call = self._calls.get(fd)  # an earlier one in this round may have taken it down
            if call is not None:
                call(fd)
