"""A runsc that has started ahead and holds nothing yet: to restore into it takes half of what a restore alone takes."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from pathlib import Path
from typing import NamedTuple

from tartarus.model.sandbox import Resources
from tartarus.runtimes.base import GuestRequest
from tartarus.runtimes.cgroups import Cgroup, remove_soon
from tartarus.runtimes.gvisor.log import RunscLog
from tartarus.runtimes.gvisor.watch import Watch
from tartarus.runtimes.nursery import Clone


class Started(NamedTuple):
    """The parts of a runsc. Whoever gets them owns them.

    `state`: where its runsc keeps its socket, as this process finds it. `channel`: our end. `watch`: none without a
    group.
    """

    name: str
    state: str
    born: Clone
    channel: socket.socket
    cgroup: Cgroup | None
    storage: int
    log: RunscLog
    watch: Watch | None
    steps: list[str]

    def close(self) -> None:
        """Let go of what is only held: not of the storage, nor of the channel, which a loop may be reading."""
        self.log.close()
        if self.watch is not None:
            self.watch.close()


class ReadyRunsc:
    """One of them. Whoever takes it owns its parts; else `discard` ends it."""

    def __init__(self, parts: Started, cgroup: Cgroup, resources: Resources) -> None:
        self.parts = parts
        self.cgroup = cgroup
        self._resources = resources

    def fits(self, request: GuestRequest) -> bool:
        """Whether it can become that guest; limits of memory and CPU can still be changed."""
        wanted = request.resources
        same = (wanted.disk_bytes, wanted.pids) == (self._resources.disk_bytes, self._resources.pids)
        return same and not request.mounts and request.storage is None and request.network is None

    @property
    def alive(self) -> bool:
        """Whether its kernel is there."""
        return not select.select([self.parts.born.pidfd], [], [], 0)[0]

    async def discard(self) -> None:
        """End it."""
        self.parts.close()
        self.parts.channel.close()
        os.close(self.parts.born.pidfd)
        self.cgroup.kill()
        await remove_soon(self.cgroup)
        forget(self.parts.state, self.parts.name)
        await asyncio.to_thread(os.close, self.parts.storage)


def forget(state: str, name: str) -> None:
    """Remove runsc's state of a guest that is gone, which one that was killed could not do itself."""
    directory = Path(state)
    try:
        # name_sandbox:name.lock, name_sandbox:name.state, runsc-name.sock
        for path in (*directory.glob(f"{name}_*"), directory / f"runsc-{name}.sock"):
            path.unlink(missing_ok=True)
    except OSError:
        return  # the nursery is gone, and its memory with it
