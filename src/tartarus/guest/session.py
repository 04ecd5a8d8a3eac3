"""A session that stands still while its guest is saved, and goes on with another host end (docs/guest-protocol.md).

`quiesce` brings both ends to a point where nothing is under way; `SessionState` says where that is. From there the
same session goes on (`go_on`), or a new channel to the restored guest does (`GuestChannel.open` with the state), with
the streams that are named again (`GuestProcess.restored`) or with those of a channel that outlived its guest
(`unplug`, `plug`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import msgspec

from tartarus.guest.connection import Connection, Stream, fail, settle
from tartarus.guest.protocol import (
    MAX_STREAMS,
    OPEN_STREAM,
    RESUME,
    U32,
    U32_U32,
    U32_U32_U32,
    VERSION,
    BadFrame,
    Reader,
    ToGuest,
    ToHost,
)
from tartarus.model.errors import GuestFailed, InvalidState, TartarusError

QUIESCE_S = 5.0
"""How long an agent may take to stand still; it needs to send at most what is on its way already."""
MOST_U32 = 0xFFFF_FFFF
STATE_VERSION = 1
Others = Literal["keep", "detach", "kill"]
_OTHERS: dict[Others, int] = {"keep": 0, "detach": 1, "kill": 2}
_ONLY_GO_ON = frozenset({ToGuest.GO_ON, ToGuest.FREEZE})
_BEFORE_GO_ON = frozenset({ToGuest.FIXUP, ToGuest.PING, ToGuest.GO_ON, ToGuest.FREEZE})


class OpenStream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One open stream: the type of its first frame, and what each end may still send before it is granted more."""

    id: int
    opened_by: int
    output: int
    input: int

    def __post_init__(self) -> None:
        numbers = (self.id, self.opened_by, self.output, self.input)
        if not all(0 <= number <= MOST_U32 for number in numbers) or not self.id:
            raise ValueError(f"stream {self.id} is none")


class SessionState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a quiet session stands. Kept beside a guest's memory, and believed only as far as it fits together."""

    last_stream: int
    streams: tuple[OpenStream, ...]
    version: int = STATE_VERSION

    def __post_init__(self) -> None:
        ids = {stream.id for stream in self.streams}
        if self.version != STATE_VERSION:
            raise ValueError(f"a session of version {self.version}; this is version {STATE_VERSION}")
        if len(ids) != len(self.streams) or len(ids) > MAX_STREAMS:
            raise ValueError("a session's streams are not each there once")
        if not max(ids, default=0) <= self.last_stream <= MOST_U32:
            raise ValueError(f"a session's last stream is {self.last_stream}")


class _Quiesced(NamedTuple):
    serial: int
    streams: frozenset[OpenStream]


def read_quiesced(payload: bytes) -> _Quiesced:
    """What QUIESCED says. Raises BadFrame."""
    reader = Reader(payload)
    serial, count = reader.take(U32_U32)
    if count > MAX_STREAMS:
        raise BadFrame(f"{count} open streams")
    streams = [reader.take(OPEN_STREAM) for _ in range(count)]
    reader.done()
    if len({stream[0] for stream in streams}) != count or not all(stream[0] for stream in streams):
        raise BadFrame("open streams that are not each there once")
    return _Quiesced(serial, frozenset(OpenStream(*stream) for stream in streams))


