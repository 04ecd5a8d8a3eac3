"""`tartarus run` and `exec` with real sandboxes: statuses, streams, signals, terminals, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import time

import pytest
from tests.cli.kit import COMMAND, PATIENCE_S, OnTerminal, refused, start, tartarus, text

from tartarus import Sandbox
from tartarus.model.states import State
from tartarus.sdk import Client

pytestmark = pytest.mark.usefixtures("clean")


class TestStatus:
    @pytest.mark.parametrize("status", [0, 1, 3, 123, 124, 125, 126, 127, 200, 255])
    def test_passed_through(self, status):
        done = tartarus("run", "--", "sh", "-c", f"exit {status}")
        assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
    def test_of_signals(self, number):
        assert tartarus("run", "--", "sh", "-c", f"kill -{int(number)} $$").returncode == 128 + number

    def test_refusals(self):
        assert "error[command_not_found]" in refused("run", "--", "no-such-command", status=127)
        assert "error[not_executable]" in refused("run", "--", "/etc/passwd", status=126)
        assert "error[template_not_found]" in refused("run", "--template", "nope", "--", "true")
        assert "error[invalid_request]: 'x' is not a size (write it" in refused("run", "--memory", "x", "true")
        assert "error[invalid_request]: memory is below" in refused("run", "--memory", "1KiB", "true")
        assert "error[invalid_request]: no command given" in refused("run")
        assert "see: tartarus run --help" in refused("run", "--nonsense", "true")
        assert "error[invalid_request]" in refused("run", "--mount", "/no/such/place:/x", "true")
        assert "error[invalid_request]" in refused("run", "--name", "a b", "true")
        assert "see: tartarus --help" in refused("frobnicate")

    def test_arguments_that_are_no_text(self):
        done = subprocess.run([*COMMAND, "run", "--", "echo", b"\xff"], capture_output=True, check=False)
        assert done.returncode == 125
        assert b"not UTF-8 text: it holds the byte 0xff" in done.stderr

    def test_a_name_taken(self):
        with Sandbox.create(name="taken"):
            assert "error[name_taken]" in refused("run", "--name", "taken", "true")

    def test_time_limit(self):
        done = tartarus("run", "--timeout", "500ms", "--", "sh", "-c", "echo before; sleep 60")
        assert (done.returncode, done.stdout) == (124, b"before\n")
        assert done.stderr.startswith(b"tartarus: error[time_limit]: ")

    @pytest.mark.needs("cgroups")
    def test_memory_limit(self):
        done = tartarus("run", "--memory", "32MiB", "--", "python3", "-c", "x = bytearray(10**9)")
        assert done.returncode == 137
        assert done.stderr.startswith(b"tartarus: error[resource_limit]: ")

    def test_the_daemon_is_killed(self):
        with start("run", "--", "sh", "-c", "echo ready; sleep 1000") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"ready\n"
            os.kill(Client().version().pid, signal.SIGKILL)
            assert process.wait(PATIENCE_S) == 125
            assert process.stderr.read().startswith(b"tartarus: error[sandbox_lost]: the daemon went away")
        assert text("run", "--", "echo", "again") == "again\n"

    def test_nothing_is_left(self):
        tartarus("run", "--", "true")
        refused("run", "--", "no-such-command", status=127)
        assert Sandbox.list() == []


def test_the_short_way_imports_nothing_slow():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tartarus.cli.main", "run", "--memory", "64MiB", "--", "true"],
        stdin=subprocess.DEVNULL, capture_output=True, check=True,
    )  # fmt: skip
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.decode().splitlines() if "|" in line}
    slow = {
        "click",
        "msgspec",
        "h11",
        "httpx",
        "anyio",
        "asyncio",
        "rich",
        "pathlib",
        "subprocess",
        "dataclasses",
        "ssl",
    }
    assert "tartarus.cli.relay" in imported
    assert imported & slow == set()


class TestStreams:
    def test_bytes_in_and_out(self):
        data = os.urandom(5_000_000)
        done = tartarus("run", "--", "cat", input=data)
        assert done.returncode == 0
        assert done.stdout == data

    def test_apart_and_in_order(self):
        script = "for i in 1 2 3; do echo out$i; sleep 0.05; echo err$i >&2; sleep 0.05; done"
        done = tartarus("run", "--", "sh", "-c", script)
        assert done.stdout == b"out1\nout2\nout3\n"
        assert done.stderr == b"err1\nerr2\nerr3\n"
        merged = subprocess.run(
            [*COMMAND, "run", "--", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
        assert merged.stdout.split() == [b"out1", b"err1", b"out2", b"err2", b"out3", b"err3"]

    def test_output_comes_when_it_is_written(self):
        with start("run", "--", "sh", "-c", "echo one; read x; echo two") as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.read(4) == b"one\n"
            process.stdin.write(b"\n")
            assert process.stdout.read(4) == b"two\n"
            assert process.wait(PATIENCE_S) == 0

    def test_input_from_a_file_and_from_nowhere(self, tmp_path):
        (tmp_path / "in").write_bytes(b"from a file")
        with (tmp_path / "in").open("rb") as file:
            assert tartarus("run", "--", "cat", stdin=file).stdout == b"from a file"
        assert tartarus("run", "--", "cat").stdout == b""
        closed = subprocess.run(
            ["sh", "-c", '"$@" <&-', "sh", *COMMAND, "run", "--", "cat"],
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert (closed.returncode, closed.stdout, closed.stderr) == (0, b"", b"")

    def test_a_reader_that_goes_away_ends_it(self):
        with start("run", "--", "yes") as process:
            assert process.stdout is not None
            process.stdout.read(1000)
            process.stdout.close()
            assert process.wait(PATIENCE_S) == 141
        for sandbox in Sandbox.list():
            assert sandbox.wait(30).state is State.KILLED

    def test_a_slow_non_blocking_reader_gets_everything(self):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        process = start("run", "--", "head", "-c", "2000000", "/dev/zero", stdout=writer, stdin=subprocess.DEVNULL)
        os.close(writer)
        received = 0
        while part := os.read(reader, 4096):
            received += len(part)
        assert received == 2_000_000
        assert process.communicate(timeout=PATIENCE_S)[1] == b""
        os.close(reader)

    def test_a_full_disk_is_an_error(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*COMMAND, "run", "--", "echo", "x"],
                stdout=full,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        assert done.returncode == 125
        assert b"can't write the output: No space left on device" in done.stderr


class TestStatusLines:
    def test_only_when_asked_for_or_on_a_terminal(self):
        done = tartarus("run", "--verbose", "--", "sh", "-c", "echo x; exit 2")
        launched, completed = done.stderr.decode().splitlines()
        assert launched.startswith("Sandbox launched (ID: sbx-")
        assert completed.startswith("Sandbox completed (exit code: 2, duration: ")
        assert completed.endswith("ms)")
        assert done.stdout == b"x\n"
        assert tartarus("run", "--", "true").stderr == b""
        terminal = OnTerminal(["run", "--", "echo", "hello"])
        assert b"Sandbox launched (ID: sbx-" in terminal.expect(b"hello\r\n")
        assert b"Sandbox completed (exit code: 0, duration: " in terminal.close()
        quiet = OnTerminal(["run", "--quiet", "--", "echo", "hello"])
        assert quiet.expect(b"hello\r\n") == b"hello\r\n"
        assert quiet.close() == b""

    def test_json(self):
        result = json.loads(text("run", "--json", "--", "sh", "-c", "printf out; printf err >&2"))
        assert (result["stdout"], result["stderr"], result["exit_code"], result["state"]) == (
            "out",
            "err",
            0,
            "succeeded",
        )
        assert result["id"].startswith("sbx-")
        assert result["duration_ms"] > 0
        binary = json.loads(text("run", "--json", "--", "printf", r"\377"))
        assert (binary["stdout"], binary["stdout_encoding"]) == ("/w==", "base64")
        late = tartarus("run", "--json", "--timeout", "300ms", "--", "sleep", "60")
        assert late.returncode == 124
        assert json.loads(late.stdout)["error"]["code"] == "time_limit"


class TestSignals:
    @pytest.mark.parametrize(
        "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
    )
    def test_forwarded(self, number):
        script = f"trap 'echo caught; exit 9' {int(number)}; echo ready; while :; do sleep 0.05; done"
        with start("run", "--", "sh", "-c", script) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            os.killpg(process.pid, number)
            assert process.stdout.read() == b"caught\n"
            assert process.wait(PATIENCE_S) == 9

    def test_a_second_interrupt_kills(self):
        script = "trap 'echo no' INT; echo ready; while :; do sleep 0.05; done"
        with start("run", "--", "sh", "-c", script) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == b"no\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 137

    def test_while_the_output_is_not_read(self):
        script = "trap 'exit 9' TERM; echo ready; yes & while :; do sleep 0.05; done"
        with start("run", "--", "sh", "-c", script) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.3)  # all pipes on the way are full
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            while process.stdout.read(1 << 20):
                pass
            assert process.wait(PATIENCE_S) == 9

    def test_while_the_input_is_not_read(self):
        with open("/dev/zero", "rb") as zeros:
            process = start("run", "--", "sh", "-c", "echo ready; exec sleep 1000", stdin=zeros)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.3)  # all buffers on the way are full
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 143

    def test_ignored_ones_stay_ignored(self):
        command = ["nohup", *COMMAND, "run", "--", "sh", "-c", "echo ready; read x; echo done"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGHUP)
            process.stdin.write(b"\n")
            assert process.stdout.readline() == b"done\n"

    def test_a_killed_client_takes_its_sandbox_along(self):
        with start("run", "--", "sh", "-c", "echo ready; sleep 1000") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            (sandbox,) = Sandbox.list()
            process.kill()
        assert sandbox.wait(30).state is State.KILLED

    def test_killed_from_elsewhere(self):
        with start("run", "--", "sh", "-c", "echo ready; sleep 1000") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"ready\n"
            Sandbox.list()[0].kill()
            assert process.wait(PATIENCE_S) == 137
            assert process.stderr.read() == b""


class TestTerminal:
    def test_size_and_echo(self):
        terminal = OnTerminal(
            ["run", "-t", "-i", "--quiet", "--", "sh", "-c", "stty size; read x; stty size; echo got $x"]
        )
        terminal.expect(b"30 100\r\n")
        terminal.resize(40, 120)
        terminal.type(b"word\r")
        terminal.expect(b"40 120\r\ngot word\r\n")
        assert terminal.wait() == 0
        terminal.close()

    def test_keys_go_inside_and_the_terminal_comes_back(self):
        script = "trap 'echo inside; exit 5' INT; echo ready; while :; do sleep 0.05; done"
        terminal = OnTerminal(["run", "-it", "--quiet", "--", "sh", "-c", script])
        before = terminal.local_flags()
        terminal.expect(b"ready\r\n")
        assert not terminal.local_flags() & termios.ECHO
        terminal.type(b"\x03")
        terminal.expect(b"inside\r\n")
        assert terminal.wait() == 5
        assert before & termios.ECHO
        terminal.close()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_the_terminal_comes_back_after_signals(self, number):
        terminal = OnTerminal(["run", "-it", "--quiet", "--", "sh", "-c", "echo ready; exec sleep 1000"])
        terminal.expect(b"ready\r\n")
        os.kill(terminal.pid, number)
        assert terminal.wait() == 128 + number
        assert terminal.local_flags() & termios.ECHO
        terminal.close()

    def test_suspended_from_outside(self):
        terminal = OnTerminal(["run", "-it", "--quiet", "--", "sh", "-c", "echo ready; read x; echo got $x"])
        terminal.expect(b"ready\r\n")
        os.kill(terminal.pid, signal.SIGTSTP)
        os.waitpid(terminal.pid, os.WUNTRACED)
        assert terminal.local_flags() & termios.ECHO
        os.kill(terminal.pid, signal.SIGCONT)
        terminal.type(b"word\r")
        terminal.expect(b"got word\r\n")
        assert terminal.wait() == 0
        terminal.close()

    def test_no_input_from_a_terminal_unless_asked(self):
        terminal = OnTerminal(["run", "--quiet", "--", "sh", "-c", "cat; echo end"])
        terminal.expect(b"end\r\n")
        assert terminal.wait() == 0
        terminal.close()


class TestDetach:
    def test_prints_the_id_and_lives_on(self):
        name = text("run", "-d", "--name", "bg", "--", "sh", "-c", "echo hello; sleep 1000").strip()
        assert name.startswith("sbx-")
        assert text("ps", "-q").split() == [name]
        assert "Sandbox" in text("kill", "bg")
        assert json.loads(text("run", "-d", "--json", "--", "true"))["state"] in {"running", "succeeded"}


class TestExec:
    def test_like_run(self, sandbox):
        done = tartarus("exec", sandbox.id, "--", "sh", "-c", "cat; echo err >&2; exit 4", input=b"in")
        assert (done.returncode, done.stdout, done.stderr) == (4, b"in", b"err\n")
        assert text("exec", "-e", "A=b", "-w", "/tmp", sandbox.id, "sh", "-c", "echo $A $PWD") == "b /tmp\n"
        assert text("exec", sandbox.id[:12], "echo", "by prefix") == "by prefix\n"
        assert "error[command_not_found]" in refused("exec", sandbox.id, "nope", status=127)
        assert "error[sandbox_not_found]" in refused("exec", "nobody", "true")
        assert "no command given" in refused("exec", sandbox.id)
        assert "no sandbox given" in refused("exec")

    def test_time_limit(self, sandbox):
        done = tartarus("exec", "--timeout", "300ms", sandbox.id, "sleep", "60")
        assert done.returncode == 124
        assert done.stderr.startswith(b"tartarus: error[time_limit]: sleep ran longer than 0.3 s")

    def test_interrupt_twice_with_stuck_input(self, sandbox):
        with open("/dev/zero", "rb") as zeros:
            process = start("exec", sandbox.id, "--", "sh", "-c", "echo ready; exec sleep 1000", stdin=zeros)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.3)  # all buffers on the way are full
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 130
        assert sandbox.run(["true"]).ok

    def test_a_terminal(self, sandbox):
        terminal = OnTerminal(["exec", "-it", sandbox.id, "sh", "-c", "tty >/dev/null && stty size"])
        terminal.expect(b"30 100\r\n")
        assert terminal.wait() == 0
        terminal.close()

    def test_the_sandbox_ends_under_it(self):
        sandbox = Sandbox.create()
        with start("exec", sandbox.id, "--", "sh", "-c", "echo ready; sleep 1000") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"ready\n"
            sandbox.kill()
            assert process.wait(PATIENCE_S) == 125
            assert process.stderr.read().startswith(b"tartarus: error[sandbox_lost]: ")
