"""A real zygote and its clones, driven as the node and the agent would: the runner's tests talk to these."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RUNNER = Path(__file__).parents[2] / "src" / "tartarus" / "guest" / "runner.py"
STUB = Path(__file__).with_name("stub_agent.c")
NO_PROGRAM = struct.pack("<4sHHI", b"TPRG", 1, 0, 0)
STARTED, EXITED, REFUSED = 1, 2, 3
TTY, STDIN, WARM, ONCE = 1, 2, 4, 8
CLONE_NEWPID = 0x20000000
ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nowhere"}


def build_stub(directory: Path) -> Path:
    """Compile the stand-in for the agent."""
    output = directory / "stub_agent"
    subprocess.run(["cc", "-O1", "-static", "-o", str(output), str(STUB)], check=True, capture_output=True)
    return output


@dataclass(frozen=True)
class Outcome:
    """What a command line did. `status` is subprocess's: negative for a signal."""

    stdout: bytes
    stderr: bytes
    status: int
    warm: bool = False


def encode_exec(flags: int, cwd: str, argv: Sequence[str], env: Mapping[str, str]) -> bytes:
    """A request to the runner: length, then what an EXEC frame would carry."""

    def text(value: str) -> bytes:
        data = os.fsencode(value)
        return struct.pack("<I", len(data)) + data

    def texts(values: Sequence[str]) -> bytes:
        return struct.pack("<I", len(values)) + b"".join(map(text, values))

    payload = struct.pack("<IHHI", flags, 24, 80, 1 << 20) + text(cwd) + texts(argv)
    payload += texts([f"{name}={value}" for name, value in env.items()])
    return struct.pack("<I", len(payload)) + payload


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError(f"{len(data)} of {size} bytes")
        data += more
    return data


class Clone:
    """One clone: its channel, its runner's socket, its pidfd."""

    def __init__(self, channel: socket.socket, pid: int, pidfd: int) -> None:
        self.channel = channel
        self.pid = pid
        self.pidfd = pidfd
        words, fds, _, _ = socket.recv_fds(channel, 4096, 1)
        if not fds:
            raise AssertionError(f"the clone failed: {words!r}")
        self.agent_argv = words.decode().split()
        self.runner = socket.socket(fileno=fds[0])

    def ask(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, fds: Sequence[int], flags: int) -> None:
        socket.send_fds(self.runner, [encode_exec(flags, cwd, argv, env)], list(fds))

    def answer(self) -> tuple[int, int, int]:
        kind, number, status = struct.unpack("<IiI", receive_exactly(self.runner, 12))
        return kind, number, status

    def ended(self) -> tuple[int, int]:
        """(pid, wait status) of the next child of the agent that ended."""
        pid, status = struct.unpack("<ii", receive_exactly(self.channel, 8))
        return pid, status

    def close(self) -> None:
        self.runner.close()
        self.channel.close()
        select.select([self.pidfd], [], [], 30)
        os.close(self.pidfd)


class Warm:
    """A zygote of one interpreter."""

    def __init__(
        self,
        interpreter: str,
        agent: Path,
        imports: str = "",
        env: Mapping[str, str] = ENV,
        runner: Path = RUNNER,
        script: Path | None = None,
    ) -> None:
        self.interpreter = interpreter
        self.agent = os.open(agent, os.O_RDONLY)
        self.sequence = 0
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [interpreter, str(runner), "zygote", f"--control={theirs.fileno()}", f"--imports={imports}"]
            argv += [f"--script={script}"] if script else []
            self.process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], env=dict(env))
        self.greeting = self.control.recv(65536)

    def request(self, program: bytes = NO_PROGRAM, flags: int = 0, extra: Sequence[int] = ()) -> socket.socket:
        """Ask for a clone; returns the host's end of its channel."""
        self.sequence += 1
        ours, theirs = socket.socketpair()
        with theirs:
            packet = struct.pack("<4sIQI", b"TCLN", self.sequence, flags, len(program)) + program
            socket.send_fds(self.control, [packet], [theirs.fileno(), self.agent, *extra])
        return ours

    def reply(self) -> tuple[int, int, int, list[int]]:
        """(sequence, errno, pid, descriptors) of the next answer."""
        packet, fds, _, _ = socket.recv_fds(self.control, 4096, 4)
        magic, sequence, number, pid = struct.unpack("<4sIIi", packet)
        assert magic == b"TCLD"
        return sequence, number, pid, fds

    def clone(self, program: bytes = NO_PROGRAM, flags: int = 0, extra: Sequence[int] = ()) -> Clone:
        channel = self.request(program, flags, extra)
        sequence, number, pid, fds = self.reply()
        assert (sequence, number, len(fds)) == (self.sequence, 0, 1)
        return Clone(channel, pid, fds[0])

    def close(self) -> int:
        """End the zygote; its exit status."""
        self.control.close()
        os.close(self.agent)
        return self.process.wait(30)

    def run(
        self,
        *args: str,
        env: Mapping[str, str] = ENV,
        cwd: str = "/",
        stdin: bytes = b"",
        one_file: bool = False,
        argv0: str | None = None,
        meanwhile: Callable[[int], None] | None = None,
        flags: int = ONCE | WARM,
    ) -> Outcome | None:
        """Run `python3 *args` in a fresh clone; None when the runner refused it."""
        clone = self.clone()
        try:
            with open_files(stdin, one_file) as files:
                clone.ask([argv0 or self.interpreter, *args], env, cwd, files.fds, flags)
                kind, pid, _ = clone.answer()
                if kind == REFUSED:
                    return None
                assert kind == STARTED
                if meanwhile is not None:
                    meanwhile(pid)
                ended, status = clone.ended()
                assert ended == pid
                return Outcome(*files.contents(), os.waitstatus_to_exitcode(status), True)
        finally:
            clone.close()


def run_cold(
    interpreter: str,
    *args: str,
    env: Mapping[str, str] = ENV,
    cwd: str = "/",
    stdin: bytes = b"",
    one_file: bool = False,
    argv0: str | None = None,
    meanwhile: Callable[[int], None] | None = None,
) -> Outcome:
    """The same with the real interpreter."""
    with open_files(stdin, one_file) as files:
        process = subprocess.Popen(
            [argv0 or interpreter, *args], executable=interpreter, env=dict(env), cwd=cwd, stdin=files.fds[0],
            stdout=files.fds[1], stderr=files.fds[2], start_new_session=True,
        )  # fmt: skip
        if meanwhile is not None:
            meanwhile(process.pid)
        status = process.wait()
        return Outcome(*files.contents(), status)


class open_files:  # noqa: N801  (reads as the function it stands for)
    """Standard input with given content, and files that take stdout and stderr, or both in one."""

    def __init__(self, stdin: bytes, one_file: bool) -> None:
        source, sink = os.pipe()
        os.write(sink, stdin)
        os.close(sink)
        out = os.memfd_create("stdout")
        self.fds = [source, out, os.dup(out) if one_file else os.memfd_create("stderr")]

    def __enter__(self) -> open_files:
        return self

    def __exit__(self, *failure: object) -> None:
        for fd in self.fds:
            os.close(fd)

    def contents(self) -> tuple[bytes, bytes]:
        return tuple(os.pread(fd, 1 << 24, 0) for fd in self.fds[1:])  # type: ignore[return-value]
