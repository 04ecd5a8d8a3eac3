"""Code contexts of Node.js: variables stay, values show, output streams, cells can be stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel
from tartarus.guest.contexts import CellDone, CellError, CellEvent, CellResult, CellStderr, CellStdout, CodeContext
from tartarus.model.errors import GuestFailed

from .parking import no_cold, parked, request

pytestmark = [pytest.mark.anyio, pytest.mark.needs("node")]


@pytest.fixture
async def context(guest: GuestChannel, tmp_path: Path) -> AsyncIterator[CodeContext]:
    waiting = await parked(guest, tmp_path, "node")
    taken = waiting.offer(request(tmp_path, "tartarus-context", stdin=True), no_cold)
    assert taken is not None
    opened = CodeContext(taken)
    yield opened
    await opened.close()


async def run(context: CodeContext, code: str, timeout_s: float | None = None) -> list[CellEvent]:
    events = [event async for event in context.run(code, timeout_s)]
    assert isinstance(events[-1], CellDone)
    return events[:-1]


def shown(text: str) -> CellResult:
    return CellResult({"text/plain": text}, is_main=True)


VALUES = [
    ("6 * 7", "42"), ("'a'", "'a'"), ("[1, {a: 2}]", "[ 1, { a: 2 } ]"), ("12n ** 20n", "3833759992447475122176n"),
    ("null", "null"), ("NaN", "NaN"), ("-0", "-0"), ("Symbol('s')", "Symbol(s)"), ("({}) ", "{}"),
    ("new Map([[1, 2]])", "Map(1) { 1 => 2 }"), ("await Promise.resolve(5)", "5"),
    ("(await import('node:path')).sep", "'/'"), ("'import(x)'", "'import(x)'"), ("typeof require('fs').statSync", "'function'"),
    ("class A { constructor() { this.b = 1 } }; new A()", "A { b: 1 }"), ("new Error('e').message", "'e'"),
    ("({ get a() { throw 1 }, [require('util').inspect.custom]() { throw new Error('no') } })", "<a value that can't be shown: no>"),
]  # fmt: skip


async def test_the_last_value_is_the_result(context: CodeContext) -> None:
    for code, text in VALUES:
        assert await run(context, code) == [shown(text)]


async def test_variables_stay_and_may_be_declared_again(context: CodeContext) -> None:
    assert await run(context, "const x = 1; let y = 2; function f() { return x + y }") == []
    assert await run(context, "f()") == [shown("3")]
    assert await run(context, "const x = 10; f()") == [shown("12")]


async def test_output_comes_in_order_while_the_cell_runs(context: CodeContext) -> None:
    code = "console.log('a'); console.error('b'); display([1]); process.stdout.write('é'); await new Promise(r => setTimeout(r, 200)); 5"
    events = []
    async for event in context.run(code):
        events.append(event)
        if event == CellStdout("é"):
            break_at = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - break_at > 0.1
    assert events == [
        CellStdout("a\n"), CellStderr("b\n"), CellResult({"text/plain": "[ 1 ]"}), CellStdout("é"), shown("5"), CellDone(1),
    ]  # fmt: skip


async def test_an_error_and_its_place(context: CodeContext) -> None:
    (error,) = await run(context, "function f() {\n  throw new TypeError('bad')\n}\nf()")
    assert isinstance(error, CellError)
    assert (error.name, error.value) == ("TypeError", "bad")
    assert error.traceback.splitlines()[:2] == ["TypeError: bad", "    at f (cell-1:2:9)"]
    assert "runner" not in error.traceback
    assert "inspector" not in error.traceback
    (error,) = await run(context, "let = ;")
    assert isinstance(error, CellError)
    assert error.name == "SyntaxError"
    (error,) = await run(context, "throw 5")
    assert isinstance(error, CellError)
    assert error.value == "5"
    (error,) = await run(context, "await Promise.reject(new Error('later'))")
    assert isinstance(error, CellError)
    assert error.value == "later"


async def test_leaving_does_not_end_the_context(context: CodeContext) -> None:
    (error,) = await run(context, "process.exit(3)")
    assert isinstance(error, CellError)
    assert (error.name, error.value) == ("SystemExit", "3")
    events = await run(
        context, "setTimeout(() => { throw new Error('in a timer') }, 1); await new Promise(r => setTimeout(r, 50))"
    )
    assert "in a timer" in "".join(event.text for event in events if isinstance(event, CellStderr))
    assert await run(context, "1") == [shown("1")]


@pytest.mark.parametrize("code", ["while (true) {}", "await new Promise(() => {})"])
async def test_a_cell_that_takes_too_long(context: CodeContext, code: str) -> None:
    await run(context, "var kept = 1")
    (error,) = await run(context, code, 0.3)
    assert isinstance(error, CellError)
    assert (error.name, error.value) == ("CellTimeout", "the cell ran longer than 0.3 s")
    assert await run(context, "kept") == [shown("1")]


@pytest.mark.parametrize("code", ["console.log(1); while (true) {}", "console.log(1); await new Promise(() => {})"])
async def test_a_cell_is_interrupted(context: CodeContext, code: str) -> None:
    events = []
    async for event in context.run(code):
        if event == CellStdout("1\n"):
            await asyncio.sleep(0.1)
            await context.interrupt()
        events.append(event)
    assert isinstance(events[-2], CellError)
    assert events[-2].name == "KeyboardInterrupt"
    await context.interrupt()
    assert await run(context, "2") == [shown("2")]


async def test_children_can_not_break_the_protocol(context: CodeContext) -> None:
    code = "require('child_process').execSync('echo hello; echo {}', { stdio: 'inherit' }); require('fs').writeSync(1, 'x\\n'); 1"
    assert await run(context, code) == [shown("1")]
    assert await run(context, "require('child_process').execSync('echo hello').toString()") == [shown("'hello\\n'")]


async def test_much_output_and_many_megabytes(context: CodeContext) -> None:
    events = await run(context, "for (let i = 0; i < 20000; i++) console.log(i); undefined")
    assert "".join(event.text for event in events if isinstance(event, CellStdout)).count("\n") == 20000
    assert await run(context, f"'{'x' * 3_000_000}'.length") == [shown("3000000")]


async def test_a_context_that_dies(context: CodeContext) -> None:
    with pytest.raises(GuestFailed):
        await run(context, "process.kill(process.pid, 'SIGKILL'); while (true) {}")
    with pytest.raises(GuestFailed):
        await run(context, "1")


async def test_globals_and_place(context: CodeContext, tmp_path: Path) -> None:
    (tmp_path / "lib.js").write_text("module.exports = 'lib'")
    assert await run(context, "[require('./lib'), process.cwd(), typeof fs.statSync, process.argv.length]") == [
        shown(f"[\n  'lib',\n  '{tmp_path}',\n  'function',\n  1\n]")
        if len(str(tmp_path)) > 40
        else shown(f"[ 'lib', '{tmp_path}', 'function', 1 ]")
    ]
