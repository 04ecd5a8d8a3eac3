"""The host's side of a nursery's or zygote's control socket: packets with descriptors, answered in any order."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from tartarus.model.errors import GuestFailed

_REPLY = struct.Struct("<4sIIi")
_SEQ = struct.Struct("<I")
_MAX_PACKET = 64 * 1024
_MAX_FDS = 1
_PACKETS_AT_ONCE = 32
_MAX_ERRNO = 4095  # MAX_ERRNO, linux/err.h; strerror takes not much more, and a hostile end may say anything
SILENCE_S = 5.0
"""Requests take milliseconds. Who answers none for this long (stopped, or stuck in the kernel) is given up."""


class Answer(NamedTuple):
    """`error` is an errno (0 is success); `value` a pid, or the failed step; `pidfd` is -1 where there is none."""

    error: int
    value: int
    pidfd: int


class ControlSocket:
    """One SOCK_SEQPACKET socket; requests carry a number and are answered with it."""

    def __init__(self, sock: socket.socket, what: str) -> None:
        self._sock = sock
        self._what = what
        self._next_seq = 1
        self._unanswered = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._heard_at = 0.0
        self._patience: asyncio.TimerHandle | None = None
        self.is_stuck = False
        self.banner: asyncio.Future[bytes] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    async def request(self, magic: bytes, body: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """Send one packet and wait for its answer. Raises GuestFailed when the other end is gone."""
        if self.closed.done():
            raise GuestFailed(f"the {self._what} has ended")
        seq = self._next_seq
        self._next_seq = seq % 0xFFFF_FFFF + 1
        answer: asyncio.Future[Answer] = self._loop.create_future()
        if not self._waiting:
            self._heard_at = self._loop.time()
        self._waiting[seq] = answer
        if self._patience is None:
            self._patience = self._loop.call_later(SILENCE_S, self._out_of_patience)
        try:
            async with self._sending:  # one waits for room at a time: a socket has one writer callback
                self._unanswered += 1
                await self._send(magic + _SEQ.pack(seq) + body, fds)
            return await answer
        except BaseException:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                _close(answer.result().pidfd)
            raise
        finally:
            self._waiting.pop(seq, None)

    async def _send(self, packet: bytes, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            try:
                self._sock.sendmsg([packet], ancillary)
                return
            except BlockingIOError:
                await self._writable()
            except OSError as error:
                self.close()
                raise GuestFailed(
                    f"the {self._what} does not take requests", why=os.strerror(error.errno or 0)
                ) from error

    async def _writable(self) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        # A few at a time: an interpreter that a template brought may send faster than we read, and others wait.
        for _ in range(_PACKETS_AT_ONCE):
            if self.closed.done():
                return
            try:
                packet, fds, _flags, _address = socket.recv_fds(self._sock, _MAX_PACKET, _MAX_FDS)
            except BlockingIOError:
                return
            except OSError:
                packet, fds = b"", []
            if not packet:
                self.close()
                return
            self._take(packet, fds)

    def _take(self, packet: bytes, fds: list[int]) -> None:
        pidfd = fds[0] if fds else -1
        if len(packet) != _REPLY.size or packet[:4] != b"TCLD":
            _close(pidfd)
            if self.banner.done():
                self.close()  # it speaks once without being asked
            else:
                self.banner.set_result(packet)
            return
        self._unanswered -= 1
        if self._unanswered < 0:
            _close(pidfd)
            self.close()
            return
        self._heard_at = self._loop.time()
        _magic, seq, error, value = _REPLY.unpack(packet)
        waiting = self._waiting.get(seq)
        if waiting is None or waiting.done():
            _close(pidfd)
            return
        waiting.set_result(Answer(min(error, _MAX_ERRNO), value, pidfd))

    def _out_of_patience(self) -> None:
        self._patience = None
        if not self._waiting or self.closed.done():
            return
        left_s = self._heard_at + SILENCE_S - self._loop.time()
        if left_s <= 0:
            self.is_stuck = True
            self.close()
        else:
            self._patience = self._loop.call_later(left_s, self._out_of_patience)

    def close(self) -> None:
        """Close the socket; the other end ends itself. Waiting requests fail."""
        if self.closed.done():
            return
        self.closed.set_result(None)
        if self._patience is not None:
            self._patience.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        gone = GuestFailed(f"the {self._what} has ended")
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(gone)
        if not self.banner.done():
            self.banner.set_result(b"")


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
