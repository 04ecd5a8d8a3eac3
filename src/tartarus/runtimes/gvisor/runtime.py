"""The gVisor level's `Runtime`: each guest is a runsc of its own, started or restored below its template's nursery."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from tartarus.guest.binary import agent_binary
from tartarus.guest.protocol import fixup_payload
from tartarus.model.errors import GuestFailed, IsolationUnavailable, TemplateFailed, Unsupported
from tartarus.model.sandbox import Isolation
from tartarus.runtimes.base import GUEST_PREFIX, Capabilities, Guest, GuestRequest, Places, RootFs, Snapshot
from tartarus.runtimes.cgroups import Cgroup, Hierarchy, lacking, remove_soon, weaker_limits
from tartarus.runtimes.container.layout import CLONE_NEWNS, unshare_program
from tartarus.runtimes.container.storage import UPPER
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.gvisor import layout, saving, spec
from tartarus.runtimes.gvisor.guest import SAVE_TIMEOUT_S, Home, RunscGuest
from tartarus.runtimes.gvisor.kernel import Kernel
from tartarus.runtimes.gvisor.launch import Launcher
from tartarus.runtimes.gvisor.limits import with_overhead
from tartarus.runtimes.gvisor.platforms import Platforms, Wanted
from tartarus.runtimes.gvisor.ready import ReadyRunsc, Started
from tartarus.runtimes.gvisor.snapshot import GvisorSnapshot
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.nursery import WARM_UP_TIMEOUT_S, Nursery, exhausted_or_failed, warm_command

IMAGE_BYTES = 4 * 1024**3
_WARM_NAME = "sandbox"


class GvisorRuntime:
    """Makes gVisor guests, as root. Guests' ids are mapped to ids nobody on the host has."""

    isolation = Isolation.GVISOR
    best = Capabilities(
        warm_start=True, pause=True, own_network=True, own_pids=True, mounts=True,
        memory_limit="cgroup (runsc included)", cpu_limit="cgroup", pids_limit="its own kernel (rlimit)",
        disk_limit="tmpfs", keeps_files=True, saves_memory=True,
    )  # fmt: skip

    def __init__(
        self,
        state_dir: Path,
        hierarchy: Hierarchy | None,
        id_map: IdMap,
        trees: saving.Trees | None = None,
        *,
        platform: Wanted = "systrap",
    ) -> None:
        found = shutil.which("runsc")
        if found is None:
            raise IsolationUnavailable(
                "the gvisor level needs runsc",
                why="it is not installed",
                fix="install runsc from Debian 13 or gvisor.dev",
            )
        if not id_map.privileged:
            raise IsolationUnavailable("the gvisor level needs root", fix="run the daemon as root")
        self._runsc = Path(found).resolve()
        self._stage = state_dir / "gvisor"
        self._stage.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._platforms = Platforms(platform)
        self._launcher = Launcher(hierarchy, id_map, self._platforms)
        self._id_map = id_map
        self._trees = trees
        self._lacking = lacking(hierarchy)
        self._snapshots: set[GvisorSnapshot] = set()

    def capabilities(self) -> Capabilities:
        """What this host gives the level."""
        return msgspec.structs.replace(
            self.best,
            pause=self._launcher.shared and "freezer" not in self._lacking,
            memory_limit="none" if "memory" in self._lacking else self.best.memory_limit,
            cpu_limit="none" if "cpu" in self._lacking else "cgroup",
            saves_memory=self._launcher.shared and self._trees is not None,
            missing=weaker_limits(self._lacking - {"pids"}),
            how=str(self._platforms),
        )

    def places(self, rootfs: RootFs, guest_id: str) -> Places:  # noqa: ARG002 - each guest has a root of its own
        """As the template's files say."""
        return Places(home=rootfs.template.user.home, workdir=rootfs.template.workdir, prefix=GUEST_PREFIX)

    async def snapshot(self, rootfs: RootFs) -> Snapshot:
        """Start a template's nursery."""
        nursery = await Nursery.spawn(f"template {rootfs.template.id}", shared_pids=False)
        cgroup: Cgroup | None = None
        try:
            cgroup = self._launcher.group(self._launcher.new_name(f"nursery-{rootfs.template.id}-gvisor"), None)
            if cgroup is not None:
                cgroup.attach(nursery.pid)
            await nursery.run(unshare_program(CLONE_NEWNS))
            await nursery.run(
                layout.stage_program(
                    self._stage,
                    rootfs,
                    self._runsc,
                    agent_binary(),
                    image_bytes=IMAGE_BYTES,
                    owner=self._id_map.base,
                    kvm=self._platforms.may_be_kvm,
                )
            )
            await nursery.run(unshare_program(layout.NURSERY_FLAGS))
            await nursery.fork()
            await nursery.run(layout.proc_program())
        except BaseException as error:
            nursery.close()
            await asyncio.shield(nursery.gone())
            if cgroup is not None:
                await remove_soon(cgroup)
            if isinstance(error, GuestFailed):
                raise IsolationUnavailable(error.what, why=error.why, fix=error.fix) from error
            raise
        snapshot = GvisorSnapshot(self, rootfs, nursery, cgroup)
        self._snapshots.add(snapshot)
        nursery.control.closed.add_done_callback(lambda _: self._snapshots.discard(snapshot))
        try:
            await self._platforms.settle(lambda: self._start_one(snapshot))
        except BaseException:
            await asyncio.shield(snapshot.close())
            raise
        return snapshot

    async def _start_one(self, snapshot: GvisorSnapshot) -> None:
        request = GuestRequest(self._launcher.new_name("probe"), "probe", snapshot.rootfs.template.resources)
        guest = await self.clone(snapshot, request, warm=False)
        try:
            await guest.ready()
        finally:
            await asyncio.shield(guest.destroy())

    async def make_image(self, snapshot: GvisorSnapshot) -> None:
        """Warm a guest up and save it. Raises TemplateFailed with what it printed."""
        argv, env = warm_command(snapshot.rootfs.template)
        if not argv:
            raise TemplateFailed(f"{snapshot.nursery.what} has no warm-up")
        snapshot.cool()
        argv[2:4] = ["resident", "--channel=0", f"--agent={spec.AGENT}"]
        name = self._launcher.new_name("warm")
        request = GuestRequest(name, _WARM_NAME, snapshot.rootfs.template.resources)
        parts = await self._launcher.start(snapshot.nursery, snapshot.rootfs, request, ["run"], argv, env, shared=True)
        guest = await self._guest(snapshot, parts, request, warm=True)
        try:
            await _warmed(guest, snapshot.nursery.what)
            try:
                await _write_image(parts, snapshot.image_directory)
            except (GuestFailed, OSError) as error:
                snapshot.cool()
                raise TemplateFailed(f"{snapshot.nursery.what} can't be saved", why=str(error)) from error
        finally:
            await guest.destroy()

    async def make_ready(self, snapshot: GvisorSnapshot) -> ReadyRunsc | None:
        """Start a runsc for a guest to come; nothing where there is no cgroup to end it by."""
        if not self._launcher.shared:
            return None
        request = GuestRequest(self._launcher.new_name("ready"), _WARM_NAME, snapshot.rootfs.template.resources)
        return await self._launcher.ahead(snapshot.nursery, snapshot.rootfs, request)

    async def clone(self, snapshot: Snapshot, request: GuestRequest, *, warm: bool) -> Guest:
        """Start a guest, or restore the warm one: that came with the template's own process limit, which stays."""
        assert isinstance(snapshot, GvisorSnapshot)
        # A warm one was saved without links; those of one that is started ahead are handed to it.
        warm = (
            warm
            and (request.network is None or self._launcher.shared)
            and snapshot.is_warm
            and request.resources.pids == snapshot.rootfs.template.resources.pids
        )
        if request.build:
            raise Unsupported("templates are not built at the gvisor level", fix="build at the container level")
        if not warm:
            shared = self._launcher.shared
            parts = await self._launcher.start(snapshot.nursery, snapshot.rootfs, request, ["run"], shared=shared)
        elif self._launcher.shared:
            ready = snapshot.take_ready(request) or await self._launcher.ahead(
                snapshot.nursery, snapshot.rootfs, request
            )
            parts = await self._into(ready, request, lambda: saving.open_images(snapshot.image_directory))
        else:
            how = ["restore", f"--image-path={layout.IMAGES}"]
            parts = await self._launcher.start(snapshot.nursery, snapshot.rootfs, request, how, shared=False)
        return await self._guest(snapshot, parts, request, warm=warm, hostname=_WARM_NAME if warm else "")

    async def _into(self, ready: ReadyRunsc, request: GuestRequest, open_images: Callable[[], list[int]]) -> Started:
        """Restore an image into a runsc that was started ahead, with these limits. Raises GuestFailed or NoSpace."""
        try:
            ready.cgroup.limit(with_overhead(request.resources))
            images = open_images()
            try:
                return await self._launcher.restore(ready, images)
            finally:
                close_all(images)
        except BaseException as error:
            await asyncio.shield(ready.discard())
            if isinstance(error, OSError):
                raise exhausted_or_failed("the guest can't be set up", error.errno or 0) from error
            raise

    async def _guest(
        self,
        snapshot: GvisorSnapshot,
        parts: Started,
        request: GuestRequest,
        *,
        warm: bool,
        hostname: str = "",
        before: tuple[str, ...] = (),
    ) -> RunscGuest:
        """The guest. `hostname`: what a restored one believes to be called. `before`: the addresses it had so far."""
        home = Home(self._launcher, lambda: self.needs(snapshot), self._trees)
        targets = tuple(mount.target for mount in request.mounts)
        guest = RunscGuest(
            parts, home, request.resources,
            warm=warm, changes=_upper(parts.storage, request.storage),
            facts=saving.Facts(request.resources.pids, targets, request.hostname,
                               saving.with_addresses(before, request.network)),
        )  # fmt: skip
        snapshot.hold(guest)
        await guest.channel.open(request.session)
        gone = saving.others(before, request.network)
        if gone or hostname not in {"", request.hostname}:
            # What it is asked from now on finds the right name, and only its own address.
            try:
                await guest.ready()
                await Kernel(parts.state, parts.name).rename(request.hostname, gone)
            except BaseException:
                await asyncio.shield(guest.destroy())
                raise
        return guest

    def needs(self, snapshot: Snapshot) -> dict[str, str]:
        """The runsc and its platform, the processor, the agent, the template."""
        return saving.needs_of(snapshot.rootfs, self._runsc, self._platforms.name)

    async def restore(self, snapshot: Snapshot, saved: Path, request: GuestRequest) -> Guest:
        """A guest that goes on where one was saved. Raises Unsupported, ImageRefused, GuestFailed or NoSpace."""
        assert isinstance(snapshot, GvisorSnapshot)
        if not self._launcher.shared or self._trees is None:
            raise Unsupported("saved sandboxes can't go on here", why="that takes control groups", fix="run as root")
        kept = await asyncio.to_thread(saving.SavedGuest, saved)
        try:
            kept.check(request)
            # One that waits has its root mounted: what was written would have to be there before.
            ready = None if kept.facts.files else snapshot.take_ready(request)
            if ready is None:
                ready = await self._ahead_with_files(snapshot, kept, request)
            parts = await self._into(ready, request, kept.take_images)
        finally:
            kept.close()
        guest = await self._guest(snapshot, parts, request, warm=True, hostname=kept.facts.hostname,
                                  before=kept.facts.addresses)  # fmt: skip
        if kept.facts.hostname != request.hostname:
            await guest.channel.renew(fixup_payload(0, b"", "", secrets.token_hex(16)))
        return guest

    async def _ahead_with_files(
        self, snapshot: GvisorSnapshot, kept: saving.SavedGuest, request: GuestRequest
    ) -> ReadyRunsc:
        assert self._trees is not None  # as asked before
        storage = self._launcher.storage_for(request)
        try:
            await kept.write_files(self._trees, storage, self._id_map, request.resources)
        except BaseException:
            os.close(storage)
            raise
        before = saving.others(kept.facts.addresses, request.network)
        return await self._launcher.ahead(snapshot.nursery, snapshot.rootfs, request, storage, before)

    async def close(self) -> None:
        """End every nursery."""
        for snapshot in list(self._snapshots):
            await snapshot.close()
        self._snapshots.clear()
        self._launcher.close()


def _upper(storage: int, on_disk: Path | None) -> Path:
    return on_disk / UPPER if on_disk is not None else Path(f"/proc/{os.getpid()}/fd/{storage}") / UPPER


async def _write_image(parts: Started, directory: str) -> None:
    images = saving.open_images(directory, new=True)
    try:
        await Kernel(parts.state, parts.name).save(images, SAVE_TIMEOUT_S)
        if not saving.is_whole(images):
            raise GuestFailed("runsc wrote nothing")
    finally:
        close_all(images)


async def _warmed(guest: RunscGuest, what: str) -> None:
    try:
        await asyncio.wait_for(guest.ready(), WARM_UP_TIMEOUT_S)
    except TimeoutError:
        raise TemplateFailed(
            f"warming {what} took more than {WARM_UP_TIMEOUT_S:g} s", fix="make the warm-up shorter"
        ) from None
    except GuestFailed as error:
        raise TemplateFailed(f"warming {what} failed", why=guest.said() or error.why) from error
