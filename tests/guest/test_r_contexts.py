"""Code contexts of R: variables stay, values and plots show, cells can be stopped."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel
from tartarus.guest.contexts import CellDone, CellError, CellEvent, CellResult, CellStderr, CellStdout, CodeContext
from tartarus.model.errors import GuestFailed

from .parking import no_cold, parked, request

pytestmark = [pytest.mark.anyio, pytest.mark.needs("r")]


@pytest.fixture
async def context(guest: GuestChannel, tmp_path: Path) -> AsyncIterator[CodeContext]:
    waiting = await parked(guest, tmp_path, "r", cells=True)
    taken = waiting.offer(request(tmp_path, "tartarus-context", stdin=True), no_cold)
    assert taken is not None
    opened = CodeContext(taken, interrupted_by_host=True)
    yield opened
    await opened.close()


async def run(context: CodeContext, code: str, timeout_s: float | None = None) -> list[CellEvent]:
    events = [event async for event in context.run(code, timeout_s)]
    assert isinstance(events[-1], CellDone)
    return events[:-1]


def shown(text: str) -> CellResult:
    return CellResult({"text/plain": text}, is_main=True)


VALUES = [
    ("6 * 7", "[1] 42"), ("'a\\n\"b'", '[1] "a\\n\\"b"'), ("x <- 1\nx", "[1] 1"), ("c(a = 1)", "a \n1 "), ("NULL", "NULL"),
    ("'é\U0001f600'", '[1] "é\U0001f600"'), ("setClass('P', representation(x = 'numeric')); new('P', x = 1)", 'An object of class "P"\nSlot "x":\n[1] 1\n'),
    ("mean(c(1, 2, 3)) # a comment", "[1] 2"), ("commandArgs(TRUE)", "character(0)"),
]  # fmt: skip


async def test_the_last_value_is_the_result(context: CodeContext) -> None:
    for code, text in VALUES:
        assert await run(context, code) == [shown(text)]


async def test_variables_stay(context: CodeContext) -> None:
    assert await run(context, "x <- 1; f <- function() x + 1; invisible(5)") == []
    assert await run(context, "f()") == [shown("[1] 2")]
    assert await run(context, "ls()") == [shown('[1] "f" "x"')]


async def test_output_in_order(context: CodeContext) -> None:
    code = "cat('a'); message('b'); 1\nwarning('c'); print('d')\n2"
    assert await run(context, code) == [
        CellStdout("a"), CellStderr("b\n"), CellStdout("[1] 1\n"), CellStderr("Warning: c\n"), CellStdout('[1] "d"\n'), shown("[1] 2"),
    ]  # fmt: skip


async def test_an_error_and_its_calls(context: CodeContext) -> None:
    events = await run(context, "f <- function(x) stop('bad ', x)\ncat('before')\nf(1)\ncat('after')")
    assert events == [CellStdout("before"), CellError("simpleError", "bad 1", 'f(1)\nstop("bad ", x)')]
    (error,) = await run(context, "1 +")
    assert isinstance(error, CellError)
    assert "unexpected end of input" in error.value
    (error,) = await run(context, "quit(status = 3)")
    assert isinstance(error, CellError)
    assert (error.name, error.value) == ("SystemExit", "3")
    assert await run(context, "1") == [shown("[1] 1")]


async def test_plots_become_images(context: CodeContext) -> None:
    events = await run(context, "plot(1:3); hist(c(1, 2, 2)); 'done'")
    results = [event for event in events if isinstance(event, CellResult)]
    assert results[0] == shown('[1] "done"')
    assert len(results) == 3
    for result in results[1:]:
        assert base64.b64decode(result.data["image/png"], validate=True).startswith(b"\x89PNG")
        assert base64.b64decode(result.data["image/png"]).endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("code", ["while (TRUE) {}", "Sys.sleep(60)"])
async def test_a_cell_that_takes_too_long(context: CodeContext, code: str) -> None:
    await run(context, "kept <- 1")
    (error,) = await run(context, code, 0.3)
    assert isinstance(error, CellError)
    assert (error.name, error.value) == ("CellTimeout", "the cell ran longer than 0.3 s")
    assert await run(context, "Sys.sleep(0.4); kept") == [shown("[1] 1")]


async def test_a_cell_is_interrupted(context: CodeContext) -> None:
    events = []
    async for event in context.run("message('up'); while (TRUE) {}"):
        if isinstance(event, CellStderr):
            await asyncio.sleep(0.1)
            await context.interrupt()
        events.append(event)
    assert isinstance(events[-2], CellError)
    assert events[-2].name == "KeyboardInterrupt"
    assert await run(context, "2") == [shown("[1] 2")]


async def test_interrupts_between_cells_do_nothing(context: CodeContext) -> None:
    assert await run(context, "1") == [shown("[1] 1")]
    context.process.signal(2)
    await asyncio.sleep(0.1)
    assert await run(context, "for (i in 1:1e5) i; 2") == [shown("[1] 2")]


async def test_children_can_not_break_the_protocol(context: CodeContext) -> None:
    assert await run(context, "invisible(system('echo hello; echo {}')); 1") == [shown("[1] 1")]
    assert await run(context, "system('echo hello', intern = TRUE)") == [shown('[1] "hello"')]


async def test_much_output_and_many_megabytes(context: CodeContext) -> None:
    events = await run(context, "for (i in 1:20000) cat(i, '\\n')")
    assert "".join(event.text for event in events if isinstance(event, CellStdout)).count("\n") == 20000
    assert await run(context, f"nchar('{'x' * 3_000_000}')") == [shown("[1] 3000000")]


async def test_bytes_that_are_no_text(context: CodeContext) -> None:
    events = await run(context, "writeLines(rawToChar(as.raw(c(0x61, 0xff, 0x62))), useBytes = TRUE); cat('\\001')")
    assert "".join(event.text for event in events if isinstance(event, CellStdout)) == "a<ff>b\n\x01"


async def test_a_context_that_dies(context: CodeContext) -> None:
    with pytest.raises(GuestFailed):
        await run(context, "tools::pskill(Sys.getpid(), 9)")
    with pytest.raises(GuestFailed):
        await run(context, "1")
