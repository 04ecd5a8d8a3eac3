"""Where a monitor would be started: a contract server listens in its home, and a process stands for the monitor's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from tests.microvm import kernels

from tartarus.guest.binary import agent_binary
from tartarus.guest.channel import GuestChannel, GuestExec, channel_pair
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.microvm import memory
from tartarus.runtimes.microvm.driver import Boot, Hardware, Parts
from tartarus.runtimes.microvm.home import Home
from tartarus.runtimes.microvm.launcher import FIRST_UID
from tartarus.runtimes.microvm.monitor import Born
from tartarus.runtimes.microvm.output import Output
from tartarus.runtimes.nursery import Clone

from .cloud_hypervisor import CloudHypervisorServer
from .firecracker import FirecrackerServer
from .guest import Guest

MIB = 1024 * 1024
S = TypeVar("S", FirecrackerServer, CloudHypervisorServer)


class Stage(Generic[S]):
    """Starts servers of one kind. `before`: what to do to each before it listens."""

    copies = False

    def __init__(self, kind: type[S], place: Path) -> None:
        self.servers: list[S] = []
        self.argv: list[list[str]] = []
        self.guest = Guest(agent_binary(), place)
        self.before: Callable[[S], None] = lambda _server: None
        self.processes: list[subprocess.Popen[bytes]] = []
        self._kind: type[S] = kind
        self._homes = place / "homes"

    def home(self) -> Home:
        """A home."""
        return Home(self._homes)

    async def __call__(
        self,
        home: Home,
        output: Output,
        argv: Sequence[str],
        files: Mapping[str, int],
        cgroup: Cgroup | None,  # noqa: ARG002 - a monitor's
    ) -> Born:
        self.argv.append(list(argv))
        home.belong_to(FIRST_UID)
        for name, fd in files.items():
            os.symlink(f"/proc/{os.getpid()}/fd/{os.dup(fd)}", home.path / name)
        server = self._kind(home.path)
        server.guest = self.guest
        self.servers.append(server)
        self.before(server)
        await server.start(FIRST_UID)
        process = subprocess.Popen(["sleep", "1000"], stdout=output.write_end)
        self.processes.append(process)
        ours, theirs = channel_pair()
        theirs.close()
        return Born(Clone(os.pidfd_open(process.pid)), ours)

    @property
    def server(self) -> S:
        """The newest."""
        return self.servers[-1]

    async def close(self) -> None:
        """End everything; whatever was asked must have been allowed."""
        for server in self.servers:
            await server.close()
        for process in self.processes:
            process.kill()
            process.wait()
        self.guest.end()
        assert [server.breaches for server in self.servers] == [[] for _ in self.servers]


def parts(place: Path, *, share: bool = True, cpus: int = 2, binds: int = 0) -> Parts:
    """What a machine is made from."""
    files = {}
    contents = {"kernel": kernels.elf(), "initramfs": b"070701", "root": b"erofs", "scratch": b"ext4"}
    contents |= {f"bind{index}": b"erofs" for index in range(binds)}
    for name, content in contents.items():
        (place / name).write_bytes(content)
        files[name] = os.open(place / name, os.O_RDWR if name == "scratch" else os.O_RDONLY)
    boot = Boot(files["kernel"], files["initramfs"])
    read_only = tuple(files[f"bind{index}"] for index in range(binds))
    hardware = Hardware(128 * MIB, cpus)
    return Parts(hardware, memory.create(128 * MIB), files["root"], files["scratch"], read_only, boot, share)


async def said(channel: GuestChannel, text: str) -> bytes:
    """What an echo in the guest says."""
    process = channel.exec(GuestExec(argv=("/bin/echo", text), env={}))
    got = b""
    while (piece := await process.read()) is not None:
        got += piece[1]
    await process.wait()
    return got
