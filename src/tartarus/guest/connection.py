"""One socket to a guest, many conversations, no trust.

A single reader decodes what the guest sends and hands each piece to its stream; the first byte that
breaks the protocol closes the connection. Writes go out at once; what the guest does not take is
held up to a bound. Nothing here waits on one stream while another has work.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from tartarus.guest.protocol import HEADER, BadFrame, Decoder, ToGuest
from tartarus.model.errors import GuestFailed

if TYPE_CHECKING:
    import socket

    from tartarus.model.errors import TartarusError

_RECEIVE_BYTES = 1024 * 1024
_UNSENT_MAX = 16 * 1024 * 1024
_UNSENT_HIGH = 1024 * 1024
_JOIN_BELOW = 16 * 1024


class _Scratch(threading.local):
    """One receive buffer per thread: decoding copies out of it at once, so connections can share it."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_RECEIVE_BYTES))


_scratch = _Scratch()


class Stream:
    """One conversation. Gets `on_frame` for each checked piece, `on_lost` when the connection dies."""

    __slots__ = ("connection", "id", "opened_by")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.id = 0
        self.opened_by = 0

    def on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        """Take one piece. BadFrame closes the connection."""
        raise BadFrame(f"frame type {kind:#x} (flags {flags}, {len(payload)} bytes) on a stream of another kind")

    def on_lost(self, error: TartarusError) -> None:
        """The connection is gone; nothing more will come."""

    def on_stopped_reading(self) -> None:
        """Whoever reads what it brings is to look again."""

    def allowances(self) -> tuple[int, int]:
        """(bytes that the guest may still send, bytes that the host may) before the other end grants more."""
        return 0, 0


