"""A guest that lies about where its session stands: it loses its channel, and nothing it says is believed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.guest.channel import GuestChannel
from tartarus.guest.process import GuestProcess, ProcessState
from tartarus.guest.protocol import INPUT_WINDOW, READY, BadFrame, ToGuest, ToHost
from tartarus.guest.session import OpenStream, SessionState, read_quiesced
from tartarus.model.errors import GuestFailed

from .conftest import command
from .test_hostile_guest import EXITED, GREETING, STARTED, Liar, liar, raw

pytestmark = pytest.mark.anyio
__all__ = ["liar"]
WINDOW = 1000
TRUE = (1, ToGuest.EXEC, WINDOW, INPUT_WINDOW)
STATE = SessionState(1, (OpenStream(*TRUE),))


def quiesced(serial: int, *streams: tuple[int, int, int, int], count: int | None = None) -> bytes:
    payload = struct.pack("<II", serial, len(streams) if count is None else count)
    return raw(ToHost.QUIESCED, 0, payload + b"".join(struct.pack("<IIII", *stream) for stream in streams))


LIES = [
    (),
    ((1, ToGuest.EXEC, WINDOW + 1, INPUT_WINDOW),),
    ((1, ToGuest.EXEC, WINDOW - 1, INPUT_WINDOW),),
    ((1, ToGuest.EXEC, WINDOW, INPUT_WINDOW + 1),),
    ((1, ToGuest.READ, WINDOW, INPUT_WINDOW),),
    (TRUE, TRUE),
    (TRUE, (2, ToGuest.EXEC, 0, 0)),
    ((0, ToGuest.EXEC, WINDOW, INPUT_WINDOW),),
    ((2, ToGuest.EXEC, WINDOW, INPUT_WINDOW),),
]


@pytest.mark.parametrize("lie", LIES)
async def test_streams_that_are_not_so(liar: Liar, lie: tuple[tuple[int, int, int, int], ...]) -> None:
    process = liar.channel.exec(command("x", window=WINDOW))
    liar.say(GREETING, raw(ToHost.STARTED, 1, STARTED), quiesced(1, *lie))
    with pytest.raises(GuestFailed, match="broke its protocol"):
        await liar.channel.quiesce()
    with pytest.raises(GuestFailed):
        await process.wait()


@pytest.mark.parametrize(
    "said",
    [
        quiesced(1, TRUE),
        quiesced(0, TRUE),
        quiesced(2, TRUE),
        quiesced(0xFFFFFFFF),
    ],
)
async def test_an_answer_nobody_asked_for(liar: Liar, said: bytes) -> None:
    liar.channel.exec(command("x", window=WINDOW))
    liar.say(GREETING, raw(ToHost.STARTED, 1, STARTED), said)
    assert "broke its protocol" in str(await liar.channel.closed)


@pytest.mark.parametrize(
    "said",
    [
        quiesced(1, TRUE),
        raw(ToHost.STDOUT, 1, b"x"),
        raw(ToHost.EXIT, 1, EXITED),
        raw(ToHost.PONG, 0),
        GREETING,
        raw(ToHost.STDIN_CREDIT, 1, struct.pack("<I", 0)),
    ],
)
async def test_words_of_one_that_stands_still(liar: Liar, said: bytes) -> None:
    liar.channel.exec(command("x", window=WINDOW))
    liar.say(GREETING, raw(ToHost.STARTED, 1, STARTED), quiesced(1, TRUE))
    await liar.channel.quiesce()
    liar.say(said)
    assert "broke its protocol" in str(await liar.channel.closed)


@pytest.fixture
async def resuming() -> AsyncIterator[Liar]:
    opened = Liar()
    await opened.channel.open(STATE)
    yield opened
    opened.channel.close()
    opened.sock.close()


async def test_the_guest_that_was_saved_is_believed(resuming: Liar) -> None:
    resuming.say(GREETING, quiesced(0, TRUE))
    await resuming.channel.ready()
    state = ProcessState(stream=1, name="x", window=WINDOW, allowed=WINDOW, sendable=INPUT_WINDOW, pid=42)
    process = GuestProcess.restored(resuming.channel, state)
    resuming.channel.go_on("kill")
    resuming.say(raw(ToHost.STDOUT, 1, b"more"), raw(ToHost.EXIT, 1, EXITED))
    assert await process.read() == (1, b"more")
    assert (await process.wait()).code == 0


@pytest.mark.parametrize("lie", LIES)
async def test_another_guest_than_the_one_that_was_saved(
    resuming: Liar, lie: tuple[tuple[int, int, int, int], ...]
) -> None:
    resuming.say(GREETING, quiesced(0, *lie))
    with pytest.raises(GuestFailed, match="broke its protocol"):
        await resuming.channel.ready()


@pytest.mark.parametrize(
    "said",
    [
        raw(ToHost.STDOUT, 1, b"x"),
        raw(ToHost.EXIT, 1, EXITED),
        quiesced(0, TRUE),
        quiesced(1, TRUE),
        raw(ToHost.READY, 0, READY.pack(1, 1, 0)),
    ],
)
async def test_words_before_it_may_go_on(resuming: Liar, said: bytes) -> None:
    resuming.say(GREETING, quiesced(0, TRUE))
    await resuming.channel.ready()
    GuestProcess.restored(
        resuming.channel,
        ProcessState(stream=1, name="x", window=WINDOW, allowed=WINDOW, sendable=INPUT_WINDOW, pid=42),
    )
    resuming.say(said)
    assert "broke its protocol" in str(await resuming.channel.closed)


async def test_a_guest_that_says_nothing_after_its_greeting_is_not_ready(resuming: Liar) -> None:
    resuming.say(GREETING)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(resuming.channel.ready(), 0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"stream": 2},
        {"allowed": 999},
        {"allowed": 999, "consumed": 1},
        {"sendable": INPUT_WINDOW + 1},
        {"sendable": INPUT_WINDOW - 1},
        {"pid": -1},
        {"consumed": -1, "allowed": WINDOW + 1},
        {"unread": ((3, b"x"),), "allowed": 999},
        {"unread": ((1, b"x"),)},
        {"window": 2**32, "allowed": 2**32},
    ],
)
async def test_a_command_that_does_not_fit_its_session(resuming: Liar, change: dict[str, object]) -> None:
    """What was written down may be another's, or changed."""
    whole: dict[str, object] = {
        "stream": 1, "name": "x", "window": WINDOW, "allowed": WINDOW, "sendable": INPUT_WINDOW, "pid": 42,
    }  # fmt: skip
    with pytest.raises((ValueError, msgspec.ValidationError)):
        GuestProcess.restored(resuming.channel, ProcessState(**whole | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        b'{"last_stream": 0, "streams": [{"id": 1, "opened_by": 16, "output": 0, "input": 0}]}',
        b'{"last_stream": 4294967296, "streams": []}',
        b'{"last_stream": -1, "streams": []}',
        b'{"last_stream": 0, "streams": [], "version": 2}',
        b'{"last_stream": 0, "streams": [], "more": 1}',
        b'{"last_stream": 1, "streams": [{"id": 0, "opened_by": 16, "output": 0, "input": 0}]}',
        b'{"last_stream": 1, "streams": [{"id": 1, "opened_by": 16, "output": 4294967296, "input": 0}]}',
        b'{"last_stream": 1, "streams": [' + b", ".join([b'{"id": 1, "opened_by": 1, "output": 0, "input": 0}'] * 2) + b"]}",
    ],
)  # fmt: skip
def test_states_that_are_none(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=SessionState)


@given(st.binary(min_size=8, max_size=200))
def test_any_payload_is_read_or_refused(payload: bytes) -> None:
    try:
        serial, streams = read_quiesced(payload)
    except BadFrame:
        return
    assert 0 <= serial < 2**32
    assert len(payload) == 8 + 16 * len(streams)


def test_too_many_streams() -> None:
    with pytest.raises(BadFrame):
        read_quiesced(struct.pack("<II", 1, 1025) + bytes(16 * 1025))


async def test_only_a_quiet_channel_leaves_its_guest(liar: Liar) -> None:
    with pytest.raises(Exception, match="quiet"):
        liar.channel.unplug()
    assert isinstance(liar.channel, GuestChannel)
