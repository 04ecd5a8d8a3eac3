"""How a guest gets into its group, how a group goes away, and what it means when there is none."""

from __future__ import annotations

import asyncio
import socket

from tartarus.guest.program import Fd, Program
from tartarus.runtimes.cgroups.ports import Cgroup, Hierarchy

_WITHOUT = {
    "memory": "the memory limit holds for each process by itself",
    "cpu": "the CPU limit is not enforced",
    "pids": "the process limit holds for the sandbox's user",
    "freezer": "sandboxes are paused process by process, which their programs can notice",
}


def lacking(hierarchy: Hierarchy | None) -> frozenset[str]:
    """Controllers that sandboxes must do without on this host."""
    return frozenset(_WITHOUT if hierarchy is None else hierarchy.missing)


def weaker_limits(missing: frozenset[str]) -> tuple[str, ...]:
    """What the lack of controllers means for a sandbox, in words."""
    return tuple(f"no {name} cgroup: {meaning}" for name, meaning in _WITHOUT.items() if name in missing)


def add_joining(program: Program, first: int, count: int) -> None:
    """Let a guest enter its cgroup through `count` passed entries from the `first` on, or wait until it was moved."""
    for index in range(first, first + count):
        program.syscall("write", Fd(index), program.blob(b"0"), 1, step="join the cgroup")
    if not count:
        program.syscall("read", Fd(0), program.blob(b"\0"), 1, step="wait for the cgroup")


def admit(cgroup: Cgroup | None, channel: socket.socket, pid: int, count: int) -> None:
    """The host's half of `add_joining`: nothing where the guest joins by itself."""
    if count:
        return
    if cgroup is not None:
        attach(cgroup, pid)
    channel.send(b"\0")


def attach(cgroup: Cgroup, pid: int) -> None:
    """Move a new guest in. One that died already is no error: its channel tells why."""
    try:
        if pid > 0:
            cgroup.attach(pid)
    except ProcessLookupError:
        return


async def remove_soon(cgroup: Cgroup) -> None:
    """Remove a group whose processes are ending, and kill those that are not."""
    for attempt in range(200):
        if cgroup.remove():
            return
        if attempt % 10 == 0:
            cgroup.kill()
        await asyncio.sleep(min(0.002 * (attempt + 1), 0.05))
