"""The gVisor level's `Runtime`: each guest is a runsc of its own, started or restored below its template's nursery."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tartarus.guest.binary import agent_binary
from tartarus.guest.channel import GuestChannel, channel_pair
from tartarus.model.errors import GuestFailed, IsolationUnavailable, TemplateFailed, Unsupported
from tartarus.model.sandbox import Isolation, Mount, Resources
from tartarus.runtimes.base import GUEST_PREFIX, Capabilities, Guest, GuestRequest, Places, RootFs, Snapshot
from tartarus.runtimes.cgroups import Cgroup, Hierarchy, lacking, remove_soon, weaker_limits
from tartarus.runtimes.container import mounts
from tartarus.runtimes.container.layout import CLONE_NEWNS, unshare_program
from tartarus.runtimes.container.storage import UPPER, directory, inodes_for, tmpfs
from tartarus.runtimes.gvisor import layout, spec
from tartarus.runtimes.gvisor.guest import RunscGuest, RunscLog
from tartarus.runtimes.gvisor.limits import with_overhead
from tartarus.runtimes.gvisor.ready import ReadyRunsc, forget
from tartarus.runtimes.gvisor.snapshot import GvisorSnapshot
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.nursery import (
    WARM_UP_TIMEOUT_S,
    Clone,
    Nursery,
    exhausted_or_failed,
    warm_command,
)
from tartarus.runtimes.unsaved import UnsavableRuntime

IMAGE_BYTES = 4 * 1024**3
CHECKPOINT_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 20.0
_CONTAINER = "guest"
_COMMON = ("/runsc", "--ignore-cgroups", "--network=none", "--overlay2=none", "--file-access=exclusive")


class Started(NamedTuple):
    """The parts of a runsc that was just started."""

    born: Clone
    channel: socket.socket
    cgroup: Cgroup | None
    storage: int
    log: RunscLog
    steps: list[str]


class GvisorRuntime(UnsavableRuntime):
    """Makes gVisor guests, as root. Guests' ids are mapped to ids nobody on the host has."""

    isolation = Isolation.GVISOR

    def __init__(
        self, state_dir: Path, hierarchy: Hierarchy | None, id_map: IdMap, *, platform: str = "systrap"
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
        self._hierarchy = hierarchy
        self._id_map = id_map
        self._command = (*_COMMON, f"--platform={platform}")
        self._lacking = lacking(hierarchy)
        self._n_entries = hierarchy.n_entries if hierarchy is not None else 0
        self._snapshots: set[GvisorSnapshot] = set()
        self._count = 0
        self._mount_namespace = -1

    def capabilities(self) -> Capabilities:
        """What this host gives the level."""
        return Capabilities(
            warm_start=True,
            pause=self._hierarchy is not None and "freezer" not in self._lacking,
            own_network=True,
            own_pids=True,
            mounts=True,
            memory_limit="none" if "memory" in self._lacking else "cgroup (runsc included)",
            cpu_limit="none" if "cpu" in self._lacking else "cgroup",
            pids_limit="its own kernel (rlimit)",
            disk_limit="tmpfs",
            missing=weaker_limits(self._lacking - {"pids"}),
        )

    def places(self, rootfs: RootFs, guest_id: str) -> Places:  # noqa: ARG002 - each guest has a root of its own
        """As the template's files say."""
        return Places(home=rootfs.template.user.home, workdir=rootfs.template.workdir, prefix=GUEST_PREFIX)

    async def snapshot(self, rootfs: RootFs) -> Snapshot:
        """Start a template's nursery."""
        nursery = await Nursery.spawn(f"template {rootfs.template.id}", shared_pids=False)
        cgroup: Cgroup | None = None
        try:
            cgroup = self._group(f"nursery-{rootfs.template.id}-gvisor-{os.getpid()}-{self._next()}", None)
            if cgroup is not None:
                cgroup.attach(nursery.pid)
            await nursery.run(unshare_program(CLONE_NEWNS))
            await nursery.run(
                layout.stage_program(
                    self._stage, rootfs, self._runsc, agent_binary(), image_bytes=IMAGE_BYTES, owner=self._id_map.base
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
        return snapshot

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _group(self, name: str, resources: Resources | None) -> Cgroup | None:
        if self._hierarchy is None:
            return None
        return self._hierarchy.create(name, None if resources is None else with_overhead(resources))

    async def make_image(self, snapshot: GvisorSnapshot) -> None:
        """Warm a guest up and save it. Raises TemplateFailed with what it printed."""
        argv, env = warm_command(snapshot.rootfs.template)
        if not argv:
            raise TemplateFailed(f"{snapshot.nursery.what} has no warm-up")
        snapshot.cool()
        argv[2:4] = ["resident", "--channel=0", f"--agent={spec.AGENT}"]
        name = f"warm-{os.getpid()}-{self._next()}"
        container = f"{_CONTAINER}-{name}"
        request = GuestRequest(name, "sandbox", snapshot.rootfs.template.resources)
        command = [*self._command, f"--root={layout.SHARED_STATE}", "run", f"--bundle={layout.BUNDLE}", container]
        guest = await self._start(snapshot, request, command, argv, env, flags=layout.SHARED_FLAGS, warm=True)
        try:
            try:
                await asyncio.wait_for(guest.ready(), WARM_UP_TIMEOUT_S)
            except TimeoutError:
                raise TemplateFailed(
                    f"warming {snapshot.nursery.what} took more than {WARM_UP_TIMEOUT_S:g} s",
                    fix="make the warm-up shorter",
                ) from None
            except GuestFailed as error:
                raise TemplateFailed(
                    f"warming {snapshot.nursery.what} failed", why=guest.said() or error.why
                ) from error
            await self._save(snapshot, container)
        finally:
            await guest.destroy()
            forget(snapshot.nursery.pid, container)

    async def make_ready(self, snapshot: GvisorSnapshot) -> ReadyRunsc | None:
        """Start a runsc for a guest to come; nothing where there is no cgroup to end it by."""
        if self._hierarchy is None:
            return None
        name = f"ready-{os.getpid()}-{self._next()}"
        resources = snapshot.rootfs.template.resources
        request = GuestRequest(name, "sandbox", resources)
        command = [*self._command, f"--root={layout.SHARED_STATE}", "create", f"--bundle={layout.BUNDLE}", name]
        argv = [spec.AGENT, "agent", "--channel=0"]
        parts = await self._spawn(snapshot, request, command, argv, {}, flags=layout.SHARED_FLAGS)
        assert parts.cgroup is not None
        ready = ReadyRunsc(name, snapshot.nursery.pid, parts.channel, parts.cgroup, parts.storage, parts.log, resources)
        try:
            await _ended(parts.born, READY_TIMEOUT_S)
        except BaseException:
            await asyncio.shield(ready.discard())
            raise
        finally:
            os.close(parts.born.pidfd)
        return ready

    async def _restore_into(self, snapshot: GvisorSnapshot, ready: ReadyRunsc, request: GuestRequest) -> RunscGuest:
        command = [*self._command, f"--root={layout.SHARED_STATE}", "restore", f"--image-path={layout.IMAGES}",
                   "--bundle=/", ready.name]  # fmt: skip
        entries: list[int] = []
        unused, theirs = channel_pair()
        try:
            ready.cgroup.limit(with_overhead(request.resources))
            entries = ready.cgroup.entries()
            program = layout.command_program(command, len(entries))
            fds = [theirs.fileno(), ready.log.fileno(), *entries]
            born = await snapshot.nursery.clone(program.encode(), layout.COMMAND_FLAGS, fds)
        except BaseException as error:
            await asyncio.shield(ready.discard())
            if isinstance(error, OSError):
                raise exhausted_or_failed("the guest can't be set up", error.errno or 0) from error
            raise
        finally:
            unused.close()
            theirs.close()
            ready.log.handed_over()
            for fd in entries:
                os.close(fd)
        channel = GuestChannel(ready.channel)
        await channel.open()
        cgroup = ready.cgroup

        async def end_guest(_pid: int) -> None:
            cgroup.kill()

        guest = RunscGuest(
            born, channel, cgroup, request.resources,
            steps=program.steps, warm=True, storage=ready.storage, changes=_upper(ready.storage, None), log=ready.log,
            end_guest=end_guest, forget=ready.forget,
        )  # fmt: skip
        snapshot.hold(guest)
        return guest

    async def _save(self, snapshot: GvisorSnapshot, container: str) -> None:
        """Write a running guest's memory and state into the snapshot; the guest ends with it."""
        command = [
            *self._command, f"--root={layout.SHARED_STATE}", "checkpoint", "--compression=none",
            "--exclude-committed-zero-pages", f"--image-path={layout.IMAGES}", container,
        ]  # fmt: skip
        log = RunscLog()
        ours, theirs = channel_pair()
        try:
            program = layout.command_program(command, 0)
            born = await snapshot.nursery.clone(program.encode(), layout.COMMAND_FLAGS, [theirs.fileno(), log.fileno()])
        finally:
            theirs.close()
            log.handed_over()
        ours.close()
        try:
            await _ended(born, CHECKPOINT_TIMEOUT_S)
        finally:
            os.close(born.pidfd)
            said = log.close()
        if not {"checkpoint.img", "pages.img", "pages_meta.img"} <= {path.name for path in snapshot.image_files()}:
            snapshot.cool()
            raise TemplateFailed(f"{snapshot.nursery.what} can't be saved", why=said)

    async def clone(self, snapshot: Snapshot, request: GuestRequest, *, warm: bool) -> Guest:
        """Start a guest, or restore the warm one: that came with the template's own process limit, which stays."""
        assert isinstance(snapshot, GvisorSnapshot)
        warm = warm and snapshot.is_warm and request.resources.pids == snapshot.rootfs.template.resources.pids
        if request.build:
            raise Unsupported("templates are not built at the gvisor level", fix="build at the container level")
        ready = snapshot.take_ready(request) if warm else None
        if ready is not None:
            return await self._restore_into(snapshot, ready, request)
        how = ["restore", f"--image-path={layout.IMAGES}"] if warm else ["run"]
        command = [*self._command, f"--root={layout.STATE}", *how, f"--bundle={layout.BUNDLE}", _CONTAINER]
        agent = [spec.AGENT, "agent", "--channel=0"]
        return await self._start(snapshot, request, command, agent, {}, flags=layout.GUEST_FLAGS, warm=warm)

    async def _spawn(
        self,
        snapshot: GvisorSnapshot,
        request: GuestRequest,
        command: Sequence[str],
        argv: Sequence[str],
        env: dict[str, str],
        *,
        flags: int,
    ) -> Started:
        rootfs = snapshot.rootfs
        config = spec.bundle(
            argv, env,
            user=rootfs.template.user, hostname=request.hostname, root=layout.ROOT,
            binds=[(f"/b{index}", target) for index, (_source, target) in enumerate(rootfs.binds)],
            mounts=[(f"/g/m{index}", mount) for index, mount in enumerate(request.mounts)],
            resources=request.resources, id_map=self._id_map,
        )  # fmt: skip
        program = layout.guest_program(
            rootfs, request.mounts, config, command,
            n_entries=self._n_entries, owner=self._id_map.base, own_pids=flags != layout.SHARED_FLAGS,
        )  # fmt: skip
        storage = self._storage(request)
        passed: list[int] = []
        log: RunscLog | None = None
        cgroup: Cgroup | None = None
        born: Clone | None = None
        entries: list[int] = []
        ours, theirs = channel_pair()
        try:
            passed = await self._mount_fds(request.mounts)
            log = RunscLog()
            cgroup = self._group(request.id, request.resources)
            entries = [] if cgroup is None else cgroup.entries()
            fds = [theirs.fileno(), log.fileno(), *entries, storage, *passed]
            born = await snapshot.nursery.clone(program.encode(), flags, fds)
        except BaseException as error:
            ours.close()
            os.close(storage)
            if log is not None:
                log.close()
            if cgroup is not None:
                await remove_soon(cgroup)
            if isinstance(error, OSError):
                raise exhausted_or_failed("the guest can't be set up", error.errno or 0) from error
            raise
        finally:
            theirs.close()
            if log is not None and "create" not in command:
                log.handed_over()
            for fd in (*entries, *passed):
                os.close(fd)
        return Started(born, ours, cgroup, storage, log, program.steps)

    async def _start(
        self,
        snapshot: GvisorSnapshot,
        request: GuestRequest,
        command: Sequence[str],
        argv: Sequence[str],
        env: dict[str, str],
        *,
        flags: int,
        warm: bool,
    ) -> RunscGuest:
        parts = await self._spawn(snapshot, request, command, argv, env, flags=flags)
        channel = GuestChannel(parts.channel)
        await channel.open()
        guest = RunscGuest(
            parts.born, channel, parts.cgroup, request.resources,
            steps=parts.steps, warm=warm, storage=parts.storage, changes=_upper(parts.storage, request.storage),
            log=parts.log,
        )  # fmt: skip
        snapshot.hold(guest)
        return guest

    def _storage(self, request: GuestRequest) -> int:
        if request.storage is not None:
            return directory(request.storage)
        return tmpfs(request.resources.disk_bytes, inodes_for(request.resources), self._id_map.base)

    async def _mount_fds(self, wanted: Sequence[Mount]) -> list[int]:
        if not wanted:
            return []
        if self._mount_namespace < 0:
            self._mount_namespace = await mounts.owner_namespace(self._id_map)
        return mounts.prepare(wanted, self._mount_namespace)

    async def close(self) -> None:
        """End every nursery."""
        for snapshot in list(self._snapshots):
            await snapshot.close()
        self._snapshots.clear()
        if self._mount_namespace >= 0:
            os.close(self._mount_namespace)
            self._mount_namespace = -1


def _upper(storage: int, on_disk: Path | None) -> Path:
    return on_disk / UPPER if on_disk is not None else Path(f"/proc/{os.getpid()}/fd/{storage}") / UPPER


async def _ended(process: Clone, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(process.pidfd, over.set)
    try:
        await asyncio.wait_for(over.wait(), timeout_s)
    except TimeoutError:
        raise TemplateFailed("saving a warm guest took too long") from None
    finally:
        loop.remove_reader(process.pidfd)
