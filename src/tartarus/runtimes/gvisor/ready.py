"""A runsc that has started ahead and holds nothing yet: to restore into it takes half of what a restore alone takes."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import NamedTuple

from tartarus.model.sandbox import Resources
from tartarus.runtimes.base import GuestRequest
from tartarus.runtimes.cgroups import Cgroup, remove_soon
from tartarus.runtimes.gvisor import layout
from tartarus.runtimes.gvisor.log import RunscLog
from tartarus.runtimes.nursery import Clone


class Started(NamedTuple):
    """The parts of a runsc. Whoever gets them owns them.

    `channel`: our end. `world`: its mount namespace, as a descriptor.
    """

    name: str
    born: Clone
    channel: socket.socket
    cgroup: Cgroup | None
    storage: int
    world: int
    log: RunscLog
    steps: list[str]

    def close(self) -> None:
        """Let go of what is only held: not of the storage, nor of the channel, which a loop may be reading."""
        self.log.close()
        if self.world >= 0:
            os.close(self.world)


class ReadyRunsc:
    """One of them. Whoever takes it owns its parts; else `discard` ends it."""

    def __init__(self, parts: Started, cgroup: Cgroup, nursery_pid: int, resources: Resources) -> None:
        self.parts = parts
        self.cgroup = cgroup
        self.name = parts.name
        self._nursery_pid = nursery_pid
        self._resources = resources

    def fits(self, request: GuestRequest) -> bool:
        """Whether it can become that guest; limits of memory and CPU can still be changed."""
        wanted = request.resources
        same = (wanted.disk_bytes, wanted.pids) == (self._resources.disk_bytes, self._resources.pids)
        return same and not request.mounts and request.storage is None

    @property
    def alive(self) -> bool:
        """Whether its processes are there: when the first of them dies, so do the others."""
        return self.cgroup.stats(0).pids > 0

    async def discard(self) -> None:
        """End it."""
        self.parts.close()
        await self.end()
        await asyncio.to_thread(os.close, self.parts.storage)

    async def end(self) -> None:
        """End its processes; what it shares with the guest it was to take over stays."""
        self.parts.channel.close()
        self.parts.log.close()
        self.cgroup.kill()
        await remove_soon(self.cgroup)
        self.forget()

    def forget(self) -> None:
        """Remove what runsc wrote down about it: one that was killed could not do that itself."""
        forget(self._nursery_pid, self.name)


def forget(nursery_pid: int, name: str) -> None:
    """Remove runsc's state of a guest that is gone."""
    state = Path(f"/proc/{nursery_pid}/root{layout.SHARED_STATE}")
    try:
        # name_sandbox:name.lock, name_sandbox:name.state, runsc-name.sock
        for path in (*state.glob(f"{name}_*"), state / f"runsc-{name}.sock"):
            path.unlink(missing_ok=True)
    except OSError:
        return  # the nursery is gone, and its memory with it