class Session(Connection):
    """The part of a channel that stands still and goes on."""

    _serial = 0
    _answered: asyncio.Future[SessionState] | None = None
    _resumed: asyncio.Future[None] | None = None
    _freezing: asyncio.Future[bool] | None = None
    _state: SessionState | None = None
    on_output: Callable[[int], None] | None = None
    """Told of every piece of output of every command, in bytes."""
    output_bytes = 0
    stopped_reading: TartarusError | None = None

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._given_up: set[int] = set()
        self._asked = False
        self._resting: list[asyncio.Future[None]] = []

    def stop_reading(self, why: TartarusError | None) -> None:
        """Whoever reads a command's output is told that instead, until this is called with None."""
        self.stopped_reading = why
        for stream in list(self._streams.values()):
            stream.on_stopped_reading()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing flows now: what is asked meanwhile waits."""
        return self._passing is not None

    @property
    def state(self) -> SessionState | None:
        """Where it stands while it is quiet; None while it flows."""
        return self._state if self._answered is None or self._answered.done() else None

    @property
    def calls_waiting(self) -> bool:
        """Whether something was asked since it became quiet."""
        return bool(self._held) or self._asked

    def is_held(self, kind: ToGuest, stream: int) -> bool:
        """Whether such a frame waits until the session goes on."""
        return any((kind, stream) == held[:2] for held in self._held)

    async def flowing(self, *, asked: bool = False) -> None:
        """Wait until the session goes on, or has ended; `asked`: somebody has something for the guest."""
        while self._passing is not None:
            self._asked |= asked
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._resting.append(waiter)
            await waiter

    async def quiesce(self, limit_s: float = QUIESCE_S) -> SessionState:
        """Bring the session to a stand: nothing is under way in either direction when this returns.

        Programs run on until their pipes are full. Raises InvalidState when it is quiet already, GuestFailed when the
        guest does not answer within `limit_s` seconds; the session then goes on.
        """
        if self.closed.done():
            raise self._reason()
        if self._passing is not None:
            raise InvalidState("this sandbox is being saved already", fix="try again in a moment")
        self._serial += 1
        self._answered = self.loop.create_future()
        self._state = SessionState(self._last_stream, ())
        self.send(ToGuest.QUIESCE, 0, U32.pack(self._serial))
        self._passing = _ONLY_GO_ON
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(self._answered)
        except TimeoutError:
            self._give_up()
            raise GuestFailed("the sandbox's guest agent does not come to a stand") from None
        except asyncio.CancelledError:
            self._give_up()
            raise

    async def freeze(self, on: bool) -> bool:
        """Let a machine's programs stand still, or go on; whether all of them do. Its session may be quiet.

        What is saved then does nothing where it is restored before a FIXUP has renewed it, which lets them go on.
        """
        if self.closed.done():
            raise self._reason()
        self._freezing = self.loop.create_future()
        self.send(ToGuest.FREEZE, 0, U32.pack(on))
        return await asyncio.shield(self._freezing)

    def go_on(self, others: Others = "keep") -> None:
        """End the stand, and send what waited; nothing when it is not quiet.

        `others`: what becomes of commands that this end does not know, which a new channel's are unless they were
        `restored`: they live on unheard ("detach"), or are killed. Their other streams end.
        """
        if self._passing is None or self._sock is None:
            return
        ids: list[int] = []
        if others != "keep":
            known = {stream.id for stream in self._opened()}
            ids = sorted(known & set(self._streams))
        payload = U32_U32.pack(_OTHERS[others], len(ids)) + b"".join(U32.pack(number) for number in ids)
        self.send(ToGuest.GO_ON, 0, payload)
        self._passing = self._state = None
        self._asked = False
        self._quiet_to = -1
        held, self._held, self._held_bytes = self._held, [], 0
        for kind, stream, data in held:
            self.send(kind, stream, data)
        if not self._unsent:
            self._release()
        self._flow()

    def unplug(self) -> Self:
        """Take the socket from a quiet session, as another channel that only has to be closed.

        What waits here, and what is asked now, waits for `plug`. A channel that left its guest already leaves nothing
        but a channel that leads nowhere.
        """
        if self.closed.done():
            raise self._reason()
        if self._state is None:
            raise InvalidState("only a quiet channel can leave its guest")
        if self._sock is None:
            nowhere, other_end = socket.socketpair()
            other_end.close()
            return type(self)(nowhere)
        old = type(self)(self._take_socket())
        self._passing = frozenset()
        return old

    def plug(self, fresh: Session) -> None:
        """Go on over the socket of a channel that was opened with this session's state; `go_on` is still to be said."""
        if self._sock is not None or self._state is None or fresh._state is None or fresh._unsent:
            raise InvalidState("only a channel without a guest can go on over another's socket")
        if self.closed.done():
            raise self._reason()
        self._renumber(self._state.last_stream, fresh._last_stream)
        self._decoder = fresh._decoder
        self._sock = fresh._take_socket()
        # The numbers of what the runtime asked over the fresh one are used.
        self._state, fresh._state = SessionState(fresh._last_stream, fresh._state.streams), None
        self._passing = _BEFORE_GO_ON
        self._quiet_to = self._state.last_stream
        self.loop.add_reader(self._sock.fileno(), self._readable)

    def on_session_frame(self, kind: int, payload: bytes) -> None:
        """The answer to QUIESCE, or what a resumed guest says of its streams."""
        if kind == ToHost.FROZEN:
            if self._freezing is None or self._freezing.done():
                raise BadFrame("programs that nobody asked to be frozen")
            settle(self._freezing, U32.unpack(payload)[0] == 1)
            return
        if kind != ToHost.QUIESCED:
            super().on_session_frame(kind, payload)
            return
        serial, streams = read_quiesced(payload)
        if serial in self._given_up:
            self._given_up.discard(serial)
        elif serial == 0 and self._resumed is not None and not self._resumed.done() and self._state is not None:
            if streams != frozenset(self._state.streams):
                raise BadFrame("a resumed guest's streams are not those that it was saved with")
            settle(self._resumed, None)
        elif serial == self._serial and self._answered is not None and not self._answered.done():
            if streams != self._expected():
                raise BadFrame("a guest's streams are not those that the host knows")
            assert self._state is not None
            self._state = SessionState(self._state.last_stream, tuple(sorted(streams, key=lambda one: one.id)))
            self._quiet_to = MOST_U32
            settle(self._answered, self._state)
        else:
            raise BadFrame("an answer to no request to stand still")

    def on_closed(self, error: GuestFailed) -> None:
        """Fail what waits on no stream."""
        super().on_closed(error)
        for waiting in (self._answered, self._resumed, self._freezing):
            if waiting is not None:
                fail(waiting, error)
        self._state = None
        self._flow()

    def resume_at(self, state: SessionState) -> asyncio.Future[None]:
        """Send the HELLO that resumes; the result completes when the guest has shown that it is the one meant."""
        self._state = state
        self._last_stream = state.last_stream
        self._resumed = self.loop.create_future()
        self.send(ToGuest.HELLO, 0, U32_U32_U32.pack(VERSION, RESUME, state.last_stream))
        self._passing = _BEFORE_GO_ON
        self._quiet_to = state.last_stream
        return self._resumed

    def check_quiet(self, number: int) -> None:
        """A guest that stands still says nothing at all; one that is being resumed, nothing on its old streams."""
        if number == 0 and self._freezing is not None and not self._freezing.done():
            return
        if number or self._quiet_to == MOST_U32:
            raise BadFrame(f"a frame on stream {number} while the session stands still")

    def restore_stream(self, stream: Stream, number: int) -> None:
        """Have a stream that was open when the guest was saved, and go on with it. Raises ValueError."""
        opened = next((one for one in self._opened() if one.id == number), None)
        if opened is None or number in self._streams or stream.allowances() != (opened.output, opened.input):
            raise ValueError(f"stream {number} is not as it was when its guest was saved")
        stream.id = number
        stream.opened_by = opened.opened_by
        self._streams[number] = stream

    def _opened(self) -> tuple[OpenStream, ...]:
        return () if self._state is None else self._state.streams

    def _expected(self) -> frozenset[OpenStream]:
        """The open streams as the guest must see them: without those that were begun behind the request."""
        assert self._state is not None
        return frozenset(
            OpenStream(stream.id, stream.opened_by, *stream.allowances())
            for stream in self._streams.values()
            if stream.id <= self._state.last_stream
        )

    def _give_up(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._given_up.add(self._serial)
        self.go_on()

    def _flow(self) -> None:
        resting, self._resting = self._resting, []
        for waiter in resting:
            settle(waiter, None)

    def _take_socket(self) -> socket.socket:
        sock, self._sock = self._sock, None
        assert sock is not None
        self.loop.remove_reader(sock.fileno())
        self.loop.remove_writer(sock.fileno())
        return sock

    def _renumber(self, old_last: int, last: int) -> None:
        """Give streams that were begun since `old_last`, whose first frames wait here, numbers behind `last`."""
        begun = {number: stream for number, stream in self._streams.items() if number > old_last}
        numbers = {old: last + at for at, old in enumerate(sorted({n for _, n, _ in self._held if n > old_last}), 1)}
        for number in begun:
            del self._streams[number]
        for number, stream in begun.items():
            stream.id = numbers[number]
            self._streams[stream.id] = stream
        self._held = [(kind, numbers.get(stream, stream), data) for kind, stream, data in self._held]
        self._last_stream = last + len(numbers)
