"""The host's end of a guest: one socket, many conversations, no trust.

A single reader decodes what the guest sends and hands each piece to its stream; the first byte that
breaks the protocol closes the channel. Writes go out at once; what the guest does not take is held up
to a bound. Nothing here waits on one stream while another has work.
"""

from __future__ import annotations

import asyncio
import socket
import threading


import msgspec

from tartarus.guest.process import GuestExec, GuestProcess
from tartarus.guest.protocol import HEADER, READY, U32_U32, VERSION, BadFrame, Decoder, ToGuest, ToHost, hello
from tartarus.guest.stream import Stream, fail, settle
from tartarus.model.errors import GuestFailed


__all__ = ["BootFailed", "GuestChannel", "GuestExec", "GuestProcess", "Ready", "channel_pair"]

_RECEIVE_BYTES = 1024 * 1024
_SOCKET_BYTES = 1024 * 1024
_MAX_UNSENT = 16 * 1024 * 1024


class _Scratch(threading.local):
    """One receive buffer per thread: decoding copies out of it at once, so channels can share it."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_RECEIVE_BYTES))


_scratch = _Scratch()


class Ready(msgspec.Struct, frozen=True):
    """The guest's greeting: protocol version, the agent's pid in the sandbox, whether a warm runner is attached."""

    version: int
    pid: int
    warm_runner: bool


class BootFailed(GuestFailed):
    """The guest could not set up its confinement. `step` indexes the boot program's labels."""

    def __init__(self, step: int, errno: int) -> None:
        super().__init__(f"the guest could not start: step {step} failed with error {errno}")
        self.step = step
        self.errno = errno


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """(host's end, guest's end) of a new channel, with buffers as large as the host allows."""
    host, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (host, guest):
        try:
            end.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), _SOCKET_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return host, guest


class GuestChannel:
    """Owns one connected stream socket whose other end a guest agent serves."""

    def __init__(self, sock: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[GuestFailed | None] = self.loop.create_future()
        self._ready: asyncio.Future[Ready] = self.loop.create_future()
        self._sock = sock
        self._decoder = Decoder()
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self._unsent = bytearray()
        self._broken = False
        self._drained: list[asyncio.Future[None]] = []

    async def open(self) -> None:
        """Attach to the running loop and greet the guest. Does not wait for its answer."""
        self._sock.setblocking(False)
        self.loop.add_reader(self._sock.fileno(), self._readable)
        self._write(hello())

    async def ready(self) -> Ready:
        """The guest's greeting. Raises BootFailed when its set-up failed, GuestFailed when it went away."""
        return await asyncio.shield(self._ready)

    def exec(self, spec: GuestExec) -> GuestProcess:
        """Send a command at once, even before the guest is ready."""
        process = GuestProcess(self, spec)
        self.begin(process, ToGuest.EXEC, spec.encode())
        return process

    def close(self) -> None:
        """Close the channel, which ends the guest. What still waits on it fails with GuestFailed."""
        self._end(None)

    # For the streams.

    def begin(self, stream: Stream, kind: ToGuest, payload: bytes) -> None:
        """Give a stream its id and send its first frame."""
        self._last_stream += 1
        stream.id = self._last_stream
        if self.closed.done():
            stream.on_lost(self.closed.result() or GuestFailed("the sandbox's channel is closed"))
            return
        self._streams[stream.id] = stream
        self.send(kind, stream.id, payload)

    def forget(self, stream: Stream) -> None:
        """The stream is over; what the guest may still send for it is ignored."""
        self._streams.pop(stream.id, None)

    def send(self, kind: ToGuest, stream: int, payload: bytes | memoryview = b"") -> None:
        """Send one frame, now or as soon as the guest takes it."""
        self._write(HEADER.pack(len(payload), kind, 0, 0, stream) + payload)

    # Writing.

    def _write(self, data: bytes) -> None:
        if self._broken or self.closed.done():
            return
        if not self._unsent:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                # What the guest said before it closed is still to be read, and ends with its end of file.
                self._broken = True
                return
            if sent == len(data):
                return
            data = data[sent:]
            self.loop.add_writer(self._sock.fileno(), self._writable)
        self._unsent += data
        if len(self._unsent) > _MAX_UNSENT:
            self._end(GuestFailed("the sandbox's guest agent does not read its channel"))

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._broken = True
            self._unsent.clear()
        else:
            del self._unsent[:sent]
        if not self._unsent:
            self.loop.remove_writer(self._sock.fileno())
            for waiter in self._drained:
                settle(waiter, None)
            self._drained.clear()

    async def drained(self) -> None:
        """Wait until all that was sent is in the guest's socket."""
        if self._unsent and not self.closed.done():
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._drained.append(waiter)
            await waiter

    # Reading.

    def _readable(self) -> None:
        view = _scratch.view
        try:
            size = self._sock.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            size = 0
        if size == 0:
            self._end(GuestFailed("the sandbox's guest agent went away"))
            return
        try:
            for kind, flags, stream, payload in self._decoder.feed(view[:size]):
                self._dispatch(kind, flags, stream, payload)
        except BadFrame as error:
            self._end(GuestFailed("the sandbox's guest broke its protocol", why=str(error)))

    def _dispatch(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        found = self._streams.get(stream)
        if found is not None:
            found.on_frame(kind, flags, payload)
        elif stream:
            if stream > self._last_stream:
                raise BadFrame(f"stream {stream} was never opened")
        elif kind == ToHost.READY:
            self._on_ready(payload)
        elif kind == ToHost.BOOT_FAILED:
            if self._ready.done():
                raise BadFrame("a boot that failed after it succeeded")
            self._end(BootFailed(*U32_U32.unpack(payload)))

    def _on_ready(self, payload: bytes) -> None:
        version, pid, features = READY.unpack(payload)
        if version != VERSION or self._ready.done():
            raise BadFrame(f"greeting with version {version}")
        settle(self._ready, Ready(version, pid, bool(features & 1)))

    def _end(self, error: GuestFailed | None) -> None:
        if self.closed.done():
            return
        if self._sock.fileno() >= 0:
            self.loop.remove_reader(self._sock.fileno())
            self.loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self.closed.set_result(error)
        reason = error or GuestFailed("the sandbox's channel is closed")
        fail(self._ready, reason)
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.on_lost(reason)
        for waiter in self._drained:
            settle(waiter, None)
        self._drained.clear()
        self._unsent.clear()
