"""Answering system calls that a sandbox's filter hands over (SECCOMP_RET_USER_NOTIF): its listener, on our side.

What is handed over waits until it is answered, and fails with ENOSYS once nobody can. A caller that is killed, or
meets a signal, meanwhile is not there any more to be answered.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import socket
import struct
import time
from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from tartarus.guest.syscalls import table

if TYPE_CHECKING:
    from collections.abc import Callable

_NOTIFICATION = struct.Struct("<QIIiIQ6Q")
_RESPONSE = struct.Struct("<Qqii")
_RECEIVE, _SEND, _STILL_VALID = 0xC050_2100, 0xC018_2101, 0x4008_2102
_CONTINUE = 1


class Call(NamedTuple):
    """One that waits. `identity` is the kernel's; the caller's pid as this process sees it; `name` "" if unknown."""

    identity: int
    pid: int
    name: str
    args: tuple[int, ...]


def next_call(listener: int) -> Call | None:
    """The next call that waits; None when its caller went away."""
    buffer = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except FileNotFoundError:
        return None
    identity, pid, _flags, number, _arch, _ip, *args = _NOTIFICATION.unpack(buffer)
    return Call(identity, pid, _names().get(number, ""), tuple(args))


def check_waiting(listener: int, call: Call) -> None:
    """Raise OSError if its caller does not wait any more: its pid may be another's by now."""
    fcntl.ioctl(listener, _STILL_VALID, struct.pack("<Q", call.identity))


def answer(listener: int, call: Call, error: int) -> bool:
    """Let it fail with this errno, or succeed with 0; whether it was still there."""
    return _respond(listener, _RESPONSE.pack(call.identity, 0, -error, 0))


def let_go_on(listener: int, call: Call) -> bool:
    """Let the kernel make it, as if nobody had been asked: what other filters say of it holds all the same."""
    return _respond(listener, _RESPONSE.pack(call.identity, 0, 0, _CONTINUE))


def _respond(listener: int, response: bytes) -> bool:
    try:
        fcntl.ioctl(listener, _SEND, response)
    except FileNotFoundError:
        return False
    return True


@cache
def _names() -> dict[int, str]:
    return {number: name for name, number in table().items()}


class Listener(ABC):
    """Serves one sandbox on the running event loop, from when its filter is installed until its last process ends.

    `link`: our end of the socket pair whose other end the guest's program sends the listener through (see
    `add_seccomp`). Each call is answered on the loop, one per turn, so no sandbox keeps the others waiting.
    `most_per_s`: calls that are answered in a second: a sandbox that makes more waits, and the daemon does not.
    """

    most_per_s: int | None = None

    def __init__(self, link: socket.socket) -> None:
        self._second = 0
        self._answered = 0
        self._link: socket.socket | None = link
        self._listener = -1
        self._poll = select.poll()
        self._loop = asyncio.get_running_loop()
        link.setblocking(False)
        self._loop.add_reader(link, self._receive)

    @abstractmethod
    def serve(self, listener: int) -> None:
        """Answer one waiting call."""

    def _receive(self) -> None:
        assert self._link is not None
        try:
            _data, fds, _flags, _address = socket.recv_fds(self._link, 1, 1)
        except BlockingIOError:
            return
        except OSError:
            fds = []
        self._drop_link()
        if fds:
            self._listener = fds[0]
            self._poll.register(self._listener, select.POLLIN)
            self._listen()

    def _listen(self) -> None:
        if self._listener >= 0:
            self._loop.add_reader(self._listener, self._serve)

    def _pace(self, most: int) -> None:
        now = time.monotonic()
        if int(now) != self._second:
            self._second, self._answered = int(now), 0
        self._answered += 1
        if self._answered >= most and self._listener >= 0:
            self._rest(1.0 - now % 1.0)

    def _rest(self, seconds: float) -> None:
        """Answer nothing for so long."""
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._listen)

    def _serve(self) -> None:
        events = sum(event for _fd, event in self._poll.poll(0))
        if events & select.POLLIN:
            self.serve(self._listener)
            if self.most_per_s is not None:
                self._pace(self.most_per_s)
        elif events:
            self.close()

    def _drop_link(self) -> None:
        if self._link is not None:
            self._loop.remove_reader(self._link)
            self._link.close()
            self._link = None

    def close(self) -> None:
        """Serve no more: calls that wait, and all later ones, fail with ENOSYS. Safe to repeat."""
        self._drop_link()
        if self._listener >= 0:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = -1


def watched(tell: Callable[[str], None]) -> tuple[CallWatch, int]:
    """A watch, and the descriptor that its guest's program sends the listener through; the caller closes that."""
    ours, theirs = socket.socketpair()
    return CallWatch(ours, tell), theirs.detach()


class CallWatch(Listener):
    """Refuses every call that is handed over, and tells its name: nothing of the caller is read, or believed."""

    most_per_s = 500

    def __init__(self, link: socket.socket, tell: Callable[[str], None]) -> None:
        self._tell = tell
        super().__init__(link)

    def serve(self, listener: int) -> None:
        """Refuse one waiting call."""
        call = next_call(listener)
        if call is not None and answer(listener, call, errno.EPERM):
            self._tell(call.name)
