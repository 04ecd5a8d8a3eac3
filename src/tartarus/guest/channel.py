"""The host's end of a guest: everything that can be asked of the agent inside (docs/guest-protocol.md)."""

from __future__ import annotations

import asyncio
import socket
from collections import deque

import msgspec

from tartarus.guest.connection import fail, settle
from tartarus.guest.files import Answer, FileCalls
from tartarus.guest.ports import GuestPort
from tartarus.guest.process import GuestExec, GuestProcess
from tartarus.guest.protocol import (
    ALL_FIXED_UP,
    MAX_TEXT,
    READY,
    U32,
    U32_U32,
    VERSION,
    BadFrame,
    FixedUp,
    ToGuest,
    ToHost,
    connect_payload,
    fixup_payload,
)
from tartarus.guest.session import SessionState
from tartarus.model.errors import GuestFailed

__all__ = [
    "BootFailed", "GuestChannel", "GuestExec", "GuestPort", "GuestProcess", "Ready", "SessionState", "channel_pair",
]  # fmt: skip

_SOCKET_BYTES = 1024 * 1024
_SO_SNDBUFFORCE = 32
_SHUTDOWN_SLACK_S = 2.0


class Ready(msgspec.Struct, frozen=True):
    """The guest's greeting: protocol version, the agent's pid in the sandbox, whether a warm runner is attached."""

    version: int
    pid: int
    warm_runner: bool


class BootFailed(GuestFailed):
    """The guest could not set up its confinement. `step` indexes the boot program's labels."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", step: int = 0, errno: int = 0) -> None:
        super().__init__(what, why=why, fix=fix)
        self.step = step
        self.errno = errno


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """(host's end, guest's end) of a new channel, with buffers as large as the host allows."""
    host, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (host, guest):
        try:
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return host, guest


class GuestChannel(FileCalls):
    """Owns one connected stream socket whose other end a guest agent serves."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._ready: asyncio.Future[Ready] = self.loop.create_future()
        self._same_guest: asyncio.Future[None] | None = None
        self._pings: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._stops: deque[asyncio.Future[bool]] = deque()

    async def open(self, state: SessionState | None = None) -> None:
        """Attach to the running loop and greet the guest. Does not wait for its answer.

        With the `state` that a guest's session had when it was saved, go on with that session, quiet until `go_on`.
        """
        self.attach()
        if state is None:
            self.send(ToGuest.HELLO, 0, U32.pack(VERSION))
        else:
            self._same_guest = self.resume_at(state)

    async def ready(self) -> Ready:
        """The guest's greeting. Raises BootFailed when its set-up failed, GuestFailed when it went away."""
        ready = await asyncio.shield(self._ready)
        if self._same_guest is not None:
            await asyncio.shield(self._same_guest)
        return ready

    def exec(self, spec: GuestExec) -> GuestProcess:
        """Send a command at once, even before the guest is ready."""
        process = GuestProcess(self, spec)
        self.begin(process, ToGuest.EXEC, spec.encode())
        return process

    async def open_port(self, port: int) -> GuestPort:
        """Connect to a TCP port on the sandbox's loopback. Raises InvalidState when nothing listens there."""
        stream = GuestPort(self, port)
        self.begin(stream, ToGuest.CONNECT, connect_payload(port))
        try:
            await stream.connected()
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    async def ping(self, payload: bytes = b"") -> None:
        """Wait until the guest answers; GuestFailed when it never will."""
        if len(payload) > MAX_TEXT:
            raise ValueError(f"a ping carries at most {MAX_TEXT} bytes")
        answered: asyncio.Future[None] = self.loop.create_future()
        if self.closed.done():
            raise self._reason()
        self._pings.append((payload, answered))
        self.send(ToGuest.PING, 0, payload)
        await answered

    async def fixup(self, unix_ns: int = 0, entropy: bytes = b"") -> tuple[bool, bool]:
        """Give a restored guest the time (0: leave its clock alone) and up to 4 KiB of randomness.

        Returns (clock set, randomness taken): a guest may lack the privilege for either.
        """
        done = await self.renew(fixup_payload(unix_ns, entropy))
        return bool(done & FixedUp.CLOCK), bool(done & (FixedUp.RESEEDED | FixedUp.MIXED))

    async def renew(self, payload: bytes) -> FixedUp:
        """Send a FIXUP (`fixup_payload`); what of it the guest did."""
        (done,) = U32.unpack(await self.ask(Answer(self, "fix up", "the clock", 4), ToGuest.FIXUP, payload))
        return FixedUp(done & ALL_FIXED_UP)

    async def stop(self, signal: int, grace_s: float) -> bool:
        """Signal every process and wait until none is left (True), at most `grace_s` seconds; the guest lives on.

        The guest keeps the time: who does not trust it sets a limit of their own. Raises GuestFailed when it goes away.
        """
        stopped: asyncio.Future[bool] = self.loop.create_future()
        if self.closed.done():
            raise self._reason()
        self._stops.append(stopped)
        self.send(ToGuest.STOP, 0, U32_U32.pack(min(round(grace_s * 1000), 0xFFFF_FFFF), signal))
        return await stopped

    async def shutdown(self, grace_s: float) -> None:
        """Ask every process to end, wait up to `grace_s` seconds, then end the guest. Returns when it is gone."""
        self.go_on()
        self.send(ToGuest.SHUTDOWN, 0, U32.pack(min(round(grace_s * 1000), 0xFFFF_FFFF)))
        try:
            await asyncio.wait_for(asyncio.shield(self.closed), grace_s + _SHUTDOWN_SLACK_S)
        except TimeoutError:
            self.close()

    def on_session_frame(self, kind: int, payload: bytes) -> None:
        """Greeting, failure to boot, answer to a ping."""
        if kind == ToHost.READY:
            version, pid, features = READY.unpack(payload)
            if version != VERSION or self._ready.done():
                raise BadFrame(f"greeting with version {version}")
            settle(self._ready, Ready(version, pid, bool(features & 1)))
        elif kind == ToHost.BOOT_FAILED:
            if self._ready.done():
                raise BadFrame("a boot that failed after it succeeded")
            step, number = U32_U32.unpack(payload)
            self._end(
                BootFailed(
                    "the guest could not set itself up", why=f"step {step}, error {number}", step=step, errno=number
                )
            )
        elif kind == ToHost.PONG:
            if not self._pings or self._pings[0][0] != payload:
                raise BadFrame("an answer to no ping")
            settle(self._pings.popleft()[1], None)
        elif kind == ToHost.STOPPED:
            if not self._stops:
                raise BadFrame("an answer to no stop")
            settle(self._stops.popleft(), bool(U32.unpack(payload)[0]))
        else:
            super().on_session_frame(kind, payload)

    def on_closed(self, error: GuestFailed) -> None:
        """Fail what waits on no stream."""
        super().on_closed(error)
        fail(self._ready, error)
        while self._pings:
            fail(self._pings.popleft()[1], error)
        while self._stops:
            fail(self._stops.popleft(), error)
