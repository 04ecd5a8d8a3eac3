"""The zygote's and the runner's own protocols: clones, programs, requests, refusals, fresh secrets."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import re
import signal
import socket
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tartarus.guest.program import Fd, Program
from tartarus.guest.syscalls import number

from .warm import (
    CLONE_NEWPID,
    ENV,
    EXITED,
    NO_PROGRAM,
    ONCE,
    REFUSED,
    STARTED,
    TTY,
    WARM,
    Clone,
    Outcome,
    Warm,
    build_stub,
    encode_exec,
    open_files,
    receive_exactly,
)

pytestmark = pytest.mark.needs("cc")

IMPORTS = "numpy,random,ssl,uuid,secrets,tempfile,multiprocessing.pool,logging"
STEP_PROGRAM, STEP_AGENT = 0xFFFF0001, 0xFFFF0002


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def shared_zygote(stub: Path) -> Iterator[Warm]:
    zygote = Warm(sys.executable, stub, imports=IMPORTS)
    assert zygote.greeting == b"TRDY\0\0\0\0"
    yield zygote
    assert zygote.close() == 0


@pytest.fixture
def zygote(shared_zygote: Warm) -> Iterator[Warm]:
    """The shared one; the test must leave it with the descriptors it had."""
    yield shared_zygote
    # Null thrice, the control socket, a spare's link and pidfd.
    until(lambda: len(fds_of(shared_zygote.process.pid)) <= 6)


def fds_of(pid: int) -> dict[int, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def status_of(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition: Callable[[], object]) -> None:
    """Wait for something that must come about; the test's own time limit is the only clock."""
    while not condition():
        os.sched_yield()


def boot_failure(channel: socket.socket) -> tuple[int, int]:
    """(step, errno) of a BOOT_FAILED frame, which is all that comes."""
    length, kind, flags, zero, stream, step, code = struct.unpack("<IBBHIII", receive_exactly(channel, 20))
    assert (length, kind, flags, zero, stream) == (8, 0x82, 0, 0, 0)
    assert channel.recv(1) == b""
    return step, code


def failing(zygote: Warm, program: bytes, extra: Sequence[int] = ()) -> tuple[int, int]:
    with zygote.request(program, extra=extra) as channel:
        _, code, _, fds = zygote.reply()
        assert code == 0
        os.close(fds[0])
        return boot_failure(channel)


@contextlib.contextmanager
def cloned(zygote: Warm, program: bytes = NO_PROGRAM, flags: int = 0, extra: Sequence[int] = ()) -> Iterator[Clone]:
    clone = zygote.clone(program, flags, extra)
    try:
        yield clone
    finally:
        clone.close()


class TestWarmUp:
    def test_a_missing_module_is_named(self, stub: Path) -> None:
        zygote = Warm(sys.executable, stub, imports="json,no_such_thing")
        magic, size = struct.unpack_from("<4sI", zygote.greeting)
        text = zygote.greeting[8:].decode()
        assert (magic, size) == (b"TERR", len(text))
        assert "could not import no_such_thing" in text
        assert zygote.close() == 1

    def test_a_module_that_exits_is_an_error(self, stub: Path) -> None:
        zygote = Warm(sys.executable, stub, imports="antigravity_not,this_is_missing")
        assert zygote.greeting[:4] == b"TERR"
        assert zygote.close() == 1

    def test_threads_that_a_module_leaves_behind_are_refused(self, stub: Path, tmp_path: Path) -> None:
        (tmp_path / "threaded.py").write_text(
            "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
        )
        zygote = Warm(sys.executable, stub, imports="threaded", env={**ENV, "PYTHONPATH": str(tmp_path)})
        assert b"left 1 threads running" in zygote.greeting
        assert zygote.close() == 1

    def test_a_script_leaves_its_imports_and_nothing_else(self, stub: Path, tmp_path: Path) -> None:
        script = tmp_path / "warmup.py"
        script.write_text("import colorsys\nsecret = 7\nprint('warm')\n")
        zygote = Warm(sys.executable, stub, script=script)
        code = "import sys; print('colorsys' in sys.modules, 'secret' in globals())"
        ran = zygote.run("-c", code)
        assert ran is not None
        assert ran.stdout == b"True False\n"
        assert zygote.close() == 0

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("import sys\n\nraise ValueError('no')", b"failed at line 3: ValueError: no"),
            ("raise SystemExit(0)", b"failed at line 1: SystemExit: 0"),
            ("x =", b"SyntaxError"),
        ],
    )
    def test_a_script_that_fails_is_an_error(self, stub: Path, tmp_path: Path, text: str, said: bytes) -> None:
        script = tmp_path / "warmup.py"
        script.write_text(text)
        zygote = Warm(sys.executable, stub, script=script)
        assert zygote.greeting[:4] == b"TERR"
        assert said in zygote.greeting
        assert zygote.close() == 1

    def test_it_parks_alone_with_its_control_socket(self, zygote: Warm) -> None:
        fds = fds_of(zygote.process.pid)
        assert [fds[fd] for fd in (0, 1, 2)] == ["/dev/null"] * 3
        assert all(fd >= 900 for fd in fds if fd > 2)
        assert len(os.listdir(f"/proc/{zygote.process.pid}/task")) == 1

    def test_it_ends_with_its_control_socket(self, stub: Path) -> None:
        zygote = Warm(sys.executable, stub)
        assert zygote.close() == 0


