"""The real agent as an ordinary process at the other end of a socket pair."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel, GuestExec, GuestProcess, channel_pair

SOURCES = Path(__file__).parents[2] / "src" / "tartarus" / "guest" / "agent"
ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}


RT_SIGACTION = {"x86_64": 13, "aarch64": 134}[platform.machine()]
_libc = ctypes.CDLL(None)
_ignore = struct.pack("QQQQ", 1, 0, 0, 0)  # struct sigaction as the kernel has it, with SIG_IGN


def _ignore_signals() -> None:
    """As a careless parent does: libc's own signals too, which only the bare call reaches."""
    for number in range(1, 65):
        _libc.syscall(RT_SIGACTION, number, _ignore, None, 8)


def spawn_agent(binary: Path, *options: str, pass_fds: tuple[int, ...] = ()) -> tuple[subprocess.Popen[bytes], int]:
    """(the agent's process, the host's end of its channel as a descriptor)."""
    host, guest = channel_pair()
    with guest:
        process = subprocess.Popen(
            [binary, "agent", f"--channel={guest.fileno()}", "--shared-pids", *options],
            pass_fds=(guest.fileno(), *pass_fds),
            env={},
            preexec_fn=_ignore_signals,  # noqa: PLW1509 - takes no lock
        )
    return process, host.detach()


@pytest.fixture(scope="session")
def agent_binary_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent built from these sources; TARTARUS_TEST_AGENT names another build, such as a sanitized one."""
    if named := os.environ.get("TARTARUS_TEST_AGENT"):
        return Path(named)
    output = tmp_path_factory.mktemp("agent") / "tartarus-guest"
    assert shutil.which("make")
    subprocess.run(["make", "-s", f"OUT={output}", str(output)], cwd=SOURCES, check=True)
    return output


class Agent:
    """An agent process and a way to reach it."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self.fd = fd

    @property
    def pid(self) -> int:
        return self.process.pid

    def descendants(self, *, zombies: bool = False) -> set[int]:
        """Every process below the agent; those that only wait to be reaped count if asked."""
        return descendants(self.pid, zombies=zombies)


def descendants(pid: int, *, zombies: bool = False) -> set[int]:
    parents: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if zombies or state != "Z":
                parents[int(entry.name)] = int(parent)
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent == pid or parent in found} - found:
        found |= new
    return found


@pytest.fixture
def agent(agent_binary_path: Path) -> Iterator[Agent]:
    process, fd = spawn_agent(agent_binary_path)
    started = Agent(process, fd)
    yield started
    if started.fd >= 0:
        os.close(started.fd)
    left = started.descendants()
    assert process.wait(timeout=30) == 0
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]


@pytest.fixture
async def guest(agent: Agent) -> AsyncIterator[GuestChannel]:
    sock = socket.socket(fileno=agent.fd)
    agent.fd = -1
    channel = GuestChannel(sock)
    await channel.open()
    yield channel
    channel.close()


def command(*argv: str, **options: object) -> GuestExec:
    """A GuestExec with a plain environment."""
    return GuestExec(argv=argv, env=ENV, **options)  # type: ignore[arg-type]


def shell(script: str, **options: object) -> GuestExec:
    return command("sh", "-c", script, **options)


async def output_of(process: GuestProcess) -> tuple[bytes, bytes]:
    """(stdout, stderr), read to the end."""
    parts: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    while (piece := await process.read()) is not None:
        parts[piece[0] - 1].extend(piece[1])
    return bytes(parts[0]), bytes(parts[1])
