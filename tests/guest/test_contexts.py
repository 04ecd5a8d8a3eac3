"""Code contexts through the real agent, started cold and by the warm runner."""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel, GuestExec
from tartarus.guest.contexts import (
    CellDone,
    CellError,
    CellEvent,
    CellResult,
    CellStderr,
    CellStdout,
    CodeContext,
)
from tartarus.model.errors import CommandNotFound, GuestFailed
from tartarus.model.sandbox import ExitStatus

from .conftest import ENV, spawn_agent
from .warm import RUNNER, Warm

pytestmark = [pytest.mark.anyio, pytest.mark.needs("make", "cc")]


@pytest.fixture(params=["cold", "warm"])
async def context(request: pytest.FixtureRequest, agent_binary_path: Path) -> AsyncIterator[CodeContext]:
    import socket

    zygote, agent = None, None
    if request.param == "warm":
        zygote = Warm(sys.executable, agent_binary_path)
        assert zygote.greeting[:4] == b"TRDY"
        sock = zygote.request()
        _, number, _, fds = zygote.reply()
        assert number == 0
        os.close(fds[0])
        argv: tuple[str, ...] = ("tartarus-context",)
    else:
        agent, fd = spawn_agent(agent_binary_path)
        sock = socket.socket(fileno=fd)
        argv = (sys.executable, str(RUNNER), "context")
    sock.setblocking(False)
    channel = GuestChannel(sock)
    await channel.open()
    process = channel.exec(GuestExec(argv=argv, env={**ENV, "HOME": "/nowhere"}, stdin=True, warm=zygote is not None))
    assert (await process.started())[1] == (zygote is not None)
    made = CodeContext(process)
    yield made
    await made.close()
    channel.close()
    if zygote is not None:
        assert zygote.close() == 0
    if agent is not None:
        assert agent.wait(30) == 0


async def cell(context: CodeContext, code: str, timeout_s: float | None = None) -> list[CellEvent]:
    return [event async for event in context.run(code, timeout_s)]


def printed(events: list[CellEvent], kind: type[CellStdout | CellStderr] = CellStdout) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def error(events: list[CellEvent]) -> CellError:
    return next(event for event in events if isinstance(event, CellError))


def value(events: list[CellEvent]) -> dict[str, object]:
    return next(event.data for event in events if isinstance(event, CellResult) and event.is_main)


async def test_the_last_expression_is_the_result(context: CodeContext) -> None:
    assert await cell(context, "x = 40\nx + 2") == [CellResult({"text/plain": "42"}, is_main=True), CellDone(1)]


async def test_variables_stay(context: CodeContext) -> None:
    await cell(context, "import math\ndef f(x): return math.sqrt(x)")
    assert value(await cell(context, "f(49)")) == {"text/plain": "7.0"}


async def test_a_cell_without_a_value_has_no_result(context: CodeContext) -> None:
    assert await cell(context, "x = 1") == [CellDone(1)]
    assert await cell(context, "None") == [CellDone(2)]
    assert await cell(context, "x;") == [CellDone(3)]
    assert await cell(context, "") == [CellDone(4)]
    assert await cell(context, "# nothing") == [CellDone(5)]


async def test_earlier_results_have_names(context: CodeContext) -> None:
    for code in ("1", "2", "3", "None"):
        await cell(context, code)
    assert value(await cell(context, "[_, __, ___]")) == {"text/plain": "[3, 2, 1]"}


async def test_output_in_order_with_results(context: CodeContext) -> None:
    events = await cell(context, "print('a')\ndisplay(1)\nprint('b')\ndisplay(2, 3)\nprint('c')\n4")
    kinds = [event.text if isinstance(event, CellStdout) else type(event).__name__ for event in events]
    assert kinds == ["a\n", "CellResult", "b\n", "CellResult", "CellResult", "c\n", "CellResult", "CellDone"]


