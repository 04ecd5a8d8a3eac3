"""One sandbox that is a virtual machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from pathlib import Path

import msgspec

from tartarus.guest.channel import BootFailed, GuestChannel
from tartarus.guest.protocol import FixedUp, fixup_payload
from tartarus.model.errors import GuestFailed
from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.cgroups import Cgroup, remove_soon
from tartarus.runtimes.microvm.driver import Machine
from tartarus.runtimes.unsaved import UnsavableGuest

MONITOR_BYTES = 160 * 1024 * 1024
"""Memory that a monitor may need beside its machine's: QEMU's own (26 MB measured) and 64 MB of translated code."""
MONITOR_TASKS = 64
_ENTROPY = 64


class MachineGuest(UnsavableGuest):
    """Holds a machine, its channel, its cgroup and its scratch disk; gives all back when it ends."""

    warm = False

    def __init__(
        self, machine: Machine, cgroup: Cgroup | None, resources: Resources, scratch: int, hostname: str
    ) -> None:
        self.pid = machine.pid
        self.channel = GuestChannel(machine.channel)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._machine = machine
        self._cgroup = cgroup
        self._resources = resources
        self._scratch = scratch
        self._hostname = hostname
        self._final: Stats | None = None
        self._renewed: asyncio.Task[None] | None = None
        self._cleanup = asyncio.create_task(self._clean_up())

    @property
    def pidfd(self) -> int:
        """Its monitor; -1 when that is gone."""
        return self._machine.pidfd

    async def open(self) -> None:
        """Greet its agent, and make it another machine than the one it was cloned from before it does anything."""
        await self.channel.open()
        self._renewed = asyncio.create_task(self._renew())

    async def ready(self) -> None:
        """Wait until its agent serves, with a clock, randomness and names of its own."""
        try:
            await self.channel.ready()
        except BootFailed as error:
            raise GuestFailed("the machine can't be started", why=error.why) from None
        if self._renewed is not None:
            await asyncio.shield(self._renewed)

    async def _renew(self) -> None:
        # Sent with the greeting: the agent takes frames in order, so no command runs before this.
        done = await self.channel.renew(renewal(self._hostname))
        if not (done & FixedUp.CLOCK and done & FixedUp.RESEEDED):
            raise GuestFailed("a cloned machine can't be told apart from others", why="its kernel was not reseeded")

    async def pause(self) -> None:
        """Stop its processors."""
        await self._machine.pause()

    async def resume(self) -> None:
        """Let them run."""
        await self._machine.resume()

    def limit(self, resources: Resources) -> None:
        """Change its cgroup's limits; its memory and processors stay those of its machine."""
        if self._cgroup is not None:
            self._cgroup.limit(with_monitor(resources, self._resources.memory_bytes))
        self._resources = msgspec.structs.replace(resources, memory_bytes=self._resources.memory_bytes)

    def stats(self) -> Stats:
        """Use now, the monitor's included; tasks are the monitor's."""
        if self._final is not None:
            return self._final
        limit = self._resources.memory_bytes
        used = Stats(memory_limit_bytes=limit) if self._cgroup is None else self._cgroup.stats(limit)
        return msgspec.structs.replace(used, disk_bytes=os.fstat(self._scratch).st_blocks * 512)

    def changes(self) -> Path | None:
        """None: what it wrote lies in a file system that the host does not mount."""
        return None

    async def console(self) -> str:
        """The end of what its kernel said."""
        return await self._machine.console()

    async def destroy(self) -> None:
        """End its monitor."""
        self._machine.kill()
        await asyncio.shield(self.ended)

    def end_soon(self) -> None:
        """End its monitor without waiting."""
        self._machine.kill()

    async def _clean_up(self) -> None:
        await self._machine.ended
        try:
            if self._renewed is not None:
                self._renewed.cancel()
            self._final = msgspec.structs.replace(self.stats(), memory_bytes=0, pids=0)
            if self._cgroup is not None:
                await remove_soon(self._cgroup)
        finally:
            os.close(self._scratch)
            self.channel.close()
            if not self.ended.done():
                self.ended.set_result(None)


def renewal(hostname: str) -> bytes:
    """What makes a machine another one than those it shares its memory with: time, randomness, names."""
    return fixup_payload(time.time_ns(), secrets.token_bytes(_ENTROPY), hostname, secrets.token_hex(16))


def with_monitor(resources: Resources, memory_bytes: int) -> Resources:
    """A machine's limits as its cgroup's: the monitor's own memory and threads come on top."""
    return msgspec.structs.replace(resources, memory_bytes=memory_bytes + MONITOR_BYTES, pids=MONITOR_TASKS)
