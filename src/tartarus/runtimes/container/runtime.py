"""The container level's `Runtime`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from tartarus.guest.binary import agent_memfd
from tartarus.guest.channel import GuestChannel, channel_pair
from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.model.sandbox import Isolation, Mount
from tartarus.runtimes.base import GUEST_PREFIX, Capabilities, Guest, GuestRequest, Places, RootFs, Snapshot
from tartarus.runtimes.cgroups import Cgroup, Hierarchy, admit, lacking, remove_soon, weaker_limits
from tartarus.runtimes.confine import landlock
from tartarus.runtimes.confine.listening import CallWatch, watched
from tartarus.runtimes.container import layout, mounts
from tartarus.runtimes.container.quotas import UserNamespaces
from tartarus.runtimes.container.storage import UPPER, Storage, directory, inodes_for, tmpfs, used_bytes
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.handle import HostGuest
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.nursery import (
    Clone,
    Nursery,
    WarmNursery,
    exhausted_or_failed,
    nursery_limits,
    warm_command,
)
from tartarus.runtimes.unsaved import UnsavableRuntime

_PROGRAM_CACHE = 64


class ContainerSnapshot(WarmNursery):
    """A template's nursery, boxed into the template's root, and its zygote."""

    def __init__(
        self,
        rootfs: RootFs,
        nursery: Nursery,
        user_namespaces: UserNamespaces,
        cgroup: Cgroup | None,
        own_mounts: Sequence[Mount],
        rules: Sequence[landlock.PathRule],
    ) -> None:
        argv, env = warm_command(rootfs.template)
        super().__init__(nursery, argv, env, layout.zygote_program())
        self.rootfs = rootfs
        self.user_namespaces = user_namespaces
        self._cgroup = cgroup
        self._own_mounts = bool(own_mounts)
        self._rules = rules
        self._programs: dict[Hashable, tuple[bytes, list[str]]] = {}
        nursery.control.closed.add_done_callback(self._end_guests)

    def _end_guests(self, _closed: object) -> None:
        """The nursery is process 1 above them: the kernel kills them with it, but it would wait for paused ones."""
        for guest in list(self._guests):
            guest.end_soon()

    def memory_bytes(self) -> int:
        """Memory that the zygote holds."""
        return self.zygote_memory_bytes()

    async def close(self) -> None:
        """End the nursery: the kernel ends everything in its pid namespace with it."""
        await self.end()
        if self._cgroup is not None:
            await remove_soon(self._cgroup)

    def program(
        self, request: GuestRequest, abi: int, limit_level: Isolation, n_entries: int, storage: Storage
    ) -> tuple[bytes, list[str]]:
        """The box program, encoded; those of late are kept, as only the host name differs.

        Encoding one takes longer than the kernel takes to run it.
        """
        watched, recorded = request.watch is not None, request.recorder >= 0
        kinds = tuple(os.path.isdir(mount.source) for mount in request.mounts)
        key = (request.resources, request.mounts, kinds, storage, request.build, request.secrets, watched, recorded)
        cached = self._programs.get(key)
        if cached is None:
            program = layout.box_program(
                self.rootfs,
                request.resources,
                request.mounts,
                landlock_abi=abi,
                limit_level=limit_level,
                n_entries=n_entries,
                storage=storage,
                staged_mounts=self._own_mounts,
                build=request.build,
                secrets=request.secrets,
                watched=watched,
                recorded=recorded,
                rules=self._rules,
            )
            if len(self._programs) >= _PROGRAM_CACHE:
                self._programs.clear()
            cached = self._programs[key] = (program.encode(), program.steps)
        encoded, steps = cached
        name = request.hostname.encode("ascii").ljust(len(layout.HOSTNAME_PLACEHOLDER), b"0")
        return encoded.replace(layout.HOSTNAME_PLACEHOLDER.encode(), name[: len(layout.HOSTNAME_PLACEHOLDER)]), steps


def _tmpfs_used(pid: int) -> int:
    """Bytes in a guest's own storage, of which its /dev/shm is a part; 0 where the host may not look (rootless)."""
    try:
        storage = os.statvfs(f"/proc/{pid}/root/dev/shm")
    except OSError:
        return 0
    return (storage.f_blocks - storage.f_bfree) * storage.f_frsize


async def _let_go(storage: int) -> None:
    """Close the last hold on a guest's storage: the kernel then frees it, which takes as long as there is much."""
    await asyncio.to_thread(os.close, storage)