async def test_standard_error_is_apart(context: CodeContext) -> None:
    events = await cell(context, "import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (printed(events), printed(events, CellStderr)) == ("out\n", "err\n")


async def test_what_c_and_children_print_is_caught(context: CodeContext) -> None:
    code = "import ctypes, os\nctypes.CDLL(None).puts(b'from C')\nos.system('echo from a child; echo bad >&2')\nos.write(1, b'raw\\n');"
    events = await cell(context, code)
    assert sorted(printed(events).splitlines()) == ["from C", "from a child", "raw"]
    assert printed(events, CellStderr) == "bad\n"


async def test_output_comes_while_the_cell_runs(context: CodeContext) -> None:
    events = context.run("import time\nprint('now')\ntime.sleep(600)")
    assert await anext(events) == CellStdout("now\n")
    await context.interrupt()
    assert [event.name async for event in events if isinstance(event, CellError)] == ["KeyboardInterrupt"]


async def test_much_output(context: CodeContext) -> None:
    events = await cell(context, "for i in range(60000): print('line', i)")
    assert printed(events) == "".join(f"line {i}\n" for i in range(60000))


async def test_output_with_a_broken_encoding(context: CodeContext) -> None:
    events = await cell(
        context, "import os\nos.write(1, b'ok \\xff \\xe2\\x98')\nos.write(1, b'\\x83\\n')\nprint('\\udcfe')"
    )
    assert printed(events).startswith("ok \ufffd \u2603\n")


async def test_an_exception(context: CodeContext) -> None:
    events = await cell(context, "def f():\n    1 / 0\nprint('before')\nf()")
    failure = error(events)
    assert (failure.name, failure.value) == ("ZeroDivisionError", "division by zero")
    assert failure.traceback.startswith('Traceback (most recent call last):\n  File "<cell 1>", line 4, in <module>')
    assert "1 / 0" in failure.traceback
    assert "runner.py" not in failure.traceback
    assert [type(event) for event in events] == [CellStdout, CellError, CellDone]
    assert value(await cell(context, "'alive'"))


async def test_an_error_in_another_cells_function_shows_its_source(context: CodeContext) -> None:
    await cell(context, "def broken():\n    raise LookupError('deep')  # here")
    assert "raise LookupError('deep')  # here" in error(await cell(context, "broken()")).traceback


async def test_a_syntax_error(context: CodeContext) -> None:
    failure = error(await cell(context, "x = (\ny = 2"))
    assert failure.name == "SyntaxError"
    assert 'File "<cell 1>"' in failure.traceback
    assert not failure.traceback.startswith("Traceback")


async def test_an_unprintable_exception(context: CodeContext) -> None:
    code = "class E(Exception):\n    def __str__(self): raise ValueError\nraise E"
    assert (error(await cell(context, code)).name, value(await cell(context, "1"))) == ("E", {"text/plain": "1"})


async def test_a_value_whose_repr_fails(context: CodeContext) -> None:
    assert error(await cell(context, "class R:\n    def __repr__(self): 1/0\nR()")).name == "ZeroDivisionError"


async def test_exit_does_not_end_the_context(context: CodeContext) -> None:
    assert error(await cell(context, "exit(3)")).name == "SystemExit"
    assert value(await cell(context, "'alive'")) == {"text/plain": "'alive'"}


async def test_rich_forms(context: CodeContext) -> None:
    code = (
        "class Rich:\n"
        "    def __repr__(self): return 'plain'\n"
        "    def _repr_html_(self): return '<b>rich</b>'\n"
        "    def _repr_png_(self): return b'\\x89PNG'\n"
        "    def _repr_json_(self): return {'a': [1, None]}, {'meta': 1}\n"
        "    def _repr_latex_(self): return None\n"
        "    def _repr_svg_(self): raise ValueError\n"
        "    def _repr_mimebundle_(self, include=None, exclude=None): return {'application/x': 'y', 'text/plain': 'mine'}\n"
        "Rich()"
    )
    assert value(await cell(context, code)) == {
        "text/plain": "mine", "text/html": "<b>rich</b>", "image/png": base64.b64encode(b"\x89PNG").decode(),
        "application/json": {"a": [1, None]}, "application/x": "y",
    }  # fmt: skip


async def test_forms_that_json_can_not_hold_are_left_out(context: CodeContext) -> None:
    code = "class J:\n    def __repr__(self): return 'j'\n    def _repr_json_(self): return {'nan': float('nan')}\nJ()"
    assert value(await cell(context, code)) == {"text/plain": "j"}


async def test_a_class_is_shown_plainly(context: CodeContext) -> None:
    code = "class C:\n    def _repr_html_(self): return 'x'\nC"
    assert value(await cell(context, code)) == {"text/plain": "<class '__main__.C'>"}


async def test_figures_become_images(context: CodeContext) -> None:
    # A stand-in of pyplot's face: the real one is tried where a template with matplotlib is.
    package = (
        "import sys, types\n"
        "class Figure:\n"
        "    def savefig(self, file, format, bbox_inches): file.write(b'\\x89PNG picture')\n"
        "    def __repr__(self): return '<Figure>'\n"
        "pyplot = types.ModuleType('matplotlib.pyplot')\n"
        "figures = {}\n"
        "pyplot.get_fignums = lambda: list(figures)\n"
        "pyplot.figure = lambda number=1: figures.setdefault(number, Figure())\n"
        "pyplot.close = lambda figure: figures.clear()\n"
        "sys.modules['matplotlib'] = types.ModuleType('matplotlib')\n"
        "sys.modules['matplotlib.pyplot'] = pyplot\n"
        "pyplot.figure()\n"
        "7"
    )
    events = await cell(context, package)
    picture = {"image/png": base64.b64encode(b"\x89PNG picture").decode(), "text/plain": "<Figure>"}
    assert events == [CellResult({"text/plain": "7"}, is_main=True), CellResult(picture), CellDone(1)]
    assert await cell(context, "pass") == [CellDone(2)]


async def test_awaiting_at_the_top(context: CodeContext) -> None:
    await cell(context, "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x")
    assert value(await cell(context, "y = await f(5)\nawait f(y + 1)")) == {"text/plain": "6"}
    assert error(await cell(context, "async def g(): raise KeyError('k')\nawait g()")).name == "KeyError"
    assert error(await cell(context, "await asyncio.sleep(600)", timeout_s=0.2)).name == "CellTimeout"
    assert value(await cell(context, "await f(1)")) == {"text/plain": "1"}


async def test_future_imports_stay(context: CodeContext) -> None:
    await cell(context, "from __future__ import annotations")
    assert value(await cell(context, "def f(x: Undefined): pass\nf.__annotations__")) == {
        "text/plain": "{'x': 'Undefined'}"
    }


async def test_a_cell_that_takes_too_long(context: CodeContext) -> None:
    await cell(context, "kept = 1")
    events = await cell(context, "print('started')\nwhile True: pass", timeout_s=0.3)
    failure = error(events)
    assert (printed(events), failure.name) == ("started\n", "CellTimeout")
    assert "0.3 s" in failure.value
    assert value(await cell(context, "kept", timeout_s=30)) == {"text/plain": "1"}


async def test_a_time_limit_that_is_not_reached_leaves_no_trace(context: CodeContext) -> None:
    await cell(context, "1", timeout_s=0.2)
    assert value(await cell(context, "import time; time.sleep(0.4); 'slept'")) == {"text/plain": "'slept'"}


async def test_interrupts_between_cells_do_nothing(context: CodeContext) -> None:
    await context.interrupt()
    await cell(context, "1")
    await context.interrupt()
    assert value(await cell(context, "2")) == {"text/plain": "2"}


async def test_a_cell_that_nobody_listens_to_is_interrupted(context: CodeContext) -> None:
    events = context.run("import time\nprint('x')\ntime.sleep(600)")
    await anext(events)
    await events.aclose()  # type: ignore[attr-defined]
    assert value(await cell(context, "'free again'")) == {"text/plain": "'free again'"}


async def test_cells_run_one_after_the_other(context: CodeContext) -> None:
    first = asyncio.create_task(cell(context, "import time\ntime.sleep(0.2)\norder = ['first']"))
    await asyncio.sleep(0)
    second = await cell(context, "order + ['second']")
    await first
    assert value(second) == {"text/plain": "['first', 'second']"}


async def test_a_context_that_dies(context: CodeContext) -> None:
    with pytest.raises(GuestFailed, match="exit status 9"):
        await cell(context, "import os; os._exit(9)")
    with pytest.raises(GuestFailed, match="ended"):
        await cell(context, "1")


async def test_a_killed_context(context: CodeContext) -> None:
    with pytest.raises(GuestFailed, match="signal 11"):
        await cell(context, "import os; os.kill(os.getpid(), 11)")


async def test_a_closed_context(context: CodeContext) -> None:
    await context.close()
    with pytest.raises(GuestFailed, match="closed"):
        await cell(context, "1")


async def test_closing_ends_a_running_cell(context: CodeContext) -> None:
    running = asyncio.create_task(cell(context, "import time\ntime.sleep(600)"))
    await asyncio.sleep(0.1)
    await context.close()
    events = await asyncio.gather(running, return_exceptions=True)
    assert events


async def test_the_interpreter_looks_fresh(context: CodeContext) -> None:
    code = (
        "import sys, os, gc, signal\n"
        "mine = [n for n in globals() if not n.startswith('_')]\n"
        "[__name__, sys.argv, sys.path[0], gc.isenabled(), mine, sys.stdin.read(), sys.stdout.fileno(),"
        " sorted(os.environ) == sorted({**os.environ}), os.environ['HOME'], 'runner' in sys.modules]"
    )
    names = ["display", "sys", "os", "gc", "signal"]
    assert value(await cell(context, code)) == {
        "text/plain": repr(["__main__", [""], "", True, names, "", 1, True, "/nowhere", False])
    }


async def test_pickling_and_source(context: CodeContext) -> None:
    await cell(context, "class A:\n    x = 1\ndef f():\n    return 'the source'\n")
    code = "import pickle, inspect\n[type(pickle.loads(pickle.dumps(A()))) is A, 'the source' in inspect.getsource(f)]"
    assert value(await cell(context, code)) == {"text/plain": "[True, True]"}


async def test_multiprocessing(context: CodeContext) -> None:
    code = "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: r = p.map(abs, [-1, 2])\nr"
    assert value(await cell(context, code)) == {"text/plain": "[1, 2]"}


async def test_background_threads_may_print_between_cells(context: CodeContext) -> None:
    await cell(
        context,
        "import threading, time\ndef f():\n    time.sleep(0.1)\n    print('late')\nt = threading.Thread(target=f); t.start()",
    )
    assert printed(await cell(context, "t.join()")) == "late\n"


async def test_a_cell_of_many_megabytes(context: CodeContext) -> None:
    assert value(await cell(context, f"len({'x' * 3_000_000!r})")) == {"text/plain": "3000000"}


async def test_a_value_of_many_megabytes(context: CodeContext) -> None:
    assert len(str(value(await cell(context, "'x' * 5_000_000"))["text/plain"])) == 5_000_002
    assert value(
        await cell(
            context, "class B:\n    def __repr__(s): return 'b'\n    def _repr_html_(s): return 'x' * 20_000_000\nB()"
        )
    ) == {"text/plain": "b"}


class Scripted:
    """A guest process that says what a test wants: hostile lines, no lines."""

    def __init__(self, *pieces: bytes, fails: Exception | None = None) -> None:
        self.pieces = list(pieces)
        self.fails = fails
        self.signals: list[int] = []

    async def started(self) -> tuple[int, bool]:
        if self.fails is not None:
            raise self.fails
        return 5, False

    async def read(self) -> tuple[int, bytes] | None:
        return (1, self.pieces.pop(0)) if self.pieces else None

    async def write_stdin(self, data: bytes) -> None:
        assert data.endswith(b"\n")

    def close_stdin(self) -> None:
        self.pieces.clear()

    def signal(self, number: int, group: bool = False) -> None:
        assert not group
        self.signals.append(number)

    async def wait(self) -> ExitStatus:
        return ExitStatus(code=1)


@pytest.mark.parametrize(
    "line",
    [b"nonsense\n", b"{}\n", b'{"type":"other"}\n', b'{"type":"stdout","text":5}\n', b"[1]\n", b"\xff\n", b"\n",
     b'{"type":"done","execution_count":"many"}\n', b'{"type":"result","data":[]}\n'],
)  # fmt: skip
async def test_a_context_that_breaks_its_protocol_is_killed(line: bytes) -> None:
    process = Scripted(line)
    context = CodeContext(process)
    with pytest.raises(GuestFailed, match="broke its protocol"):
        await cell(context, "1")
    assert process.signals == [9]
    with pytest.raises(GuestFailed, match="broke its protocol"):
        await cell(context, "1")


async def test_an_endless_line_is_cut_off() -> None:
    process = Scripted(*[b"x" * 1_000_000] * 40)
    with pytest.raises(GuestFailed, match="33554432 bytes"):
        await cell(CodeContext(process), "1")
    assert process.signals == [9]


async def test_events_in_odd_pieces() -> None:
    text = b'{"id":1,"type":"stdout","text":"\xe2\x98\x83"}\n{"id":1,"type":"done","execution_count":1}\n'
    for size in (1, 2, 7):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert await cell(CodeContext(Scripted(*pieces)), "1") == [CellStdout("\u2603"), CellDone(1)]


async def test_a_context_that_could_not_start() -> None:
    with pytest.raises(CommandNotFound):
        await cell(CodeContext(Scripted(fails=CommandNotFound("no python"))), "1")