def settle(future: asyncio.Future[Any], value: object) -> None:
    """Complete a future, unless that happened before or its waiter gave up."""
    if not future.done():
        future.set_result(value)


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Fail a future; that nobody waits for it is no reason for a warning."""
    if not future.done():
        future.set_exception(error)
        future.exception()


class Signal:
    """Wakes the one coroutine that waits, if any."""

    __slots__ = ("_loop", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Until the next `wake`."""
        if self._waiter is not None:
            raise RuntimeError("another coroutine already waits here")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Let it look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection:
    """Owns one connected stream socket. `closed` completes at its end, with the error that caused it.

    `traffic`: how many bytes were ever said, by either end. `memory_kills`: how many processes the guest's own kernel
    killed for want of memory, as its agent says.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[GuestFailed | None] = self.loop.create_future()
        self._sock: socket.socket | None = sock
        self._decoder = Decoder()
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self.traffic = 0
        self.memory_kills = 0
        self._unsent = bytearray()
        self._broken = False
        self._draining: list[asyncio.Future[None]] = []
        # While the session is quiet: what may be sent all the same, and what waits until it goes on.
        self._passing: frozenset[ToGuest] | None = None
        self._held: list[tuple[ToGuest, int, bytes]] = []
        self._held_bytes = 0
        # Frames for streams up to this one are looked at twice: a quiet guest has nothing to say for them.
        self._quiet_to = -1

    def attach(self) -> None:
        """Begin to read."""
        assert self._sock is not None
        self._sock.setblocking(False)
        self.loop.add_reader(self._sock.fileno(), self._readable)

    def begin(self, stream: Stream, kind: ToGuest, payload: bytes) -> None:
        """Give a stream its id and send its first frame."""
        self._last_stream += 1
        stream.id = self._last_stream
        stream.opened_by = kind
        if self.closed.done():
            stream.on_lost(self._reason())
            return
        self._streams[stream.id] = stream
        self.send(kind, stream.id, payload)

    def forget(self, stream: Stream) -> None:
        """The stream is over; what the guest may still send for it is ignored."""
        self._streams.pop(stream.id, None)

    def cancel(self, stream: Stream) -> None:
        """Give a stream up, unless it is over."""
        if self._streams.pop(stream.id, None) is not None:
            self.send(ToGuest.CANCEL, stream.id)

    def send(self, kind: ToGuest, stream: int, payload: bytes | memoryview = b"") -> None:
        """Send one frame, now or as soon as the guest takes it."""
        if self._broken or self.closed.done():
            return
        self.traffic += HEADER.size + len(payload)
        if self._passing is not None and kind not in self._passing:
            self._hold(kind, stream, bytes(payload))
            return
        assert self._sock is not None
        header = HEADER.pack(len(payload), kind, 0, 0, stream)
        if self._unsent:
            self._keep(header, payload)
            return
        try:
            if len(payload) < _JOIN_BELOW:
                sent = self._sock.send(header + payload)
            else:
                sent = self._sock.sendmsg((header, payload))
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            # What the guest said before it closed is still to be read, and ends with its end of file.
            self._broken = True
            return
        if sent < len(header) + len(payload):
            self.loop.add_writer(self._sock.fileno(), self._writable)
            self._keep(header[sent:], payload[max(0, sent - len(header)) :])

    async def drained(self) -> None:
        """Wait until little of what was sent is still here."""
        if len(self._unsent) + self._held_bytes > _UNSENT_HIGH:
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._draining.append(waiter)
            await waiter

    def close(self) -> None:
        """Close, which ends the guest. What still waits fails with GuestFailed."""
        self._end(None)

    def breach(self, error: BadFrame) -> GuestFailed:
        """Close because of what the guest sent. Returns the error that everything waiting fails with."""
        self._end(GuestFailed("the sandbox's guest broke its protocol", why=str(error)))
        return self._reason()

    def check_quiet(self, number: int) -> None:
        """Raise BadFrame unless a quiet guest may speak on this stream."""

    def on_session_frame(self, kind: int, payload: bytes) -> None:
        """Take a frame that belongs to no stream."""
        raise BadFrame(f"frame type {kind:#x} ({len(payload)} bytes) on no stream")

    def on_closed(self, error: GuestFailed) -> None:
        """Fail what waits on no stream."""

    def _keep(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self._unsent += part
        self._bound()

    def _hold(self, kind: ToGuest, stream: int, payload: bytes) -> None:
        self._held.append((kind, stream, payload))
        self._held_bytes += HEADER.size + len(payload)
        self._bound()

    def _bound(self) -> None:
        if len(self._unsent) + self._held_bytes > _UNSENT_MAX:
            self._end(GuestFailed("the sandbox's guest agent does not read its channel"))

    def _writable(self) -> None:
        assert self._sock is not None
        try:
            sent = self._sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._broken = True
            sent = len(self._unsent)
        del self._unsent[:sent]
        if not self._unsent:
            self.loop.remove_writer(self._sock.fileno())
            self._release()

    def _release(self) -> None:
        waiting, self._draining = self._draining, []
        for waiter in waiting:
            settle(waiter, None)

    def _readable(self) -> None:
        assert self._sock is not None
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
        self.traffic += size
        try:
            for kind, flags, number, payload in self._decoder.feed(view[:size]):
                self._dispatch(kind, flags, number, payload)
        except BadFrame as error:
            self.breach(error)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            # A frame that no check of ours foresaw must not leave its command waiting for ever.
            self.breach(BadFrame(f"a frame that can't be read: {error}"))

    def _dispatch(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if number <= self._quiet_to:
            self.check_quiet(number)
        stream = self._streams.get(number)
        if stream is not None:
            stream.on_frame(kind, flags, payload)
        elif number == 0:
            self.on_session_frame(kind, payload)
        elif number > self._last_stream:
            raise BadFrame(f"stream {number} was never opened")

    def _reason(self) -> GuestFailed:
        return self.closed.result() or GuestFailed("the sandbox's channel is closed")

    def _end(self, error: GuestFailed | None) -> None:
        if self.closed.done():
            return
        if self._sock is not None:
            if self._sock.fileno() >= 0:
                self.loop.remove_reader(self._sock.fileno())
                self.loop.remove_writer(self._sock.fileno())
            self._sock.close()
        self._unsent.clear()
        self._held.clear()
        self._held_bytes = 0
        self._passing = None
        self.closed.set_result(error)
        self.on_closed(self._reason())
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_lost(self._reason())
        self._release()
