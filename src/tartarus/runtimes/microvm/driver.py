"""What every virtual machine monitor offers this level: `Driver` starts machines, `Machine` is one of them."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

import msgspec

from tartarus.runtimes.cgroups import Cgroup

BOOT_TIMEOUT_S = 60.0
"""How long a kernel may take to reach its agent without hardware virtualisation on a busy host; 4 s is usual."""


class Hardware(msgspec.Struct, frozen=True):
    """What a machine is made of. A saved one can only go on in hardware that is equal. `network`: it has a card."""

    memory_bytes: int
    cpus: int
    network: bool = False


class Boot(msgspec.Struct, frozen=True):
    """What a machine starts from: descriptors of memory files that a monitor of another user may open.

    `words`: what its kernel's command line has besides the monitor's own.
    """

    kernel: int
    initramfs: int
    words: str = ""


class Parts(msgspec.Struct, frozen=True):
    """Descriptors that a machine is made from; they stay the caller's.

    `binds`: read-only disks beside the root's (`bind_serial`). `boot`: what only a machine that boots needs.
    `share`: its memory is to be saved later. `tap`: where its network card leads, if its hardware has one.
    """

    hardware: Hardware
    memory: int
    root: int
    scratch: int
    binds: tuple[int, ...] = ()
    boot: Boot | None = None
    share: bool = False
    tap: int | None = None


def bind_serial(index: int) -> str:
    """The serial number by which a machine finds the n-th of its read-only disks."""
    return f"tartarus-bind-{index}"


def disks(parts: Parts) -> dict[str, int]:
    """The disks by the names that the drivers give them, in the order in which the machine finds them."""
    return {"root": parts.root, "scratch": parts.scratch, **{f"bind{n}": fd for n, fd in enumerate(parts.binds)}}


def serials(parts: Parts) -> list[str]:
    """The disks' serial numbers, in the same order."""
    return ["tartarus-root", "tartarus-scratch", *(bind_serial(index) for index in range(len(parts.binds)))]


async def end(machine: Machine) -> None:
    """End a machine that did not come to be."""
    machine.kill()
    await asyncio.shield(machine.ended)
    machine.channel.close()


class Machine(Protocol):
    """A running machine. When its monitor is gone, `pidfd` is -1 and `ended` completes."""

    pid: int
    pidfd: int
    channel: socket.socket
    ended: asyncio.Future[None]

    async def pause(self) -> None:
        """Stop its processors."""
        ...

    async def resume(self) -> None:
        """Let them run."""
        ...

    async def save(self, device_state: int) -> None:
        """Stop it for good and write all but its memory and disks to a descriptor. Needs `share` memory."""
        ...

    async def save_devices(self, device_state: int) -> None:
        """Write its devices' state to a descriptor that is open for writing only; it is paused, and may go on."""
        ...

    async def console(self) -> str:
        """The end of what its kernel said."""
        ...

    def kill(self) -> None:
        """End the monitor at once; safe to repeat."""
        ...


class Driver(Protocol):
    """One kind of monitor.

    `modules`: what its machines load, of `kernel.WANTED`. `command_line`: what all its kernels are told.
    `loads_packed_kernels`: a bzImage need not be unpacked. `stands_ready`: a machine may be restored long before it
    goes on. `maps_files`: its memory may be a file on disk. `takes_tap`: its machines may have a network card.
    """

    name: str
    modules: tuple[str, ...]
    command_line: str
    loads_packed_kernels: bool
    stands_ready: bool
    maps_files: bool
    takes_tap: bool

    async def version(self) -> str:
        """Its name and version. Raises IsolationUnavailable where it is missing."""
        ...

    async def boot(self, parts: Parts, cgroup: Cgroup | None) -> Machine:
        """Start a machine from its kernel."""
        ...

    async def restore(
        self, parts: Parts, device_state: int, cgroup: Cgroup | None, filled: asyncio.Task[None] | None = None
    ) -> Machine:
        """Start a machine where another was saved, stopped until `resume`.

        `filled`: done when the memory is there, which a monitor that only starts need not wait for.
        """
        ...