def _upper(storage: int | None, on_disk: Path | None) -> Path | None:
    if on_disk is not None:
        return on_disk / UPPER
    return None if storage is None else Path(f"/proc/{os.getpid()}/fd/{storage}") / UPPER


class ContainerRuntime(UnsavableRuntime):
    """Makes container-level guests. As root, guests' ids are mapped to ids nobody on the host has."""

    isolation = Isolation.CONTAINER
    best = Capabilities(
        warm_start=True, pause=True, own_network=True, own_pids=True, mounts=True, memory_limit="cgroup",
        cpu_limit="cgroup", pids_limit="cgroup", disk_limit="tmpfs", keeps_files=True,
    )  # fmt: skip
    rules: Sequence[landlock.PathRule] = layout.LANDLOCK_RULES
    """What guests may do with the files that they see."""

    def __init__(self, state_dir: Path, hierarchy: Hierarchy | None, id_map: IdMap) -> None:
        self._stage = state_dir / "stage"
        self._stage.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._hierarchy = hierarchy
        self._id_map = id_map
        self._landlock_abi = landlock.abi()
        self._lacking = lacking(hierarchy)
        self._limit_level = Isolation.PROCESS if self._lacking & {"memory", "pids"} else Isolation.CONTAINER
        self._agent_fd = agent_memfd()
        self._snapshots: set[ContainerSnapshot] = set()
        self._n_entries = hierarchy.n_entries if hierarchy is not None else 0
        self._nursery_count = 0
        self._mount_namespace = -1

    def capabilities(self) -> Capabilities:
        """What this host gives the level."""
        missing = list(weaker_limits(self._lacking))
        if self._landlock_abi == 0:
            missing.append("no Landlock in this kernel: one wall less")
        return msgspec.structs.replace(
            self.best,
            memory_limit="each process (rlimit)" if "memory" in self._lacking else "cgroup",
            cpu_limit="none" if "cpu" in self._lacking else "cgroup",
            pids_limit="each user (rlimit)" if "pids" in self._lacking else "cgroup",
            keeps_files=self._id_map.privileged,
            missing=tuple(missing),
        )

    async def snapshot(self, rootfs: RootFs) -> Snapshot:
        """Start a template's nursery."""
        snapshot = await self._start_nursery(rootfs)
        self._snapshots.add(snapshot)
        snapshot.nursery.control.closed.add_done_callback(lambda _: self._snapshots.discard(snapshot))
        return snapshot

    async def _start_nursery(
        self, rootfs: RootFs, own_mounts: Sequence[Mount] = (), storage: Path | None = None
    ) -> ContainerSnapshot:
        nursery = await Nursery.spawn(f"template {rootfs.template.id}", shared_pids=False)
        cgroup: Cgroup | None = None
        try:
            if self._hierarchy is not None:
                self._nursery_count += 1
                cgroup = self._hierarchy.create(
                    f"nursery-{rootfs.template.id}-{self.isolation.value}-{os.getpid()}-{self._nursery_count}",
                    nursery_limits(),
                )
                cgroup.attach(nursery.pid)
            await self._build(nursery, rootfs, own_mounts, storage)
            user_namespaces = UserNamespaces(nursery, rootfs.hardening.ids or self._id_map.span)
            await user_namespaces.open()
        except BaseException as error:
            nursery.close()
            await asyncio.shield(nursery.gone())
            if cgroup is not None:
                await remove_soon(cgroup)
            if isinstance(error, GuestFailed):
                raise IsolationUnavailable(error.what, why=error.why, fix=error.fix) from error
            raise
        return ContainerSnapshot(rootfs, nursery, user_namespaces, cgroup, own_mounts, self.rules)

    async def _build(self, nursery: Nursery, rootfs: RootFs, own_mounts: Sequence[Mount], storage: Path | None) -> None:
        rootless = not self._id_map.privileged
        stage = layout.stage_program(self._stage, rootfs, own_mounts, rootless=rootless, storage=storage)
        if not rootless:
            await nursery.run(layout.unshare_program(layout.CLONE_NEWNS))
            await nursery.run(stage)
        await nursery.run(layout.unshare_program(layout.NURSERY_FLAGS))
        await nursery.fork()
        self._id_map.apply(nursery.pid)
        if rootless:
            await nursery.run(stage)
        await nursery.run(layout.nursery_program(rootfs, own_mounts, storage=storage is not None))

    def places(self, rootfs: RootFs, guest_id: str) -> Places:  # noqa: ARG002 - each guest has a root of its own
        """As the template's files say."""
        return Places(home=rootfs.template.user.home, workdir=rootfs.template.workdir, prefix=GUEST_PREFIX)

    async def clone(self, snapshot: Snapshot, request: GuestRequest, *, warm: bool) -> Guest:
        """Fork a guest into its box.

        Only root can hand a mount over to a nursery that stands already; a rootless sandbox with mounts, or with
        storage on disk, gets a nursery of its own, started with them.
        """
        assert isinstance(snapshot, ContainerSnapshot)
        warm = warm and request.watch is None
        if not (request.mounts or request.storage) or self._id_map.privileged:
            return await self._clone(snapshot, request, warm=warm)
        own = await self._start_nursery(snapshot.rootfs, request.mounts, request.storage)
        try:
            if warm:
                await own.warm()
            return await self._clone(own, request, warm=warm, after_end=own.close)
        except BaseException:
            await asyncio.shield(own.close())
            raise

    async def _clone(
        self,
        snapshot: ContainerSnapshot,
        request: GuestRequest,
        *,
        warm: bool,
        after_end: Callable[[], Awaitable[None]] | None = None,
    ) -> Guest:
        storage, where = self._storage(request)
        program, steps = snapshot.program(request, self._landlock_abi, self._limit_level, self._n_entries, where)
        held = [] if storage is None else [storage]
        passed: list[int] = []
        quotas = -1
        watch: CallWatch | None = None
        try:
            passed = [*held, *await self._mount_fds(request)]
            if request.watch is not None:
                watch, listening = watched(request.watch)
                passed.append(listening)
            quotas = await snapshot.user_namespaces.take()
            ours, theirs = channel_pair()
        except BaseException:
            close_all([*(passed or held), *([] if quotas < 0 else [quotas])])
            if watch is not None:
                watch.close()
            raise
        cgroup: Cgroup | None = None
        born: Clone | None = None
        entries: list[int] = []
        try:
            if self._hierarchy is not None:
                cgroup = self._hierarchy.create(request.id, request.resources)
                entries = cgroup.entries()
            asker = [] if request.recorder < 0 else [request.recorder]
            fds = [theirs.fileno(), self._agent_fd, quotas, *entries, *passed, *asker]
            born = await snapshot.clone(program, layout.GUEST_FLAGS, fds, warm=warm)
            admit(cgroup, ours, born.pid, len(entries))
        except BaseException as error:
            ours.close()
            close_all(held)
            if watch is not None:
                watch.close()
            if born is not None:
                os.close(born.pidfd)
            if cgroup is not None:
                await remove_soon(cgroup)
            if isinstance(error, OSError):
                raise exhausted_or_failed("the guest's cgroup can't be set up", error.errno or 0) from error
            raise
        finally:
            theirs.close()
            close_all([quotas, *entries, *passed[len(held) :]])
        channel = GuestChannel(ours)
        await channel.open()
        guest = HostGuest(
            born,
            channel,
            cgroup,
            request.resources,
            steps=steps,
            warm=warm,
            disk_bytes=_tmpfs_used if storage is None else lambda _pid: used_bytes(storage),
            after_end=after_end if storage is None else partial(_let_go, storage),
            changes=_upper(storage, request.storage),
        )
        snapshot.hold(guest)
        if watch is not None:
            guest.ended.add_done_callback(lambda _: watch.close())
        return guest

    def _storage(self, request: GuestRequest) -> tuple[int | None, Storage]:
        """The guest's own storage, if the host can make it, and how the guest comes by it."""
        if self._id_map.privileged:
            if request.storage is not None:
                return directory(request.storage), Storage.PASSED
            size = request.resources.disk_bytes
            return tmpfs(size, inodes_for(request.resources), self._id_map.base), Storage.PASSED
        return None, Storage.OWN if request.storage is None else Storage.STAGED

    async def _mount_fds(self, request: GuestRequest) -> list[int]:
        if not request.mounts or not self._id_map.privileged:
            return []
        if self._mount_namespace < 0:
            self._mount_namespace = await mounts.owner_namespace(self._id_map)
        return mounts.prepare(request.mounts, self._mount_namespace)

    async def close(self) -> None:
        """End every nursery."""
        for snapshot in list(self._snapshots):
            await snapshot.close()
        self._snapshots.clear()
        os.close(self._agent_fd)
        if self._mount_namespace >= 0:
            os.close(self._mount_namespace)
