"""One running gVisor guest: as the other kinds that are processes of this host, and it can be saved."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from tartarus.guest.channel import GuestChannel
from tartarus.model.errors import GuestFailed, InvalidState, Unsupported
from tartarus.model.sandbox import Resources
from tartarus.runtimes.base import Saved
from tartarus.runtimes.container.storage import used_bytes
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.gvisor import saving
from tartarus.runtimes.gvisor.kernel import Kernel
from tartarus.runtimes.gvisor.launch import SLOWEST_DISK, Launcher
from tartarus.runtimes.gvisor.limits import with_overhead
from tartarus.runtimes.gvisor.ready import Started, forget
from tartarus.runtimes.handle import HostGuest

SAVE_TIMEOUT_S = 60.0


class Home:
    """Where a guest lives: what started it, what it needs to be there again, what keeps its files."""

    def __init__(self, launcher: Launcher, needs: Callable[[], dict[str, str]], trees: saving.Trees | None) -> None:
        self.launcher = launcher
        self.needs = needs
        self.trees = trees


class RunscGuest(HostGuest):
    """A guest whose first process is its runsc, or the kernel of one that it was restored into."""

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
        self._kernel = Kernel(parts.state, parts.name)
        self._moving = asyncio.Lock()
        self._stands = False  # its kernel was told to stop its programs
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
        """Change its cgroup's limits."""
        self._require_cgroup("change the limits of").limit(with_overhead(resources))
        self._resources = resources

    async def pause(self) -> None:
        """Freeze its cgroup; one that was saved to stand still does so already."""
        if not self._stands:
            await super().pause()

    async def resume(self) -> None:
        """Thaw its cgroup; or let it go on that was saved to stand still."""
        async with self._moving:
            if self._stands:
                await self._go_on()
            else:
                await super().resume()

    async def save(self, directory: Path, *, go_on: bool) -> Saved:
        """Write it down. Unless it is to go on, it stands still from then on, until it is resumed or destroyed.

        Its channel must be quiet, and is afterwards. The connections that it has to others end in it. Raises
        InvalidState, Unsupported without groups or while it opens a connection, NoSpace, GuestFailed; it runs then,
        if it still can.
        """
        async with self._moving:
            if not self._home.launcher.shared or self._home.trees is None:
                raise Unsupported(
                    "this sandbox can't be saved",
                    why="where it goes on another runsc must be started first, which takes control groups",
                    fix="run the daemon as root on a host with writable cgroups",
                )
            if self._pidfd < 0 or self._paused or self._stands or self.channel.state is None:
                raise InvalidState("only a running sandbox whose channel is quiet can be saved")
            needs = await asyncio.to_thread(self._home.needs)
            place = await asyncio.to_thread(_opened, directory)
            try:
                return Saved(needs, await self._save(place, self._home.trees, go_on=go_on))
            finally:
                os.close(place)

    async def _save(self, place: int, trees: saving.Trees, *, go_on: bool) -> float:
        """How long it stood still, in milliseconds."""
        used = self.stats()
        saving.check_room(place, used)
        if self._facts.addresses:
            await self._kernel.settle()
        try:
            images = await asyncio.to_thread(saving.open_images, place, new=True)
        except OSError as error:
            raise GuestFailed("the sandbox can't be saved", why=f"{error.filename}: {error.strerror}") from error
        if self._parts.watch is not None:
            self._parts.watch.hurry()
        began = time.perf_counter()
        try:
            await self._kernel.pause()
            self._stands = True
            await self._write(images, place, trees, SAVE_TIMEOUT_S + used.memory_bytes / SLOWEST_DISK)
        except BaseException:
            go_on = True
            raise
        finally:
            close_all(images)
            if go_on:
                await asyncio.shield(self._go_on())
        return (time.perf_counter() - began) * 1000

    async def _write(self, images: list[int], place: int, trees: saving.Trees, limit_s: float) -> None:
        """Write its image, then its files, which its kernel has written back by then."""
        deleted = await asyncio.to_thread(saving.deleted_files, [] if self._cgroup is None else self._cgroup.pids())
        if deleted:
            raise Unsupported(
                "the sandbox can't be saved at this moment",
                why=f"programs in it have deleted files open ({', '.join(deleted)}), which gVisor can't write down",
                fix="try again when they are closed, or use a microVM",
            )
        await self._kernel.save(images, limit_s)
        if not saving.is_whole(images):
            raise GuestFailed("the sandbox can't be saved", why="runsc wrote nothing", fix="tartarus doctor")
        await asyncio.to_thread(
            saving.keep_files,
            trees, self._parts.storage, place, self._resources, self._facts, self._home.launcher.id_map.base,
        )  # fmt: skip

    async def _go_on(self) -> None:
        """Let it run again; one that can't is ended. Raises GuestFailed then."""
        try:
            await self._kernel.resume()
        except GuestFailed:
            self.end_soon()
            raise
        finally:
            self._stands = False

    async def destroy(self) -> None:
        """End it at once."""
        self._look_away()
        await super().destroy()

    def end_soon(self) -> None:
        """Kill its first process; `ended` tells when that is done."""
        self._look_away()
        super().end_soon()

    def _look_away(self) -> None:
        if self._parts.watch is not None:
            self._parts.watch.close()

    async def _clean_up(self) -> None:
        self._look_away()
        async with self._moving:  # a save may be reading its storage
            await super()._clean_up()

    async def _let_go(self) -> None:
        """Close the last hold on its storage: the kernel then frees it, which takes as long as there is much."""
        self._parts.close()
        forget(self._parts.state, self._parts.name)
        await asyncio.to_thread(os.close, self._parts.storage)


def _opened(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


async def _by_group(_pid: int) -> None:
    """There is a group, which was killed."""
