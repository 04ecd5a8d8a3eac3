"""Asks a parked guest (zygote or nursery) for clones, over its control socket.

The warm runner's zygote and the C nursery answer the same few packets on a SOCK_SEQPACKET socket. The node
is the only caller; it may have many clones in flight, since answers carry the request's sequence number.
What comes back is not trusted: a packet of the wrong form ends the client.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Sequence

from tartarus.model.errors import GuestFailed

_REQUEST = struct.Struct("<4sIQI")
_REPLY = struct.Struct("<4sIIi")
_NOTE = struct.Struct("<4sI")
_MAX_ANSWER = 64 * 1024
_RIGHTS_SPACE = socket.CMSG_SPACE(4 * 4)
_Packet = tuple[bytes, Sequence[int]]


def encode_clone_request(seq: int, flags: int, program: bytes) -> bytes:
    """One CLONE packet: `flags` are clone(2) namespace flags, `program` what the clone does to itself."""
    return _REQUEST.pack(b"TCLN", seq, flags, len(program)) + program


def parse_reply(packet: bytes) -> tuple[int, int, int]:
    """(sequence number, errno or 0, pid in the zygote's pid namespace); GuestFailed for anything else."""
    if len(packet) != _REPLY.size or packet[:4] != b"TCLD":
        raise GuestFailed("the zygote broke its protocol", why=f"unexpected packet {packet[:16]!r}")
    _, seq, number, pid = _REPLY.unpack(packet)
    if number == 0 and pid <= 0:
        raise GuestFailed("the zygote broke its protocol", why=f"clone {seq} has pid {pid}")
    return seq, number, pid


class ZygoteClient:
    """The host's end of one zygote's control socket. Made and used on one event loop; owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ready.add_done_callback(_mark_retrieved)
        self._clones: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._unsent: deque[tuple[int, _Packet]] = deque()
        self._seq = 0
        self._failure: GuestFailed | None = None
        self._loop.add_reader(sock.fileno(), self._on_readable)

    async def ready(self) -> None:
        """Wait until the zygote has warmed up; GuestFailed, with its own words, when it can't."""
        await asyncio.shield(self._ready)

    async def clone(self, program: bytes, clone_flags: int, fds: Sequence[int]) -> tuple[int, int]:
        """Make one clone: (its pid as the zygote sees it, a pidfd that the caller owns).

        `fds` (channel, agent executable, then whatever the program names) are copied by the kernel as the
        request is sent; keep them open until this returns. Raises GuestFailed, also when the zygote dies.
        """
        if self._failure is not None:
            raise self._failure
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        answer: asyncio.Future[tuple[int, int]] = self._loop.create_future()
        self._clones[seq] = answer
        packet = (encode_clone_request(seq, clone_flags, program), fds)
        if self._unsent or not self._send(packet):
            self._queue(seq, packet)
        try:
            return await answer
        except asyncio.CancelledError:
            self._abandon(seq, answer)
            raise

    def close(self) -> None:
        """Close the socket: the zygote ends, its clones live on. Clones still asked for fail."""
        self._fail(GuestFailed("the zygote was closed"))

    @property
    def closed(self) -> bool:
        """Whether this client can make no more clones."""
        return self._failure is not None

    def _send(self, packet: _Packet) -> bool:
        """Send now; False when the socket is full. A broken socket fails every clone."""
        try:
            socket.send_fds(self._sock, [packet[0]], list(packet[1]))
        except BlockingIOError:
            return False
        except OSError as failure:
            self._fail(GuestFailed("the zygote can't be asked", why=str(failure)))
        return True

    def _queue(self, seq: int, packet: _Packet) -> None:
        if not self._unsent:
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
        self._unsent.append((seq, packet))

    def _abandon(self, seq: int, answer: asyncio.Future[tuple[int, int]]) -> None:
        """Forget a clone whose caller was cancelled: unsent, it never happens; sent, it is killed on arrival."""
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            _discard(answer.result()[1])
            return
        before = len(self._unsent)
        self._unsent = deque(item for item in self._unsent if item[0] != seq)
        if len(self._unsent) < before:
            self._clones.pop(seq, None)

    def _on_writable(self) -> None:
        while self._unsent and self._failure is None:
            if not self._send(self._unsent[0][1]):
                return
            if self._unsent:
                self._unsent.popleft()
        if self._failure is None:
            self._loop.remove_writer(self._sock.fileno())

    def _on_readable(self) -> None:
        while self._failure is None:
            try:
                packet, fds, flags, _ = socket.recv_fds(self._sock, _MAX_ANSWER, 4, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError as failure:
                self._fail(GuestFailed("the zygote is gone", why=str(failure)))
                return
            try:
                self._take(packet, fds, flags)
            except GuestFailed as failure:
                self._fail(failure)
            finally:
                for fd in fds:
                    os.close(fd)

    def _take(self, packet: bytes, fds: list[int], flags: int) -> None:
        """Act on one packet; takes out of `fds` what it hands on."""
        if not packet:
            raise GuestFailed("the zygote is gone", why="it closed its control socket")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise GuestFailed("the zygote broke its protocol", why="a packet was too long")
        if packet[:4] in (b"TRDY", b"TERR") and len(packet) >= _NOTE.size and not self._ready.done():
            if packet[:4] == b"TERR":
                raise GuestFailed("the warm-up failed", why=packet[_NOTE.size :].decode("utf-8", "replace"))
            self._ready.set_result(None)
            return
        seq, number, pid = parse_reply(packet)
        answer = self._clones.pop(seq, None)
        if answer is None or len(fds) != (number == 0):
            raise GuestFailed("the zygote broke its protocol", why=f"unexpected answer to clone {seq}")
        if number:
            if not answer.done():
                answer.set_exception(GuestFailed("the zygote could not clone itself", why=os.strerror(number)))
        elif answer.done():
            _discard(fds.pop())
        else:
            answer.set_result((pid, fds.pop()))

    def _fail(self, failure: GuestFailed) -> None:
        """End: every waiter gets the failure."""
        if self._failure is not None:
            return
        self._failure = failure
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._unsent.clear()
        if not self._ready.done():
            self._ready.set_exception(failure)
        for answer in self._clones.values():
            if not answer.done():
                answer.set_exception(GuestFailed(failure.what, why=failure.why, fix=failure.fix))
        self._clones.clear()


def _discard(pidfd: int) -> None:
    """Kill a clone that nobody wants any more."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself
    finally:
        os.close(pidfd)


def _mark_retrieved(future: asyncio.Future[None]) -> None:
    """A zygote that nobody waited for may fail without a warning."""
    if not future.cancelled():
        future.exception()
