"""A command line run warm is, byte for byte, what the real interpreter makes of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .programs import PROGRAMS
from .warm import ENV, Outcome, Warm, build_stub, run_cold

pytestmark = pytest.mark.needs("cc")

# Other interpreters to try, before a release: a colon-separated list.
INTERPRETERS = [sys.executable, *filter(None, os.environ.get("TARTARUS_TEST_PYTHONS", "").split(":"))]
# With its source at hand, a traceback from the very end has source lines only where linecache still lives.
IN_FILES = sorted(PROGRAMS.keys() - {"destructor imports"})
# From 3.12 on, an exit code that makes no sense also has an exception shown by whatever looks next for one.
SHOWN_DIFFERENTLY = {"exit huge", "exit minus huge", "exit with a bad str"}


@pytest.fixture(scope="module", params=INTERPRETERS, ids=lambda path: Path(path).parts[-3])
def warm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    zygote = Warm(request.param, build_stub(tmp_path_factory.mktemp("stub")), imports="json,decimal,random")
    assert zygote.greeting[:4] == b"TRDY"
    yield zygote
    assert zygote.close() == 0


def version(warm: Warm) -> tuple[int, ...]:
    out = subprocess.check_output([warm.interpreter, "-c", "import sys; print(*sys.version_info[:2])"])
    return tuple(map(int, out.split()))


def same(warm: Warm, *args: str, strict: bool = True, **options: object) -> Outcome:
    """Run it both ways and compare; returns what it did."""
    cold = run_cold(warm.interpreter, *args, **options)  # type: ignore[arg-type]
    hot = warm.run(*args, **options)  # type: ignore[arg-type]
    assert hot is not None, "refused"
    if strict:
        assert without_addresses(hot) == without_addresses(cold)
    else:
        assert (hot.stdout, hot.status) == (cold.stdout, cold.status)
    return hot


def without_addresses(outcome: Outcome) -> tuple[bytes, bytes, int]:
    stdout, stderr = (re.sub(rb"0x[0-9a-f]{6,}", b"0x", data) for data in (outcome.stdout, outcome.stderr))
    return stdout, stderr, outcome.status


def strict(warm: Warm, name: str) -> bool:
    return name not in SHOWN_DIFFERENTLY or version(warm) < (3, 12)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_given_as_text(warm: Warm, name: str) -> None:
    same(warm, "-c", PROGRAMS[name], strict=strict(warm, name), stdin=b"line 1\nline 2\r\nrest\n")


@pytest.mark.parametrize("name", IN_FILES)
def test_a_program_in_a_file(warm: Warm, name: str, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text(PROGRAMS[name], "utf-8")
    text = b"line 1\nline 2\r\nrest\n"
    same(warm, "prog.py", "an", "argument", strict=strict(warm, name), cwd=str(tmp_path), stdin=text)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_on_standard_input(warm: Warm, name: str) -> None:
    same(warm, "-", "arg", strict=strict(warm, name), stdin=PROGRAMS[name].encode())


@pytest.mark.parametrize("name", IN_FILES)
def test_a_program_as_a_module(warm: Warm, name: str, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text(PROGRAMS[name], "utf-8")
    env = {**ENV, "PYTHONDONTWRITEBYTECODE": "1"}
    same(warm, "-m", "prog", "arg", strict=strict(warm, name), cwd=str(tmp_path), env=env, stdin=b"a\nb\n")


@pytest.mark.parametrize(
    "name", ["exception after output", "exit text", "atexit after exception", "excepthook", "logging"]
)
@pytest.mark.parametrize("mode", ["-c", "file", "-"])
def test_the_order_of_both_outputs_in_one_file(warm: Warm, name: str, mode: str, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text(PROGRAMS[name], "utf-8")
    args = {"-c": ["-c", PROGRAMS[name]], "file": ["prog.py"], "-": ["-"]}[mode]
    same(warm, *args, cwd=str(tmp_path), stdin=PROGRAMS[name].encode() if mode == "-" else b"", one_file=True)


class TestOptions:
    STATE = (
        "import sys, os, locale, time; print(sys.flags, sys.path, ascii(sorted(os.environ.items())))\n"
        "print(sys.stdin.errors, sys.stdout.errors, sys.stdout.encoding, locale.setlocale(locale.LC_CTYPE))\n"
        "print(time.strftime('%Z', time.localtime(0)), time.tzname, sys.dont_write_bytecode, open('/dev/null').encoding)"
    )

    @pytest.mark.parametrize(
        "options",
        [["-u"], ["-B"], ["-E"], ["-s"], ["-q"], ["-I"], ["-Bu"], ["-uBEsq"], ["-I", "-u"], ["-uu"]],
        ids=" ".join,
    )
    def test_simple_ones(self, warm: Warm, options: list[str]) -> None:
        code = (
            "import sys; print(sys.flags, sys.argv, sys.path[:1], sys.dont_write_bytecode, sys.orig_argv"
            " if sys.version_info >= (3, 10) else 0)\nfor s in (sys.stdin, sys.stdout, sys.stderr):"
            " print(s.line_buffering, s.write_through, type(s.buffer).__name__, repr(s))"
        )
        same(warm, *options, "-c", code, "x")

    @pytest.mark.parametrize(
        "args",
        [["-cprint(1)"], ["-uc", "print(2)"], ["-Bcimport sys; print(sys.argv)", "-c", "x"], ["-c", ""],
         ["-c", "import sys; print(sys.argv)", "--", "-v"], ["-mplatform"], ["-m", "this"], ["-um", "this"],
         ["-c", "print(__import__('sys').argv)", "a b", "", "\u2603"], ["-c", "print('\\xe9', '\u00e9')"]],
        ids=repr,
    )  # fmt: skip
    def test_ways_to_write_them(self, warm: Warm, args: list[str]) -> None:
        same(warm, *args)

    def test_safe_path(self, warm: Warm) -> None:
        if version(warm) >= (3, 11):
            same(warm, "-P", "-c", "import sys; print(sys.path, sys.flags)")
        else:
            assert warm.run("-P", "-c", "1") is None

    @pytest.mark.parametrize("name", ["-u", "-I", "-B"])
    def test_with_scripts_and_modules(self, warm: Warm, name: str, tmp_path: Path) -> None:
        (tmp_path / "prog.py").write_text(
            "import sys, os; print(sys.path, sys.argv, __file__, sys.flags, os.listdir())"
        )
        same(warm, name, "prog.py", "--", "-x", cwd=str(tmp_path))
        same(warm, "--", "prog.py", "-c", cwd=str(tmp_path))
        same(warm, name, "-m", "prog", "-y", cwd=str(tmp_path), env={**ENV, "PYTHONDONTWRITEBYTECODE": "1"})

    @pytest.mark.parametrize(
        "env",
        [{"PYTHONUNBUFFERED": "1"}, {"PYTHONDONTWRITEBYTECODE": "x"}, {"PYTHONNOUSERSITE": "1"}, {"PYTHONPATH": "/a:/b"},
         {"PYTHONPATH": "/lib/../x:/a:/a"}, {"PYTHON_VERSION": "3.99"}, {"PYTHONUNBUFFERED": ""},
         {"LC_ALL": "C.UTF-8"}, {"LC_CTYPE": "C.UTF-8", "LANG": "C"}, {"TZ": "Asia/Tokyo"}, {"HOME": "/"}, {"A": "a=b"},
         {"B": "caf\u00e9"}, {"C": "\udcff"}, {"EMPTY": ""}, {"PYTHONBREAKPOINT": "0"}],
        ids=repr,
    )  # fmt: skip
    def test_variables(self, warm: Warm, env: dict[str, str]) -> None:
        same(warm, "-c", self.STATE, env={**ENV, **env})

    @pytest.mark.parametrize(
        "env",
        [{"LANG": ""}, {"LANG": "C"}, {"LANG": "POSIX"}, {"LC_ALL": "C"}, {"LANG": "xx_XX.UTF-8"}, {"LC_ALL": "POSIX"}],
        ids=repr,
    )
    def test_character_sets_that_start_up_makes_utf8(self, warm: Warm, env: dict[str, str], tmp_path: Path) -> None:
        assert warm.run("-c", self.STATE, env={**ENV, **env}) is None
        plain = Warm(warm.interpreter, build_stub(tmp_path), env={**ENV, **env}, imports="json")
        same(plain, "-c", self.STATE, env={**ENV, **env})
        assert plain.run("-c", self.STATE, env=ENV) is None
        same(plain, "-c", self.STATE, env={**ENV, **env, "X": "y"})
        plain.close()

    def test_hardly_any_variables(self, warm: Warm) -> None:
        same(
            warm,
            "-c",
            "import os, sys; print(dict(os.environ), sys.flags.utf8_mode, sys.stdout.errors)",
            env={"LANG": "C.UTF-8"},
        )

    def test_the_interpreters_name(self, warm: Warm) -> None:
        code = "import sys; print(sys.executable, sys.prefix, sys._base_executable, getattr(sys, 'orig_argv', 0))"
        folder, name = os.path.split(warm.interpreter)
        env = {**ENV, "PATH": f"/nowhere:{folder}:/usr/bin"}
        for argv0 in (name, "python3", warm.interpreter):
            same(warm, "-c", code, env=env, argv0=argv0)


class TestScripts:
    def test_paths(self, warm: Warm, tmp_path: Path) -> None:
        source = "import sys, os; print(__file__, sys.argv, sys.path[0], os.getcwd(), __loader__.name, __loader__.path)"
        deep = tmp_path / "a dir" / "deeper"
        deep.mkdir(parents=True)
        (deep / "prog").write_text(source)
        (tmp_path / "link.py").symlink_to("a dir/deeper/prog")
        (tmp_path / "linked dir").symlink_to("a dir/deeper")
        for name in ("link.py", "./link.py", "a dir/deeper/prog", "linked dir/prog", str(deep / "prog"),
                     "a dir/../link.py", "../" + tmp_path.name + "/link.py"):  # fmt: skip
            same(warm, name, "x", cwd=str(tmp_path))

    @pytest.mark.parametrize(
        "source",
        [b"print('no newline')", b"\xef\xbb\xbfprint('bom')\n", b"# coding: latin-1\nprint('\xe9')\n",
         b"print('crlf')\r\nif 1:\r\n  print(2)\r\n", b"#!/usr/bin/env python3\nprint('shebang')\n", b"\n\n", b"",
         b"pass", b"'doc'\nprint(__doc__)\n", b"print(1)\n\x0cprint(2)\n", b"if 1:\n\tprint('tab')"],
        ids=repr,
    )  # fmt: skip
    def test_ways_to_write_text(self, warm: Warm, source: bytes, tmp_path: Path) -> None:
        (tmp_path / "prog.py").write_bytes(source)
        same(warm, "prog.py", cwd=str(tmp_path))
        if b"coding" not in source:  # the interpreter can't go back on a pipe to read it in another encoding
            same(warm, "-", stdin=source)
            same(warm, stdin=source)

    @pytest.mark.parametrize(
        "source", [b"x =", b"def f(:\n  pass", b"print(1)\n  x", b"x = '\xff'", b"\0", b"# coding: nonsense\n"]
    )
    def test_errors_on_standard_input(self, warm: Warm, source: bytes) -> None:
        same(warm, "-", stdin=source)

    def test_imports_beside_the_script(self, warm: Warm, tmp_path: Path) -> None:
        (tmp_path / "helper.py").write_text("print('helper', __name__, __file__)\nx = 1\ndef fail(): 1/0")
        package = tmp_path / "package"
        package.mkdir()
        (package / "__init__.py").write_text("from . import part")
        (package / "part.py").write_text("import sys; print(__name__, __package__)")
        (package / "__main__.py").write_text("import sys; print(__name__, __package__, sys.argv, __spec__.name)")
        (tmp_path / "prog.py").write_text("import helper, package\nhelper.fail()")
        env = {**ENV, "PYTHONDONTWRITEBYTECODE": "1"}
        same(warm, "prog.py", cwd=str(tmp_path), env=env)
        same(warm, "-m", "package", "a", cwd=str(tmp_path), env=env)
        same(warm, "-m", "package.part", cwd=str(tmp_path), env=env)
        same(warm, "-c", "import helper", cwd=str(tmp_path), env=env)
        same(warm, "-I", "-c", "import helper", cwd=str(tmp_path), env=env)

    def test_bytecode_is_cached_as_always(self, warm: Warm, tmp_path: Path) -> None:
        (tmp_path / "helper.py").write_text("x = 1")
        assert warm.run("-c", "import helper", cwd=str(tmp_path)) is not None
        assert len(list((tmp_path / "__pycache__").iterdir())) == 1

    @pytest.mark.parametrize(
        "module", ["no_such_module", "os.path", "json", "no.such.package", ".", "json.tool", "..x"]
    )
    def test_modules_that_can_not_run(self, warm: Warm, module: str) -> None:
        same(warm, "-m", module, "--no-such-option", stdin=b"{}")

    def test_tools_of_the_standard_library(self, warm: Warm) -> None:
        same(warm, "-m", "json.tool", stdin=b'{"b": [1, 2], "a": null}')
        same(warm, "-m", "compileall", "-h")
        same(warm, "-m", "base64", "-e", stdin=b"text")

    def test_reading_its_own_source(self, warm: Warm, tmp_path: Path) -> None:
        (tmp_path / "prog.py").write_text(
            "import inspect, sys\ndef f():\n    'doc'\n    return 1\nclass A:\n    def m(self): pass\n"
            "print(inspect.getsource(f), inspect.getsource(A), inspect.getsource(A.m), inspect.getfile(f))\n"
            "print(inspect.getsource(sys.modules['__main__'])[:20], inspect.getdoc(f), inspect.getsourcefile(f))\n"
        )
        same(warm, "prog.py", cwd=str(tmp_path))


class TestProcesses:
    SOURCE = (
        "import multiprocessing as mp, os, sys\n"
        "class Point:\n    def __init__(self, x): self.x = x\n"
        "def work(p): return Point(p.x * 2)\n"
        "if __name__ == '__main__':\n"
        "    ctx = mp.get_context({method!r})\n"
        "    with ctx.Pool(2) as pool: print([p.x for p in pool.map(work, [Point(1), Point(2)])])\n"
        "    q = ctx.Queue(); p = ctx.Process(target=q.put, args=(Point(3),)); p.start(); print(q.get().x); p.join()\n"
        "    print(p.exitcode, mp.current_process().name, mp.parent_process())\n"
    )

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_multiprocessing(self, warm: Warm, method: str, tmp_path: Path) -> None:
        (tmp_path / "prog.py").write_text(self.SOURCE.format(method=method))
        env = {**ENV, "PYTHONDONTWRITEBYTECODE": "1"}
        outcome = same(warm, "prog.py", cwd=str(tmp_path), env=env)
        assert outcome.stdout.startswith(b"[2, 4]\n3\n0 MainProcess None")
        same(warm, "-m", "prog", cwd=str(tmp_path), env=env)

    def test_executors(self, warm: Warm, tmp_path: Path) -> None:
        (tmp_path / "prog.py").write_text(
            "from concurrent.futures import ThreadPoolExecutor, ProcessPoolExecutor\n"
            "if __name__ == '__main__':\n"
            "    with ThreadPoolExecutor() as e: print(list(e.map(abs, [-1, -2])))\n"
            "    with ProcessPoolExecutor(2) as e: print(list(e.map(abs, [-1, -2])))\n"
            "    ThreadPoolExecutor().submit(print, 'left running')\n"
        )
        same(warm, "prog.py", cwd=str(tmp_path))

    def test_a_child_of_a_child(self, warm: Warm) -> None:
        code = (
            "import os, sys, subprocess\nprint('parent', flush=True)\n"
            "pid = os.fork()\n"
            "if pid == 0:\n    sys.exit(subprocess.call([sys.executable, '-c', 'raise SystemExit(4)']))\n"
            "print(os.waitstatus_to_exitcode(os.wait()[1]) if hasattr(os, 'waitstatus_to_exitcode') else 4)"
        )
        same(warm, "-c", code)

    def test_many_threads(self, warm: Warm) -> None:
        code = (
            "import threading\nn = []\nts = [threading.Thread(target=n.append, args=(i,)) for i in range(50)]\n"
            "[t.start() for t in ts]; [t.join() for t in ts]; print(len(n), threading.active_count())"
        )
        same(warm, "-c", code)


class TestSignals:
    @staticmethod
    def when_ready(path: Path, number: int, *, asleep: bool = False):
        """`asleep`: only then; a signal between the last look of the interpreter and its sleep wakes nobody."""

        def send(pid: int) -> None:
            while not path.exists():
                os.sched_yield()
            while asleep and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
                os.sched_yield()
            path.unlink()
            os.kill(pid, number)

        return send

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
    @pytest.mark.parametrize(
        ("prelude", "loop"),
        [("", "while True: pass"), ("import time", "time.sleep(600)"), ("import signal", "signal.pause()"),
         ("import threading; e = threading.Event()", "e.wait(600)"),
         ("import atexit; atexit.register(print, 'atexit')", "while True: pass")],
        ids=repr,
    )  # fmt: skip
    def test_a_signal(self, warm: Warm, number: int, prelude: str, loop: str, tmp_path: Path) -> None:
        ready = tmp_path / "ready"
        meanwhile = self.when_ready(ready, number, asleep="while" not in loop)
        outcome = []
        for run in (lambda *a, **k: run_cold(warm.interpreter, *a, **k), warm.run):
            found = run("-c", f"{prelude}\nopen({str(ready)!r}, 'w').close()\n{loop}", meanwhile=meanwhile)
            assert found is not None
            # Where exactly it hits differs from run to run.
            outcome.append((found.stdout, found.stderr[:35], found.stderr[-18:], found.status))
        assert outcome[0] == outcome[1]

    def test_an_interrupt_that_is_caught(self, warm: Warm, tmp_path: Path) -> None:
        ready = tmp_path / "ready"
        code = (
            f"try:\n  open({str(ready)!r}, 'w').close()\n  while True: pass\nexcept KeyboardInterrupt: print('caught')"
        )
        same(warm, "-c", code, meanwhile=self.when_ready(ready, signal.SIGINT))

    def test_a_reader_that_goes_away(self, warm: Warm) -> None:
        code = "import os, sys\nr, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)\n"
        for rest in ("print('x')", "print('x' * 70000)", "print('x', flush=True)", "os.write(1, b'x')",
                     "import subprocess; subprocess.run(['sh', '-c', 'echo x; echo $? >&2'])",
                     "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL); os.write(1, b'x')"):  # fmt: skip
            same(warm, "-c", code + rest)
