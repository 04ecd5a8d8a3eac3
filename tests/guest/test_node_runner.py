"""The parked Node.js does what a fresh one does: output, errors, exit, arguments, modules, environment."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel
from tartarus.guest.command_lines import NotKnown, program_of
from tartarus.model.errors import TemplateFailed

from .parking import both, finish, no_cold, parked, request

pytestmark = [pytest.mark.anyio, pytest.mark.needs("node")]

LOOK = "grep -E '^(Sig(Ign|Blk)|Cap|NoNewPrivs|Seccomp|Umask)' /proc/self/status; ulimit -a; ls /proc/self/fd | wc -l"
SAME = [
    f'require("child_process").execSync("{LOOK}", {{ stdio: "inherit" }})',
    "console.log(6 * 7)",
    "console.log(process.argv, process.argv0, process.execArgv, process.execPath)",
    "console.log(__filename, __dirname, require.main, process.mainModule, module.paths, module.filename)",
    "console.log(fs.existsSync('/'), os.EOL, path.sep, typeof http.get, util.inspect(1)); fs = 5; console.log(fs)",
    "console.log(Object.keys(globalThis), Object.getOwnPropertyNames(globalThis).sort().join())",
    "var a = 1; let b = 2; console.log(globalThis.a, globalThis.b, this === globalThis)",
    "process.exitCode = 3",
    "process.exit(4)",
    "throw new TypeError('bad')",
    "Promise.reject(new Error('rejected'))",
    "setTimeout(() => { console.log('later'); throw new Error('late') }, 5)",
    "process.on('exit', (code) => console.log('exit', code)); process.on('uncaughtException', (e) => console.log(e.message)); throw Error('x')",
    "process.nextTick(() => console.log('tick')); Promise.resolve().then(() => console.log('micro')); setImmediate(() => console.log('immediate')); console.log('main')",
    "console.log(require('./lib.js').name, Object.keys(require.cache))",
    "console.log(JSON.stringify(process.env))",
    "console.log(process.cwd(), process.title, process.stdout.isTTY, process.stdin.constructor.name)",
    "console.error('to stderr'); console.log('to stdout')",
    "process.kill(process.pid, 'SIGTERM'); setTimeout(() => {}, 10000)",
    "process.abort = null; console.log(process.listenerCount('exit'), process.eventNames())",
    "console.log(/(a)/.exec('a') && RegExp.$1, RegExp.input)",
    "console.log(fs.readdirSync('/proc/self/fd').length)",
]


def tidy(text: str) -> str:
    """Without what differs between any two runs, and stack frames inside node."""
    lines = [line for line in text.splitlines() if not re.match(r"\s+at .*(node:|\[eval\]-wrapper)", line)]
    return "\n".join(lines)


@pytest.mark.parametrize("code", SAME)
async def test_a_program_text_runs_as_in_a_fresh_node(guest: GuestChannel, tmp_path: Path, code: str) -> None:
    (tmp_path / "lib.js").write_text("exports.name = 'lib'")
    warm, cold = await both(guest, tmp_path, "node", "node", "-e", code, "one", "--two")
    assert (warm.out, tidy(warm.err), warm.code, warm.signal) == (cold.out, tidy(cold.err), cold.code, cold.signal)


@pytest.mark.parametrize("argv", [("-p", "[1, 'a']"), ("-pe", "process.argv.length", "x"), ("--print", "undefined")])
async def test_a_value_is_printed(guest: GuestChannel, tmp_path: Path, argv: tuple[str, ...]) -> None:
    asked = request(tmp_path, "node", *argv)
    # Before version 20, node printed at its end: then it is left to a fresh one.
    taken = (await parked(guest, tmp_path, "node")).offer(asked, lambda: guest.exec(asked))
    assert taken is not None
    assert await finish(taken) == await finish(guest.exec(asked))


SCRIPTS = {
    "main.js": (
        "const lib = require('./lib');\n"
        "console.log(__filename, __dirname, process.argv, require.main === module, module.parent, module.id);\n"
        "console.log(process.mainModule === module, module.children.length, Object.keys(require.cache), lib.main);\n"
        "console.log(Object.keys(globalThis), typeof crypto.subtle, module.paths);\n"
    ),
    "fails.js": "function deep() { throw new Error('deep') }\ndeep();\n",
    "syntax.js": "let a = ;\n",
    "module.mjs": (
        "import fs from 'node:fs';\nimport other from './other.mjs';\n"
        "console.log(import.meta.url, process.argv, typeof require, other, await Promise.resolve(5));\n"
        "console.log(process.mainModule);\n"
    ),
    "stuck.mjs": "await new Promise(() => {});\n",
    "mfails.mjs": "import './other.mjs';\nthrow new Error('esm');\n",
    "exits.js": "process.on('exit', (c) => console.log('exit', c)); process.exit(9);\n",
    "plain.txt": "console.log('any name')\n",
}


@pytest.mark.parametrize("name", [*SCRIPTS, "main", "./main.js", "folder", "folder/index.js"])
async def test_a_script_runs_as_in_a_fresh_node(guest: GuestChannel, tmp_path: Path, name: str) -> None:
    for script, text in SCRIPTS.items():
        (tmp_path / script).write_text(text)
    (tmp_path / "lib.js").write_text("exports.main = require.main.filename")
    (tmp_path / "other.mjs").write_text("export default import.meta.url")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.js").write_text("console.log(__filename, process.argv)")
    warm, cold = await both(guest, tmp_path, "node", "node", name, "a", "-b", "--", "é ü")
    assert (warm.out, tidy(warm.err), warm.code, warm.signal) == (cold.out, tidy(cold.err), cold.code, cold.signal)


async def test_no_frame_of_the_runner_is_on_the_stack(guest: GuestChannel, tmp_path: Path) -> None:
    (tmp_path / "main.js").write_text("Error.stackTraceLimit = 50; console.log(new Error('here').stack)")
    for argv in (("node", "main.js"), ("node", "-e", "console.log(new Error('here').stack)")):
        warm, _ = await both(guest, tmp_path, "node", *argv)
        assert "runner.cjs" not in warm.out


async def test_input_is_the_programs(guest: GuestChannel, tmp_path: Path) -> None:
    code = "let n = 0; process.stdin.on('data', (d) => n += d.length).on('end', () => console.log(n, process.stdin.constructor.name))"
    warm, cold = await both(guest, tmp_path, "node", "node", "-e", code, stdin=b"x" * 1_000_000)
    assert warm == cold
    assert warm.out.startswith("1000000 ")


INPUTS = [
    "console.log(process.argv, process.execArgv, process._eval, __filename, __dirname, require.main, typeof fs)",
    "console.log(module.paths, Object.getOwnPropertyNames(globalThis).sort().join(), process.stdin.listenerCount('end'))",
    "throw new Error('bad')",
    "process.exitCode = 3",
    "let a = ;",
    "import fs from 'node:fs'; console.log(typeof fs.statSync, process.argv0)",
    "console.log(typeof crypto.subtle); process.exit(5)",
    "console.log(1, /* crypto */ process.kill(process.pid, 'SIGTERM')); setTimeout(() => {}, 9000)",
    "",
]


@pytest.mark.parametrize("code", INPUTS)
@pytest.mark.parametrize("argv", [(), ("-", "a", "--b")])
async def test_a_program_on_standard_input(
    guest: GuestChannel, tmp_path: Path, code: str, argv: tuple[str, ...]
) -> None:
    warm, cold = await both(guest, tmp_path, "node", "node", *argv, stdin=code.encode())
    assert (warm.out, tidy(warm.err), warm.code, warm.signal) == (cold.out, tidy(cold.err), cold.code, cold.signal)


async def test_a_signal_reaches_the_fresh_interpreter(guest: GuestChannel, tmp_path: Path) -> None:
    taken = (await parked(guest, tmp_path, "node")).offer(request(tmp_path, "node", stdin=True), no_cold)
    assert taken is not None
    code = "/* crypto */ process.on('SIGTERM', () => { console.log('got it'); process.exit(7) }); setTimeout(() => {}, 9000); console.log('up')"
    await taken.write_stdin(code.encode())
    taken.close_stdin()
    assert await taken.read() == (1, b"up\n")
    taken.signal(signal.SIGTERM)
    ran = await finish(taken)
    assert (ran.out, ran.code) == ("got it\n", 7)


async def test_environment_and_directory_are_the_commands(guest: GuestChannel, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = "console.log(process.cwd(), process.env.A, process.env.TZ, new Date(0).getHours(), process.env.PATH)"
    env = {"A": "b=c", "TZ": "Asia/Tokyo"}
    warm, cold = await both(guest, tmp_path, "node", "node", "-e", code, env=env, cwd=str(tmp_path / "elsewhere"))
    assert warm == cold
    assert warm.out.split()[:4] == [str(tmp_path / "elsewhere"), "b=c", "Asia/Tokyo", "9"]


async def test_what_was_loaded_is_there(guest: GuestChannel, tmp_path: Path) -> None:
    (tmp_path / "slow.js").write_text(
        "require('fs').appendFileSync('loads', 'x'); exports.main = () => require.main.filename"
    )
    (tmp_path / "slow.mjs").write_text("import fs from 'fs'; fs.appendFileSync('loads', 'y'); export default 1")
    (tmp_path / "main.js").write_text("console.log(require('./slow').main()); import('./slow.mjs')")
    waiting = await parked(
        guest, tmp_path, "node", imports=("./slow.js",), script="module.exports = import('./slow.mjs')"
    )
    taken = waiting.offer(request(tmp_path, "node", "main.js"), no_cold)
    assert taken is not None
    ran = await finish(taken)
    assert (ran.out, ran.err) == (f"{tmp_path}/main.js\n", "")
    assert (tmp_path / "loads").read_text() == "xy"


async def test_nothing_of_the_runner_stays(guest: GuestChannel, tmp_path: Path) -> None:
    await parked(guest, tmp_path, "node")
    assert list((tmp_path / ".scratch").iterdir()) == []


async def test_a_signal_before_the_start_waits_for_it(guest: GuestChannel, tmp_path: Path) -> None:
    waiting = await parked(guest, tmp_path, "node")
    taken = waiting.offer(request(tmp_path, "node", "-e", "setTimeout(() => {}, 10000)"), no_cold)
    assert taken is not None
    taken.signal(signal.SIGTERM)
    assert (await finish(taken)).signal == signal.SIGTERM


@pytest.mark.parametrize(
    "code",
    [
        "let a = ;",
        "console.log(await 5)",
    ],
)
async def test_what_it_can_not_do_exactly_runs_cold(guest: GuestChannel, tmp_path: Path, code: str) -> None:
    asked = request(tmp_path, "node", "-e", code)
    waiting = await parked(guest, tmp_path, "node")
    taken = waiting.offer(asked, lambda: guest.exec(asked))
    assert taken is not None
    assert not (await taken.started())[1]
    assert await finish(taken) == await finish(guest.exec(asked))


async def test_a_missing_script_or_directory_is_reported_by_a_cold_start(guest: GuestChannel, tmp_path: Path) -> None:
    for asked in (request(tmp_path, "node", "missing.js"), request(tmp_path, "node", "-e", "1", cwd="/no/such")):
        waiting = await parked(guest, tmp_path, "node")
        started: list[bool] = []

        def cold(asked=asked, started=started):
            started.append(True)
            return guest.exec(asked)

        taken = waiting.offer(asked, cold)
        assert taken is not None
        with pytest.raises(Exception, match="working directory") if asked.cwd == "/no/such" else _nothing():
            await taken.started()
        assert started


class _nothing:  # noqa: N801 - reads as a statement
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize(
    "argv",
    [
        ("--version",), ("-c", "x.js"), ("-i",), ("-e",), ("-e", ""), ("-e", "-1"), ("-p",),
        ("-e", "1", "--input-type=module"), ("--input-type=module", "-e", "1"), ("-r", "./x.js", "y.js"),
        ("-e", "import fs from 'node:fs'"), ("-p", "crypto.createHash"), ("--", "x.js"), ("inspect", "x.js"), ("--test",), ("--inspect", "x.js"), ("",), ("--eval=1",),
    ],
)  # fmt: skip
def test_other_options_are_left_to_a_fresh_node(argv: tuple[str, ...]) -> None:
    with pytest.raises(NotKnown):
        program_of("node", ("node", *argv))


@pytest.mark.parametrize(
    "env",
    [
        {"NODE_OPTIONS": "--no-warnings"},
        {"LANG": "de_DE.UTF-8"},
        {"LC_ALL": "C"},
        {"LD_PRELOAD": "x"},
        {"HOME": "/root"},
    ],
)
async def test_variables_read_at_start_need_a_fresh_node(
    guest: GuestChannel, tmp_path: Path, env: dict[str, str]
) -> None:
    waiting = await parked(guest, tmp_path, "node")
    assert waiting.offer(request(tmp_path, "node", "-e", "1", env=env), no_cold) is None
    assert waiting.waits
    assert waiting.offer(request(tmp_path, "/usr/bin/node", "-e", "1"), no_cold) is None
    assert waiting.offer(request(tmp_path, "node", "-e", "1", tty=True), no_cold) is None
    assert waiting.offer(request(tmp_path, "node", "-e", "1" * 2_000_000), no_cold) is None
    taken = waiting.offer(request(tmp_path, "node", "-e", "1"), no_cold)
    assert taken is not None
    assert waiting.offer(request(tmp_path, "node", "-e", "1"), no_cold) is None
    assert (await finish(taken)).code == 0


async def test_a_warm_up_that_fails_says_why(guest: GuestChannel, tmp_path: Path) -> None:
    with pytest.raises(TemplateFailed, match="no-such-module"):
        await parked(guest, tmp_path, "node", imports=("no-such-module",))
    with pytest.raises(TemplateFailed, match="boom"):
        await parked(guest, tmp_path, "node", script="throw new Error('boom')")
