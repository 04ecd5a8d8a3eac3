"""One running gVisor guest: as the other kinds that are processes of this host, and it can move to another runsc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tartarus.guest.channel import GuestChannel, SessionState
from tartarus.model.errors import GuestFailed, InvalidState, TartarusError, Unsupported
from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.base import Saved
from tartarus.runtimes.cgroups import remove_soon
from tartarus.runtimes.container.storage import directory as directory_mount
from tartarus.runtimes.container.storage import used_bytes
from tartarus.runtimes.gvisor import saving
from tartarus.runtimes.gvisor.launch import Launcher
from tartarus.runtimes.gvisor.limits import with_overhead
from tartarus.runtimes.gvisor.ready import ReadyRunsc, Started, forget
from tartarus.runtimes.handle import HostGuest
from tartarus.runtimes.nursery import Nursery

_SAVE_TIMEOUT_S = 60.0
_SLOWEST_DISK = 20 * 1024**2
"""Bytes a second, at least, when a guest is written or read."""
_GONE_TIMEOUT_S = 10.0
_LOOK_S = 0.002
_GONE_LOOKS = 2500


class Home:
    """Where a guest lives: what starts runscs, its nursery, what it needs to be there again, what keeps its files."""

    def __init__(
        self, launcher: Launcher, nursery: Nursery, needs: Callable[[], dict[str, str]], trees: saving.Trees | None
    ) -> None:
        self.launcher = launcher
        self.trees = trees
        self.nursery = nursery
        self.needs = needs


class RunscGuest(HostGuest):
    """A guest whose first process is its runsc, or the one that restored it."""

    can_stop_each = False  # runsc stops and starts its programs' processes itself

    def __init__(
        self,
        parts: Started,
        home: Home,
        resources: Resources,
        *,
        warm: bool,
        changes: Path,
        facts: saving.Facts,
    ) -> None:
        self._parts = parts
        self._home = home
        self._facts = facts
        self._moving = asyncio.Lock()
        self._expected = False  # its first process ends because it is being saved
        self._doomed = False
        self._gone = asyncio.Event()
        self._asleep: Path | None = None  # where it was saved, while no runsc holds it
        self._session: SessionState | None = None  # where its session stands, then
        self._used = Stats()  # what its earlier runscs used
        parts.log.handed_over()
        cgroup = parts.cgroup
        super().__init__(
            parts.born, GuestChannel(parts.channel), cgroup, resources,
            steps=parts.steps, warm=warm, changes=changes,
            disk_bytes=lambda _pid: used_bytes(parts.storage), after_end=self._let_go,
            end_guest=None if cgroup is None else _by_group,
        )  # fmt: skip

    async def ready(self) -> None:
        """Wait until its agent serves. Raises GuestFailed or NoSpace with what runsc said."""
        try:
            await super().ready()
        except GuestFailed as error:
            said = self.said()
            if not said:
                raise
            raise GuestFailed("runsc did not start the sandbox", why=said, fix="tartarus doctor") from error

    def said(self) -> str:
        """The last of what runsc printed, and the guest before its agent began."""
        return self._parts.log.text()

    def limit(self, resources: Resources) -> None:
        """Change its cgroup's limits; of one that is saved, those that it will have."""
        if self._asleep is None:
            self._require_cgroup("change the limits of").limit(with_overhead(resources))
        self._resources = resources

    def stats(self) -> Stats:
        """Use now, what its earlier runscs used included; or what it was at the end."""
        now = super().stats()
        return msgspec.structs.replace(
            now, cpu_usec=now.cpu_usec + self._used.cpu_usec, oom_kills=now.oom_kills + self._used.oom_kills
        )

    async def pause(self) -> None:
        """Freeze its cgroup; one that is saved stands still already."""
        if self._asleep is None:
            await super().pause()

    async def resume(self) -> None:
        """Thaw its cgroup; or restore it from where it was saved, where that was to be its end."""
        async with self._moving:
            if self._asleep is None:
                await super().resume()
                return
            place = await asyncio.to_thread(_opened, self._asleep)
            try:
                await self._go_on(place, None)
            finally:
                os.close(place)

    async def save(self, directory: Path, *, go_on: bool) -> Saved:
        """Write it down. Its runsc ends with that; to go on is to be restored into another one.

        Its channel must be quiet, and is afterwards. Raises InvalidState, Unsupported without groups, NoSpace,
        GuestFailed. When runsc itself can't write it, that has ended the guest.
        """
        async with self._moving:
            if not self._home.launcher.shared or self._home.trees is None:
                raise Unsupported(
                    "this sandbox can't be saved",
                    why="its runsc must be ended and another one started, which takes control groups",
                    fix="run the daemon as root on a host with writable cgroups",
                )
            self._session = self.channel.state
            if self._pidfd < 0 or self._paused or self._session is None:
                raise InvalidState("only a running sandbox whose channel is quiet can be saved")
            needs = await asyncio.to_thread(self._home.needs)
            place = await asyncio.to_thread(_opened, directory)
            try:
                return Saved(needs, await self._save(directory, place, self._home.trees, go_on=go_on))
            finally:
                os.close(place)
                if self._doomed or (self._pidfd < 0 and self._asleep is None):
                    self._end()

    async def _save(self, directory: Path, place: int, trees: saving.Trees, *, go_on: bool) -> float:
        """How long it stood still, in milliseconds."""
        used = self.stats()
        saving.check_room(place, used)
        launcher, nursery = self._home.launcher, self._home.nursery
        heir = await launcher.heir(nursery, self._parts, self._resources) if go_on else None
        try:
            began = time.perf_counter()
            await self._stand()
            await self._leave(directory, place, used)
            try:
                await asyncio.to_thread(
                    saving.keep_files,
                    trees, self._parts.storage, place, self._resources, self._facts, launcher.id_map.base,
                )  # fmt: skip
            except TartarusError:
                go_on = True
                raise
            finally:
                if go_on:
                    heir, given = None, heir
                    await self._go_on(place, given)
        finally:
            if heir is not None:
                await asyncio.shield(heir.end())
        return (time.perf_counter() - began) * 1000

    async def _stand(self) -> None:
        """Stop its processes, and look whether runsc can write them down: to try and fail would end the guest.

        Raises Unsupported or GuestFailed; it runs then.
        """
        launcher, nursery, name = self._home.launcher, self._home.nursery, self._parts.name
        said = await launcher.tell(nursery, ["pause"], name)
        if said:
            raise GuestFailed("the sandbox can't be saved", why=said, fix="tartarus doctor")
        deleted = await asyncio.to_thread(saving.deleted_files, [] if self._cgroup is None else self._cgroup.pids())
        if deleted:
            await asyncio.shield(launcher.tell(nursery, ["resume"], name))
            raise Unsupported(
                "the sandbox can't be saved at this moment",
                why=f"programs in it have deleted files open ({', '.join(deleted)}), which gVisor can't write down",
                fix="try again when they are closed, or use a microVM",
            )

    async def _leave(self, directory: Path, place: int, used: Stats) -> None:
        """Have runsc write it, and see the runsc gone. Raises GuestFailed when it was not written."""
        # What runsc does as it ends would look like the end of the session.
        old = self.channel.unplug()
        self._expected = True
        try:
            said = await self._checkpoint(directory, used)
            # A command that was killed says nothing, either. But let go on, a guest ends only where it was saved.
            by_itself = not said and await self._kernel_gone()
            if not by_itself or self._home.nursery.control.closed.done() or not saving.is_whole(place):
                lost = "; runsc has ended it" if self._gone.is_set() else ""
                raise GuestFailed(f"the sandbox can't be saved{lost}", why=said, fix="tartarus doctor")
            if self._cgroup is not None:
                self._cgroup.kill()
            await asyncio.wait_for(self._gone.wait(), _GONE_TIMEOUT_S)
        except BaseException:
            await asyncio.shield(self._stay(old))
            raise
        finally:
            self._expected = False
        old.close()
        self._used = used
        cgroup, self._cgroup = self._cgroup, None
        self._asleep = directory
        if cgroup is not None:
            await remove_soon(cgroup)
        forget(self._home.nursery.pid, self._parts.name)

    async def _kernel_gone(self) -> bool:
        """Whether its kernel, no longer paused, ends by itself."""
        with contextlib.suppress(GuestFailed):
            await self._home.launcher.tell(self._home.nursery, ["resume"], self._parts.name)
        for _ in range(_GONE_LOOKS):
            if self._cgroup is None or not saving.has_kernel(self._cgroup.pids()):
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    async def _stay(self, old: GuestChannel) -> None:
        """After it was not saved: go on where it was, unless that is no more."""
        with contextlib.suppress(GuestFailed):
            await self._home.launcher.tell(self._home.nursery, ["resume"], self._parts.name)
            await self._plug(old)

    async def _checkpoint(self, directory: Path, used: Stats) -> str:
        target = await asyncio.to_thread(directory_mount, directory)
        try:
            launcher, nursery = self._home.launcher, self._home.nursery
            return await launcher.checkpoint(nursery, self._parts.name, target, _limit_s(used), self._gone.wait())
        finally:
            os.close(target)

    async def _go_on(self, place: int, heir: ReadyRunsc | None) -> None:
        """Restore it into another runsc. Raises GuestFailed or NoSpace; it is asleep then, as before."""
        launcher, nursery = self._home.launcher, self._home.nursery
        if heir is None:
            heir = await launcher.heir(nursery, self._parts, self._resources)
        images: list[int] = []
        try:
            if self._doomed:
                raise GuestFailed("the sandbox was ended meanwhile")
            images = await asyncio.to_thread(saving.images_in, place)
            parts = await launcher.restore(nursery, heir, images)
            await self._plug(GuestChannel(parts.channel))
        except BaseException as error:
            said = heir.parts.log.text()
            await asyncio.shield(heir.end())
            if isinstance(error, GuestFailed) and said:
                raise GuestFailed(error.what, why=said, fix=error.fix) from error
            raise
        finally:
            for fd in images:
                os.close(fd)
        self._asleep = None
        self._gone.clear()
        self._parts.log.close()
        self._parts = parts
        parts.log.handed_over()
        self._adopt(parts.born, heir.cgroup, parts.steps)

    async def _plug(self, fresh: GuestChannel) -> None:
        """Go on with the session, which stays quiet, over another channel. Raises GuestFailed."""
        try:
            await fresh.open(self._session)
            async with asyncio.timeout(_limit_s(self.stats())):
                await fresh.ready()
            self.channel.plug(fresh)
        except BaseException as error:
            fresh.close()
            if isinstance(error, TimeoutError):
                raise GuestFailed("the restored sandbox does not answer") from None
            raise

    async def destroy(self) -> None:
        """End it at once, wherever it is."""
        self._doomed = True
        if not self._moving.locked() and self._pidfd < 0:
            self._end()
        await super().destroy()

    def end_soon(self) -> None:
        """Kill its first process; of one that has none, let go of what it holds."""
        if self._pidfd < 0 and not self._moving.locked():
            self._end()
        super().end_soon()

    def _first_process_gone(self) -> None:
        self._gone.set()
        if not self._expected:
            self._end()

    def _end(self) -> None:
        if self._cleanup is None:
            self._cleanup = self._loop.create_task(self._clean_up())

    async def _clean_up(self) -> None:
        async with self._moving:  # a save may be reading its storage
            await super()._clean_up()

    async def _let_go(self) -> None:
        """Close the last hold on its storage: the kernel then frees it, which takes as long as there is much."""
        self._parts.close()
        forget(self._home.nursery.pid, self._parts.name)
        await asyncio.to_thread(os.close, self._parts.storage)


def _opened(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _limit_s(used: Stats) -> float:
    return _SAVE_TIMEOUT_S + used.memory_bytes / _SLOWEST_DISK


async def _by_group(_pid: int) -> None:
    """There is a group, which was killed."""
