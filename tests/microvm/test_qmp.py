"""What a monitor says is foreign: one that its guest took over may say anything, and only its machine may suffer."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.model.errors import GuestFailed
from tartarus.runtimes.microvm.qmp import Qmp

pytestmark = pytest.mark.anyio
GREETING = b'{"QMP": {"version": {}}}\n'
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


async def said(wire: bytes) -> str:
    """How a command ends when the monitor says that: its answer's type, or the error."""
    ours, theirs = socket.socketpair()
    qmp = Qmp(ours)
    try:
        theirs.sendall(GREETING)
        await asyncio.wait_for(qmp._greeting, 5)
        call = asyncio.create_task(qmp.call("stop"))
        await asyncio.sleep(0)
        theirs.setblocking(False)
        theirs.sendall(wire[: 1 << 16])
        theirs.close()
        try:
            return type(await asyncio.wait_for(call, 5)).__name__
        except GuestFailed as error:
            return error.what
    finally:
        qmp.close()
        theirs.close()


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=400)
    | st.lists(JSON, max_size=6).map(lambda many: b"".join(json.dumps(one).encode() + b"\n" for one in many))
)
def test_nothing_that_it_says_is_more_than_an_answer_or_an_end(wire: bytes) -> None:
    """Any bytes, any JSON."""
    asyncio.run(said(wire))


@pytest.mark.parametrize(
    "answer",
    [b'{"id": 1, "error": 7}', b'{"id": 1, "error": {"desc": [1]}}', b'{"id": 1, "error": "' + b"x" * 5000 + b'"}'],
)
async def test_an_error_of_any_shape_is_an_error(answer: bytes) -> None:
    """With its words, cut short."""
    assert await said(answer + b"\n") == "the virtual machine monitor refused a command"


@pytest.mark.parametrize("wire", [b"[" * 3000 + b"\n", b"nonsense\n", b"[]\n", b"\xff\xfe\n", b""])
async def test_what_is_not_qmp_ends_it(wire: bytes) -> None:
    """And whoever waits is told."""
    assert await said(wire) == "the virtual machine monitor is gone"


async def test_a_line_without_end_is_not_held() -> None:
    """Nor one of more bytes than any answer has."""
    ours, theirs = socket.socketpair()
    qmp = Qmp(ours)
    theirs.setblocking(False)
    closed = False
    for _ in range(200):
        try:
            theirs.send(b"x" * 65536)
        except BlockingIOError:
            pass
        except OSError:
            closed = True
            break
        await asyncio.sleep(0)
    assert closed
    assert len(qmp._held) < 1 << 20
    with pytest.raises(GuestFailed):
        await qmp.call("stop")
    theirs.close()


async def test_events_nobody_waits_for_are_dropped() -> None:
    """However many."""
    wire = b"".join(json.dumps({"event": f"E{number}", "data": {}}).encode() + b"\n" for number in range(1000))
    assert await said(wire + b'{"id": 1, "return": {}}\n') == "dict"
