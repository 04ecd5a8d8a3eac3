"""One running guest of the kinds that are processes of this host: container and process level."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from tartarus.guest.channel import BootFailed, GuestChannel
from tartarus.model.errors import GuestFailed, Unsupported
from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.nursery import Clone, step_failed
from tartarus.runtimes.stopping import StoppedTree
from tartarus.runtimes.unsaved import UnsavableGuest

_REMOVE_ATTEMPTS = 200


class HostGuest(UnsavableGuest):
    """Holds a guest's first process (by pidfd), its channel and its cgroup; gives all back when it ends."""

    can_stop_each = True
    """Whether its processes are this host's, all below its first one, and bear to be stopped one by one."""

    def __init__(
        self,
        clone: Clone,
        channel: GuestChannel,
        cgroup: Cgroup | None,
        resources: Resources,
        *,
        steps: Sequence[str],
        warm: bool,
        disk_bytes: Callable[[int], int],
        end_guest: Callable[[int], Awaitable[None]] | None = None,
        after_end: Callable[[], Awaitable[None]] | None = None,
        changes: Path | None = None,
    ) -> None:
        self._changes = changes
        self.channel = channel
        self.pid = clone.pid
        self.warm = warm
        self._steps = steps
        self._disk_bytes = disk_bytes
        self._pidfd = clone.pidfd
        self._cgroup = cgroup
        self._resources = resources
        self._end_guest = end_guest
        self._after_end = after_end
        self._paused = False
        self._stopped: StoppedTree | None = None
        self._final_stats: Stats | None = None
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_pidfd)
        self._cleanup: asyncio.Task[None] | None = None

    @property
    def pidfd(self) -> int:
        """Its first process; -1 when that is gone."""
        return self._pidfd

    @property
    def group(self) -> Cgroup | None:
        """Its cgroup."""
        return self._cgroup

    async def ready(self) -> None:
        """Wait until its agent serves. Raises GuestFailed or NoSpace naming the step that failed."""
        try:
            await self.channel.ready()
        except BootFailed as error:
            raise step_failed("starting the sandbox", self._steps, error.step, error.errno) from None

    async def pause(self) -> None:
        """Freeze its cgroup; without one, stop its processes one by one. Raises GuestFailed when they are too quick."""
        if (self._cgroup is not None and self._cgroup.can_freeze) or not self.can_stop_each:
            self._freeze(self._require_cgroup("pause"), True)
        elif self._stopped is None and self._pidfd >= 0:
            stopped = self._stopped = StoppedTree(self.pid)
            try:
                await asyncio.to_thread(stopped.stop)
            except BaseException:
                self._let_stopped_go()
                raise
        self._paused = True

    async def resume(self) -> None:
        """Thaw its cgroup, or let its processes go on."""
        if self._cgroup is not None and self._cgroup.can_freeze:
            self._freeze(self._cgroup, False)
        self._let_stopped_go()
        self._paused = False

    def changes(self) -> Path | None:
        """Its overlay's upper directory, as the host finds it."""
        # Not by `ended`: its storage is let go of before that, and the descriptor's number is then another guest's.
        return None if self._pidfd < 0 else self._changes

    def limit(self, resources: Resources) -> None:
        """Change its cgroup's limits; what its boot program set (disk, limits of each process) stays."""
        self._require_cgroup("change the limits of").limit(resources)
        self._resources = resources

    def stats(self) -> Stats:
        """Use now, or what it was at the end."""
        if self._final_stats is not None:
            return self._final_stats
        limit = self._resources.memory_bytes
        used = Stats(memory_limit_bytes=limit) if self._cgroup is None else self._cgroup.stats(limit)
        return msgspec.structs.replace(used, disk_bytes=self._disk_bytes(self.pid))

    async def destroy(self) -> None:
        """End it: the kernel kills all of a pid namespace with its first process.

        Without one, its cgroup's processes are killed, and where there is no cgroup either, the nursery kills
        all that descends from its first process.
        """
        if self._end_guest is not None and not self.ended.done():
            if self._cgroup is not None:
                self._cgroup.kill()
            elif self._pidfd >= 0:
                with contextlib.suppress(GuestFailed):  # a nursery that is dead or stuck: the agent has to do
                    await self._end_guest(self.pid)
        if not self.ended.done():
            self.end_soon()
        await asyncio.shield(self.ended)

    def end_soon(self) -> None:
        """Kill its first process, paused or not; `ended` tells when that is done."""
        if self._pidfd < 0:
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        if self._paused and self._cgroup is not None:
            # cgroup v1 delivers no signal to a frozen process, not even SIGKILL.
            with contextlib.suppress(GuestFailed, OSError):
                self._cgroup.freeze(False)

    @staticmethod
    def _freeze(cgroup: Cgroup, frozen: bool) -> None:
        try:
            cgroup.freeze(frozen)
        except OSError as error:
            raise GuestFailed("the sandbox has just ended", why=error.strerror or str(error)) from error

    def _let_stopped_go(self) -> None:
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            stopped.go_on()

    def _require_cgroup(self, doing: str) -> Cgroup:
        if self._cgroup is None:
            raise Unsupported(
                f"can't {doing} this sandbox",
                why="this host lets the daemon make no cgroup",
                fix="run the daemon as root",
            )
        return self._cgroup

    def _on_pidfd(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._first_process_gone()

    def _first_process_gone(self) -> None:
        """What follows from it: for most guests it is their end."""
        self._cleanup = self._loop.create_task(self._clean_up())

    def _adopt(self, clone: Clone, cgroup: Cgroup, steps: Sequence[str]) -> None:
        """Go on with another first process and group."""
        self.pid = clone.pid
        self._steps = steps
        self._cgroup = cgroup
        self._pidfd = clone.pidfd
        self._loop.add_reader(self._pidfd, self._on_pidfd)

    async def _clean_up(self) -> None:
        if self._stopped is not None:
            self._stopped.kill()
        try:
            oom_kills = 0 if self._cgroup is None else self._cgroup.oom_kills()
            refused = 0 if self._cgroup is None else self._cgroup.refused_forks()
            self._final_stats = Stats(
                memory_limit_bytes=self._resources.memory_bytes, oom_kills=oom_kills, refused_forks=refused
            )
            if self._cgroup is not None:
                await self._remove(self._cgroup)
        finally:
            try:
                if self._after_end is not None:
                    await self._after_end()
            finally:
                self.channel.close()
                if not self.ended.done():
                    self.ended.set_result(None)

    async def _remove(self, cgroup: Cgroup) -> None:
        for attempt in range(_REMOVE_ATTEMPTS):
            if cgroup.remove():
                return
            cgroup.kill()
            await asyncio.sleep(0.0005 * min(attempt + 1, 20))
        raise GuestFailed("a sandbox's cgroup can't be removed", why="a process in it does not end")
