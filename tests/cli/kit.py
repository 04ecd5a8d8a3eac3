"""Running the command line as people do: a process of its own, with pipes or a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from typing import Any

COMMAND = [sys.executable, "-m", "tartarus.cli.main"]
PATIENCE_S = 60.0


def tartarus(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; standard input is empty unless `input` is given."""
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=PATIENCE_S, check=False, **options)


def text(*arguments: str, **options: Any) -> str:
    """The standard output of a command that must succeed and say nothing on standard error."""
    done = tartarus(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def refused(*arguments: str, status: int = 125) -> str:
    """The one line on standard error of a command that must fail with `status` and print nothing else."""
    done = tartarus(*arguments)
    assert (done.returncode, done.stdout) == (status, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("tartarus: error[")
    return line


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command with pipes at its standard streams, in a process group of its own."""
    for stream in ("stdin", "stdout", "stderr"):
        options.setdefault(stream, subprocess.PIPE)
    return subprocess.Popen([*COMMAND, *arguments], process_group=0, bufsize=0, **options)


class OnTerminal:
    """A command whose standard streams are a terminal that we hold the other end of."""

    def __init__(self, arguments: Sequence[str], rows: int = 30, cols: int = 100) -> None:
        self._seen = b""
        self._status: int | None = None
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execv(COMMAND[0], [*COMMAND, *arguments])
        self.resize(rows, cols)

    def resize(self, rows: int, cols: int) -> None:
        """Change the terminal's size; the kernel tells the command."""
        termios.tcsetwinsize(self.master, (rows, cols))

    def type(self, data: bytes) -> None:
        """Press keys."""
        os.write(self.master, data)

    def expect(self, wanted: bytes) -> bytes:
        """Read until `wanted` has appeared; returns all up to it."""
        end = time.monotonic() + PATIENCE_S
        while wanted not in self._seen:
            ready = select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0]
            try:
                part = os.read(self.master, 65536) if ready else b""
            except OSError:  # the other end was closed
                part = b""
            assert part, f"{wanted!r} did not come; seen: {self._seen!r}"
            self._seen += part
        before, _, self._seen = self._seen.partition(wanted)
        return before + wanted

    def local_flags(self) -> int:
        """The terminal's local modes, such as ECHO."""
        flags = termios.tcgetattr(self.master)[3]
        assert isinstance(flags, int)
        return flags

    def wait(self) -> int:
        """The status a shell would show."""
        end = time.monotonic() + PATIENCE_S
        while self._status is None:
            assert time.monotonic() < end, f"still running; seen: {self._seen!r}"
            # A terminal's output must be read, or its writer does not end.
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self._seen += os.read(self.master, 65536)
                except OSError:
                    time.sleep(0.01)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status if self._status >= 0 else 128 - self._status

    def close(self) -> bytes:
        """Wait, close, and return what was still unread."""
        self.wait()
        os.close(self.master)
        return self._seen