class TestClone:
    def test_the_agent_gets_its_arguments(self, zygote: Warm) -> None:
        with cloned(zygote) as clone:
            name, mode, channel, runner, pid, shared = clone.agent_argv
            assert (name, mode, channel, shared) == ("tartarus-guest", "agent", "--channel=3", "--shared-pids")
            assert int(pid.removeprefix("--runner-pid=")) in children_of(clone.pid)
            assert int(runner.removeprefix("--runner=")) == 5

    @pytest.mark.needs("root")
    def test_in_a_pid_namespace_the_runner_is_the_second_process(self, zygote: Warm) -> None:
        with cloned(zygote, flags=CLONE_NEWPID) as clone:
            assert clone.agent_argv[3:] == ["--runner=5", "--runner-pid=2"]
            assert status_of(children_of(clone.pid)[0])["NSpid"].split()[1] == "2"

    def test_the_agent_starts_clean(self, zygote: Warm) -> None:
        with cloned(zygote) as clone:
            until(lambda: set(fds_of(clone.pid)) == {0, 1, 2, 3})  # once the stub has closed the runner's socket
            fds = fds_of(clone.pid)
            assert fds[3].startswith("socket:")
            assert Path(f"/proc/{clone.pid}/environ").read_bytes() == b""
            status = status_of(clone.pid)
            assert (int(status["SigIgn"], 16), int(status["SigBlk"], 16)) == (0, 0)

    def test_the_runner_keeps_its_socket_alone(self, zygote: Warm) -> None:
        extra = os.open("/", os.O_PATH)
        with cloned(zygote, extra=[extra]) as clone:
            fds = fds_of(children_of(clone.pid)[0])
            assert len(fds) == 4
            assert fds[max(fds)].startswith("socket:")
        os.close(extra)

    def test_the_runner_ends_with_the_agent(self, zygote: Warm) -> None:
        clone = zygote.clone()
        runner = children_of(clone.pid)[0]
        pidfd = os.pidfd_open(runner)
        os.kill(clone.pid, signal.SIGKILL)
        clone.close()
        until(lambda: not Path(f"/proc/{runner}").exists() or status_of(runner)["State"].startswith("Z"))
        os.close(pidfd)

    def test_clones_outlive_the_zygote(self, stub: Path) -> None:
        zygote = Warm(sys.executable, stub)
        clone = zygote.clone()
        zygote.process.kill()
        zygote.close()
        with open_files(b"", one_file=False) as files:
            clone.ask([sys.executable, "-c", "print('alive')"], ENV, "/", files.fds, ONCE)
            assert clone.answer()[0] == STARTED
            clone.ended()
            assert files.contents() == (b"alive\n", b"")
        clone.close()

    def test_many_requests_at_once(self, zygote: Warm) -> None:
        channels = [zygote.request() for _ in range(20)]
        replies = [zygote.reply() for _ in channels]
        first = replies[0][0]
        assert [reply[0] for reply in replies] == list(range(first, first + 20))
        clones = [Clone(channel, reply[2], reply[3][0]) for channel, reply in zip(channels, replies, strict=True)]
        assert len({clone.pid for clone in clones}) == 20
        for clone in clones:
            clone.close()

    def test_malformed_requests_are_refused_and_leak_nothing(self, zygote: Warm) -> None:
        a, b = socket.socketpair()
        agent = os.open("/dev/null", os.O_RDONLY)
        good = struct.pack("<4sIQI", b"TCLN", 77, 0, len(NO_PROGRAM)) + NO_PROGRAM
        for packet, fds in (
            (b"TCL", [a.fileno(), agent]),
            (good.replace(b"TCLN", b"XXXX"), [a.fileno(), agent]),
            (good[:-1], [a.fileno(), agent]),
            (good + b"x", [a.fileno(), agent]),
            (good, [a.fileno()]),
            (good, []),
        ):
            socket.send_fds(zygote.control, [packet], fds)
            _, code, pid, got = zygote.reply()
            assert (code, pid, got) == (errno.EINVAL, 0, [])
        a.close()
        b.close()
        os.close(agent)
        assert zygote.run("-c", "print(1)") == Outcome(b"1\n", b"", 0, warm=True)

    def test_flags_that_the_kernel_refuses(self, zygote: Warm) -> None:
        with zygote.request(flags=0x00000800):  # CLONE_SIGHAND without CLONE_VM
            assert zygote.reply()[1] == errno.EINVAL

    def test_an_agent_that_can_not_be_executed(self) -> None:
        zygote = Warm(sys.executable, Path("/dev/null"))
        assert failing(zygote, NO_PROGRAM) == (STEP_AGENT, errno.EACCES)
        zygote.close()

    def test_the_next_clone_is_made_ahead_and_used(self, stub: Path) -> None:
        zygote = Warm(sys.executable, stub)
        zygote.clone().close()
        until(lambda: children_of(zygote.process.pid))
        spare = children_of(zygote.process.pid)[0]
        until(lambda: status_of(spare)["State"].startswith("S") and "900" in os.listdir(f"/proc/{spare}/fd"))
        seen = set()
        while spare not in seen:  # it is used as soon as it has warmed its memory
            clone = zygote.clone()
            seen.add(clone.pid)
            clone.close()
        zygote.close()

    def test_a_spare_that_died_is_not_missed(self, stub: Path) -> None:
        zygote = Warm(sys.executable, stub)
        zygote.clone().close()
        until(lambda: children_of(zygote.process.pid))
        spare = children_of(zygote.process.pid)[0]
        os.kill(spare, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{spare}").exists())
        assert zygote.run("-c", "print(2)") == Outcome(b"2\n", b"", 0, warm=True)
        zygote.close()

    @pytest.mark.needs("root")
    def test_a_spare_of_another_kind_is_not_used(self, stub: Path) -> None:
        zygote = Warm(sys.executable, stub)
        zygote.clone().close()
        until(lambda: children_of(zygote.process.pid))
        spare = children_of(zygote.process.pid)[0]
        with cloned(zygote, flags=CLONE_NEWPID) as clone:
            assert clone.pid != spare
            assert clone.agent_argv[-1] == "--runner-pid=2"
        until(lambda: spare not in children_of(zygote.process.pid))
        zygote.close()


class TestProgram:
    def test_results_are_stored_and_loaded(self, zygote: Warm, tmp_path: Path) -> None:
        program = Program()
        opened = program.slot()
        program.syscall("openat", -100, str(tmp_path / "made"), os.O_CREAT | os.O_WRONLY, 0o644, store=opened)
        program.syscall("write", opened, program.blob(b"from the program"), 16)
        program.syscall("close", opened)
        with cloned(zygote, program.encode()):
            assert (tmp_path / "made").read_bytes() == b"from the program"

    def test_descriptors_by_index_and_addresses_in_structures(self, zygote: Warm) -> None:
        readable, writable = os.pipe()
        program = Program()
        text = program.blob(b"by address")
        vector = program.blob(struct.pack("<QQ", 0, 10))
        program.reloc(text, into=vector, at=0)
        program.syscall("writev", Fd(2), vector, 1)
        with cloned(zygote, program.encode(), extra=[writable]):
            os.close(writable)
            assert os.read(readable, 100) == b"by address"
            assert os.read(readable, 100) == b"", "the agent or runner still holds it"
        os.close(readable)

    def test_the_working_directory_comes_from_the_program(self, zygote: Warm, tmp_path: Path) -> None:
        program = Program()
        program.syscall("chdir", str(tmp_path))
        with cloned(zygote, program.encode()) as clone:
            assert os.readlink(f"/proc/{clone.pid}/cwd") == str(tmp_path)

    def test_the_failing_step_is_reported(self, zygote: Warm) -> None:
        program = Program()
        program.syscall("getpid")
        program.syscall("chdir", "/no/such/place", step="the bad one")
        assert failing(zygote, program.encode()) == (1, errno.ENOENT)

    def test_an_expected_error_is_passed_over(self, zygote: Warm) -> None:
        program = Program()
        program.syscall("chdir", "/no/such/place", ok=errno.ENOENT)
        with cloned(zygote, program.encode()) as clone:
            assert clone.agent_argv[0] == "tartarus-guest"

    def test_nothing_runs_after_a_failure(self, zygote: Warm, tmp_path: Path) -> None:
        program = Program()
        program.syscall("chdir", "/no/such/place")
        program.syscall("mkdirat", -100, str(tmp_path / "never"), 0o755)
        assert failing(zygote, program.encode())[1] == errno.ENOENT
        assert not (tmp_path / "never").exists()

    def test_a_descriptor_that_was_not_passed(self, zygote: Warm) -> None:
        program = Program()
        program.syscall("fchdir", Fd(2))
        assert failing(zygote, program.encode()) == (0, errno.EBADF)

    @pytest.mark.parametrize(
        "program",
        [b"", b"TPRG", b"XPRG" + NO_PROGRAM[4:], struct.pack("<4sHHI", b"TPRG", 2, 0, 0),
         struct.pack("<4sHHI", b"TPRG", 1, 5, 0), struct.pack("<4sHHI", b"TPRG", 1, 0, 500)],
    )  # fmt: skip
    def test_a_malformed_program(self, zygote: Warm, program: bytes) -> None:
        assert failing(zygote, program) == (STEP_PROGRAM, errno.EINVAL)

    def test_places_outside_the_programs_memory(self, zygote: Warm) -> None:
        op = struct.Struct("<BBHiiI6B2x6Q")
        getpid = number("getpid")
        for fields in (
            (0, 0, 0, getpid, 5000, 0, *[0] * 6, *[0] * 6),  # store
            (0, 0, 0, getpid, -1, 0, 3, *[0] * 5, 5000, *[0] * 5),  # load
            (1, 0, 0, 0, -1, 0, *[0] * 6, 0, 5000, *[0] * 4),  # relocate
        ):
            program = struct.pack("<4sHHI", b"TPRG", 1, 1, 8) + op.pack(*fields) + bytes(8)
            assert failing(zygote, program) == (STEP_PROGRAM, errno.EINVAL)

    def test_an_unknown_kind_of_operation(self, zygote: Warm) -> None:
        op = struct.pack("<BBHiiI6B2x6Q", 9, 0, 0, 0, -1, 3, *[0] * 12)
        assert failing(zygote, struct.pack("<4sHHI", b"TPRG", 1, 1, 0) + op) == (3, errno.EINVAL)

    def test_it_applies_to_what_the_runner_runs(self, zygote: Warm) -> None:
        program = Program()
        program.syscall("prctl", 38, 1, 0, 0, 0)
        program.syscall("prlimit64", 0, 7, program.blob(struct.pack("<QQ", 123, 123)), 0)
        code = "import resource; print(resource.getrlimit(7), 'NoNewPrivs:\\t1' in open('/proc/self/status').read())"
        with cloned(zygote, program.encode()) as clone, open_files(b"", one_file=False) as files:
            clone.ask([sys.executable, "-c", code], ENV, "/", files.fds, ONCE)
            assert clone.answer()[0] == STARTED
            clone.ended()
            assert files.contents() == (b"(123, 123) True\n", b"")


class TestRequests:
    def test_once_makes_the_runner_the_program(self, zygote: Warm) -> None:
        with cloned(zygote) as clone, open_files(b"", one_file=False) as files:
            runner = children_of(clone.pid)[0]
            clone.ask([sys.executable, "-c", "import os; print(os.getpid(), os.getppid())"], ENV, "/", files.fds, ONCE)
            assert clone.answer() == (STARTED, runner, 0)
            assert clone.ended() == (runner, 0)
            assert files.contents()[0].split() == [str(runner).encode(), str(clone.pid).encode()]

    def test_else_each_program_is_a_child_that_is_reaped(self, zygote: Warm) -> None:
        with cloned(zygote) as clone:
            for code, status in (("pass", 0), ("raise SystemExit(3)", 0x300), ("import os; os.abort()", 0x6)):
                with open_files(b"", one_file=False) as files:
                    clone.ask([sys.executable, "-c", code], ENV, "/", files.fds, WARM)
                    kind, pid, _ = clone.answer()
                    assert kind == STARTED
                    kind, ended, ended_status = clone.answer()
                    assert (kind, ended, ended_status & ~0x80) == (EXITED, pid, status)
                    assert not Path(f"/proc/{pid}").exists()

    def test_programs_at_the_same_time(self, zygote: Warm) -> None:
        with cloned(zygote) as clone, contextlib.ExitStack() as stack:
            wanted = {}
            for at in range(5):
                files = stack.enter_context(open_files(b"", one_file=False))
                clone.ask(
                    [sys.executable, "-c", f"import time; time.sleep(0.1); print({at})"], ENV, "/", files.fds, WARM
                )
                wanted[at] = files
            answers = [clone.answer() for _ in range(10)]
            started = [pid for kind, pid, _ in answers if kind == STARTED]
            assert sorted(started) == sorted(pid for kind, pid, _ in answers if kind == EXITED)
            assert [files.contents()[0] for files in wanted.values()] == [b"%d\n" % at for at in wanted]

    def test_each_program_starts_fresh(self, zygote: Warm) -> None:
        code = "import sys; print(getattr(sys, 'mark', None), 'x' in globals()); sys.mark = x = 1"
        with cloned(zygote) as clone:
            for _ in range(2):
                with open_files(b"", one_file=False) as files:
                    clone.ask([sys.executable, "-c", code], ENV, "/", files.fds, WARM)
                    assert [clone.answer()[0], clone.answer()[0]] == [STARTED, EXITED]
                    assert files.contents() == (b"None False\n", b"")

    def test_refusals_do_not_end_the_runner(self, zygote: Warm) -> None:
        with cloned(zygote) as clone, open_files(b"", one_file=False) as files:
            for flags in (WARM, ONCE, WARM, ONCE):
                clone.ask([sys.executable, "-X", "dev", "-c", "pass"], ENV, "/", files.fds, flags)
                assert clone.answer()[0] == REFUSED
            clone.ask([sys.executable, "-c", "print(5)"], ENV, "/", files.fds, WARM)
            assert [clone.answer()[0], clone.answer()[0]] == [STARTED, EXITED]
            clone.ask([sys.executable, "-c", "print(6)"], ENV, "/", files.fds, ONCE)
            assert clone.answer()[0] == STARTED
            clone.ended()
            assert files.contents() == (b"5\n6\n", b"")

    def test_a_request_in_pieces(self, zygote: Warm) -> None:
        with cloned(zygote) as clone, open_files(b"", one_file=False) as files:
            data = encode_exec(WARM, "/", [sys.executable, "-c", f"print(len({'x' * 100_000!r}))"], ENV)
            socket.send_fds(clone.runner, [data[:1]], files.fds)
            for at in range(1, 10):
                clone.runner.send(data[at : at + 1])
            clone.runner.sendall(data[10:])
            assert [clone.answer()[0], clone.answer()[0]] == [STARTED, EXITED]
            assert files.contents() == (b"100000\n", b"")

    def test_two_requests_in_one_piece_of_time(self, zygote: Warm) -> None:
        with cloned(zygote) as clone, open_files(b"", one_file=False) as files:
            for number_ in (1, 2):
                clone.ask([sys.executable, "-c", f"print({number_})"], ENV, "/", files.fds, WARM)
            kinds = [clone.answer()[0] for _ in range(4)]
            assert (kinds.count(STARTED), kinds.count(EXITED)) == (2, 2)
            assert sorted(files.contents()[0].split()) == [b"1", b"2"]

    def test_the_runner_ends_when_its_socket_is_closed(self, zygote: Warm) -> None:
        with cloned(zygote) as clone:
            runner = children_of(clone.pid)[0]
            clone.runner.close()
            assert clone.ended() == (runner, 0)

    def test_a_program_on_a_terminal(self, zygote: Warm) -> None:
        ours, theirs = pty.openpty()
        code = (
            "import os, sys; print(sys.stdin.isatty(), sys.stdout.line_buffering, os.tcgetpgrp(0) == os.getpid(),"
            " os.path.exists('/dev/tty') and bool(os.open('/dev/tty', os.O_RDWR)), input('say: '))"
        )
        for flags in (ONCE | TTY, WARM | TTY):
            with cloned(zygote) as clone:
                clone.ask([sys.executable, "-c", code], ENV, "/", [theirs] * 3, flags)
                assert clone.answer()[0] == STARTED
                os.write(ours, b"hi\n")
                if flags & ONCE:
                    clone.ended()
                else:
                    assert clone.answer()[0] == EXITED
                text = b""
                while b"True True True True hi" not in text:
                    text += os.read(ours, 1000)
        os.close(ours)
        os.close(theirs)

    def test_control_c_on_a_terminal(self, zygote: Warm) -> None:
        ours, theirs = pty.openpty()
        with cloned(zygote) as clone:
            clone.ask([sys.executable, "-c", "print('ready')\nwhile True: pass"], ENV, "/", [theirs] * 3, ONCE | TTY)
            assert clone.answer()[0] == STARTED
            while b"ready" not in os.read(ours, 1000):
                pass
            os.write(ours, b"\x03")
            assert os.waitstatus_to_exitcode(clone.ended()[1]) == -signal.SIGINT
        os.close(ours)
        os.close(theirs)


class TestRefused:
    @pytest.mark.parametrize(
        "args",
        [["-i", "-c", "1"], ["-O", "-c", "1"], ["-OO", "-c", "1"], ["-X", "utf8", "-c", "1"], ["-W", "error", "-c", "1"],
         ["-V"], ["--version"], ["-h"], ["--help"], ["-S", "-c", "1"], ["-d", "-c", "1"], ["-v", "-c", "1"],
         ["-x", "prog.py"], ["-b", "-c", "1"], ["-bb", "-c", "1"], ["-c"], ["-m"], ["-uc"], ["-Z"], ["-?"],
         ["--check-hash-based-pycs", "never", "x.py"]],
    )  # fmt: skip
    def test_options_that_start_up_must_see(self, zygote: Warm, args: list[str]) -> None:
        assert zygote.run(*args) is None

    @pytest.mark.parametrize("code", ["x =", "def f(:", "\x01", "return", "'\\ud800' = 1", "  indented"])
    def test_text_that_does_not_compile(self, zygote: Warm, code: str) -> None:
        if code == "  indented" and sys.version_info >= (3, 14):
            pytest.fail("3.14 removes indentation: give this test another text")
        assert zygote.run("-c", code) is None

    def test_scripts_that_are_not_plain_files(self, zygote: Warm, tmp_path: Path) -> None:
        (tmp_path / "dir").mkdir()
        (tmp_path / "dir" / "__main__.py").write_text("print(1)")
        with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
            archive.writestr("__main__.py", "print(1)")
        (tmp_path / "code.pyc").write_bytes(b"x")
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "secret.py").write_text("print(1)")
        for name in ("dir", "app.pyz", "code.pyc", "fifo", "missing.py", "", "dir/missing/x.py", "/dev/null"):
            assert zygote.run(name, cwd=str(tmp_path)) is None, name
        (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
        assert zygote.run("bad.py", cwd=str(tmp_path)) is None

    def test_another_interpreter(self, zygote: Warm, tmp_path: Path) -> None:
        copy = tmp_path / "python3"
        copy.symlink_to(sys.executable)
        (tmp_path / "python4").write_text("#!/bin/sh\n")
        (tmp_path / "python4").chmod(0o755)
        for argv0 in (str(copy), str(tmp_path / "python4"), "python-none", "./python3", "/nowhere/python3"):
            assert zygote.run("-c", "1", argv0=argv0) is None, argv0

    def test_a_working_directory_that_is_missing(self, zygote: Warm) -> None:
        assert zygote.run("-c", "1", cwd="/no/such/place") is None

    @pytest.mark.parametrize(
        ("name", "value"),
        [("PYTHONHASHSEED", "0"), ("PYTHONOPTIMIZE", "1"), ("PYTHONHOME", "/x"), ("PYTHONWARNINGS", "error"),
         ("PYTHONIOENCODING", "latin-1"), ("PYTHONUTF8", "0"), ("PYTHONFAULTHANDLER", "1"), ("PYTHONINSPECT", "1"),
         ("PYTHONTRACEMALLOC", "1"), ("PYTHONDEVMODE", "1"), ("PYTHONMALLOC", "debug"), ("PYTHONPROFILEIMPORTTIME", "1"),
         ("PYTHON_GIL", "0")],
    )  # fmt: skip
    def test_variables_that_start_up_must_see(self, zygote: Warm, name: str, value: str) -> None:
        assert zygote.run("-c", "1", env={**ENV, name: value}) is None
        assert zygote.run("-E", "-c", "1", env={**ENV, name: value}) is not None
        assert zygote.run("-c", "1", env={**ENV, name: ""}) is not None

    def test_a_module_beside_the_program_that_would_be_imported_instead(self, zygote: Warm, tmp_path: Path) -> None:
        (tmp_path / "prog.py").write_text("import random")
        (tmp_path / "random.py").write_text("print('mine')")
        assert zygote.run("prog.py", cwd=str(tmp_path)) is None
        assert zygote.run("-c", "1", cwd=str(tmp_path)) is None
        assert zygote.run("-m", "prog", cwd=str(tmp_path)) is None
        assert zygote.run("-I", "prog.py", cwd=str(tmp_path)) is not None
        assert zygote.run("-c", "1", env={**ENV, "PYTHONPATH": f"/x:{tmp_path}"}) is None
        (tmp_path / "random.py").rename(tmp_path / "numpy")
        assert zygote.run("prog.py", cwd=str(tmp_path)) is None

    def test_a_users_own_packages(self, zygote: Warm, tmp_path: Path) -> None:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        (tmp_path / ".local" / "lib" / version / "site-packages").mkdir(parents=True)
        outcome = zygote.run("-c", "import site; print(site.ENABLE_USER_SITE)", env={**ENV, "HOME": str(tmp_path)})
        assert outcome is None or outcome.stdout == b"False\n"
        assert zygote.run("-s", "-c", "1", env={**ENV, "HOME": str(tmp_path)}) is not None

    def test_a_terminal_without_a_program_is_a_dialogue(self, zygote: Warm) -> None:
        ours, theirs = pty.openpty()
        with cloned(zygote) as clone:
            for argv in ([sys.executable], [sys.executable, "-"], [sys.executable, "-q"]):
                clone.ask(argv, ENV, "/", [theirs] * 3, TTY | WARM)
                assert clone.answer()[0] == REFUSED
        os.close(ours)
        os.close(theirs)


class TestFreshness:
    def values(self, zygote: Warm, code: str, times: int = 4) -> list[bytes]:
        found = []
        for _ in range(times):
            outcome = zygote.run("-c", code)
            assert outcome is not None
            assert (outcome.status, outcome.stderr) == (0, b"")
            found.append(outcome.stdout)
        return found

    @pytest.mark.parametrize(
        "code",
        ["import random; print(random.random())", "import random; print(random.getrandbits(64), random.gauss(0, 1))",
         "import numpy; print(numpy.random.random())", "import numpy; print(numpy.random.normal())",
         "import numpy; print(numpy.random.default_rng().random())", "import uuid; print(uuid.uuid4())",
         "import secrets; print(secrets.token_hex())", "import ssl; print(ssl.RAND_bytes(16))",
         "import tempfile; print(next(tempfile._get_candidate_names()))",
         "import multiprocessing.process as p; print(bytes(p.current_process().authkey))",
         "import os; print(os.urandom(8))"],
    )  # fmt: skip
    def test_no_two_clones_draw_the_same(self, zygote: Warm, code: str) -> None:
        found = self.values(zygote, code)
        assert len(set(found)) == len(found)

    def test_no_two_programs_of_one_clone_draw_the_same(self, zygote: Warm) -> None:
        code = "import random, numpy, ssl; print(random.random(), numpy.random.random(), ssl.RAND_bytes(8).hex())"
        found = set()
        with cloned(zygote) as clone:
            for _ in range(3):
                with open_files(b"", one_file=False) as files:
                    clone.ask([sys.executable, "-c", code], ENV, "/", files.fds, WARM)
                    assert [clone.answer()[0], clone.answer()[0]] == [STARTED, EXITED]
                    found.update(files.contents()[0].split())
        assert len(found) == 9

    def test_numpys_generator_is_sound(self, zygote: Warm) -> None:
        code = (
            "import numpy; n = numpy.random; a = n.random(20000); print(abs(a.mean() - 0.5) < 0.02, len(set(a)) == 20000);"
            " n.seed(5); x = n.random(); n.seed(5); print(x == n.random() == n.RandomState(5).random())"
        )
        assert self.values(zygote, code, 2) == [b"True True\nTrue\n"] * 2

    def test_numeric_libraries_get_their_threads_back(self, zygote: Warm) -> None:
        code = (
            "import numpy, os; before = len(os.listdir('/proc/self/task')); a = numpy.ones((400, 400)); (a @ a).sum();"
            " print(before, len(os.listdir('/proc/self/task')), 'OPENBLAS_NUM_THREADS' in os.environ)"
        )
        outcome = zygote.run("-c", code)
        assert outcome is not None
        before, after, leaked = outcome.stdout.split()
        assert (before, leaked) == (b"1", b"False")
        assert int(after) == len(os.sched_getaffinity(0))
        outcome = zygote.run("-c", code, env={**ENV, "OMP_NUM_THREADS": "1"})
        assert outcome is not None
        assert outcome.stdout == b"1 1 False\n"

    def test_nothing_of_the_runner_is_in_sight(self, zygote: Warm) -> None:
        code = (
            "import gc, sys, threading, traceback\n"
            "print([n for n in sys.modules if 'runner' in n.lower()], gc.isenabled(), threading.active_count())\n"
            "print([p for p in sys.path if 'guest' in p], len(traceback.extract_stack()), sys.argv)\n"
        )
        assert self.values(zygote, code, 1) == [b"[] True 1\n[] 1 ['-c']\n"]

    def test_a_clone_costs_little_memory(self, zygote: Warm) -> None:
        with cloned(zygote) as clone:
            rollup = Path(f"/proc/{children_of(clone.pid)[0]}/smaps_rollup").read_text()
            private = re.search(r"^Private_Dirty:\s+(\d+) kB", rollup, re.MULTILINE)
            assert private is not None
            assert int(private[1]) < 6 * 1024
