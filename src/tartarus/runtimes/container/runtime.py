"""The container level's `Runtime`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tartarus.guest.binary import agent_memfd
from tartarus.guest.channel import GuestChannel, channel_pair
from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.model.sandbox import Isolation, Resources
from tartarus.runtimes.base import GUEST_PREFIX, Capabilities, Guest, GuestRequest, Places, RootFs, Snapshot
from tartarus.runtimes.cgroups import Cgroup, Hierarchy
from tartarus.runtimes.confine import landlock
from tartarus.runtimes.container import layout, mounts
from tartarus.runtimes.handle import HostGuest
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.nursery import Clone, Nursery, WarmNursery, warm_command

_PROGRAM_CACHE = 64
_WITHOUT = {
    "memory": "the memory limit holds for each process by itself",
    "cpu": "the CPU limit is not enforced",
    "pids": "the process limit holds for the sandbox's user",
    "freezer": "sandboxes can't be paused",
}


class ContainerSnapshot(WarmNursery):
    """A template's nursery, boxed into the template's root, and its zygote."""

    def __init__(self, rootfs: RootFs, nursery: Nursery, cgroup: Cgroup | None) -> None:
        argv, env = warm_command(rootfs.template)
        super().__init__(nursery, argv, env)
        self.rootfs = rootfs
        self._cgroup = cgroup
        self._programs: dict[Resources, tuple[bytes, list[str]]] = {}

    def memory_bytes(self) -> int:
        """Memory that the zygote holds."""
        return self.zygote_memory_bytes()

    async def close(self) -> None:
        """End the nursery: the kernel ends everything in its pid namespace with it."""
        await self.end()
        if self._cgroup is not None:
            await _remove(self._cgroup)

    def program(self, request: GuestRequest, abi: int, limit_level: Isolation) -> tuple[bytes, list[str]]:
        """The box program, encoded; the one for requests without mounts is kept, as only the host name differs."""
        cached = None if request.mounts else self._programs.get(request.resources)
        if cached is None:
            program = layout.box_program(self.rootfs, request.resources, request.mounts, landlock_abi=abi, limit_level=limit_level)
            cached = (program.encode(), program.steps)
            if not request.mounts:
                if len(self._programs) >= _PROGRAM_CACHE:
                    self._programs.clear()
                self._programs[request.resources] = cached
        encoded, steps = cached
        name = request.hostname.encode("ascii").ljust(len(layout.HOSTNAME_PLACEHOLDER), b"0")
        return encoded.replace(layout.HOSTNAME_PLACEHOLDER.encode(), name[: len(layout.HOSTNAME_PLACEHOLDER)]), steps


class ContainerRuntime:
    """Makes container-level guests. As root, guests' ids are mapped to ids nobody on the host has."""

    isolation = Isolation.CONTAINER

    def __init__(self, state_dir: Path, hierarchy: Hierarchy | None, id_map: IdMap) -> None:
        self._stage = state_dir / "stage"
        self._stage.mkdir(parents=True, exist_ok=True)
        self._hierarchy = hierarchy
        self._id_map = id_map
        self._landlock_abi = landlock.abi()
        self._lacking = frozenset(hierarchy.missing if hierarchy else ("memory", "cpu", "pids", "freezer"))
        self._limit_level = Isolation.PROCESS if self._lacking & {"memory", "pids"} else Isolation.CONTAINER
        self._agent_fd = agent_memfd()
        self._snapshots: set[ContainerSnapshot] = set()
        self._snapshot_count = 0

    def capabilities(self) -> Capabilities:
        """What this host gives the level."""
        groups = self._hierarchy
        lacking = self._lacking
        missing = [f"no {name} cgroup: {_WITHOUT[name]}" for name in sorted(lacking) if name in _WITHOUT]
        if self._landlock_abi == 0:
            missing.append("no Landlock in this kernel: one wall less")
        return Capabilities(
            warm_start=True,
            pause=groups is not None and "freezer" not in lacking,
            own_network=True,
            own_pids=True,
            mounts=True,
            memory_limit="each process (rlimit)" if "memory" in lacking else "cgroup",
            cpu_limit="none" if "cpu" in lacking else "cgroup",
            pids_limit="each user (rlimit)" if "pids" in lacking else "cgroup",
            disk_limit="tmpfs",
            missing=tuple(missing),
        )

    async def snapshot(self, rootfs: RootFs) -> Snapshot:
        """Start a template's nursery."""
        what = f"template {rootfs.template.id}"
        nursery = await Nursery.spawn(what, shared_pids=False)
        cgroup: Cgroup | None = None
        try:
            if self._hierarchy is not None:
                self._snapshot_count += 1
                cgroup = self._hierarchy.create(f"nursery-{rootfs.template.id}-{os.getpid()}-{self._snapshot_count}", None)
                cgroup.attach(nursery.pid)
            await self._build(nursery, rootfs)
        except BaseException as error:
            nursery.close()
            if cgroup is not None:
                await _remove(cgroup)
            if isinstance(error, GuestFailed):
                raise IsolationUnavailable(error.what, why=error.why, fix=error.fix) from error
            raise
        snapshot = ContainerSnapshot(rootfs, nursery, cgroup)
        self._snapshots.add(snapshot)
        return snapshot

    async def _build(self, nursery: Nursery, rootfs: RootFs) -> None:
        if self._id_map.privileged:
            await nursery.run(layout.unshare_program(layout.CLONE_NEWNS))
            await nursery.run(layout.stage_program(self._stage, rootfs))
            await nursery.run(layout.unshare_program(layout.NURSERY_FLAGS))
            await nursery.fork()
            self._id_map.apply(nursery.pid)
        else:
            await nursery.run(layout.unshare_program(layout.NURSERY_FLAGS))
            await nursery.fork()
            self._id_map.apply(nursery.pid)
            await nursery.run(layout.stage_program(self._stage, rootfs))
        await nursery.run(layout.nursery_program(self._stage, rootfs))

    def places(self, rootfs: RootFs, guest_id: str) -> Places:
        """As the template's files say."""
        return Places(home="/root", workdir=rootfs.template.workdir, prefix=GUEST_PREFIX)

    async def clone(self, snapshot: Snapshot, request: GuestRequest, *, warm: bool) -> Guest:
        """Fork a guest into its box."""
        assert isinstance(snapshot, ContainerSnapshot)
        program, steps = snapshot.program(request, self._landlock_abi, self._limit_level)
        mount_fds = mounts.prepare(request.mounts, request.owner_uid, self._id_map)
        ours, theirs = channel_pair()
        cgroup: Cgroup | None = None
        born: Clone | None = None
        try:
            if self._hierarchy is not None:
                cgroup = self._hierarchy.create(request.id, request.resources)
            fds = [theirs.fileno(), self._agent_fd, *mount_fds]
            born = await snapshot.clone(program, layout.GUEST_FLAGS, fds, warm=warm)
            theirs.close()
            if cgroup is not None and born.pid > 0:
                _attach(cgroup, born.pid)
            ours.send(b"\0")
        except BaseException as error:
            ours.close()
            if born is not None:
                os.close(born.pidfd)
            if cgroup is not None:
                cgroup.kill()
                await _remove(cgroup)
            if isinstance(error, OSError):
                raise GuestFailed("the guest's cgroup can't be set up", why=str(error)) from error
            raise
        finally:
            theirs.close()
            for fd in mount_fds:
                os.close(fd)
        channel = GuestChannel(ours)
        await channel.open()
        return HostGuest(born, channel, cgroup, request.resources, steps=steps, warm=warm)

    async def close(self) -> None:
        """End every nursery."""
        for snapshot in list(self._snapshots):
            await snapshot.close()
        self._snapshots.clear()
        os.close(self._agent_fd)


def _attach(cgroup: Cgroup, pid: int) -> None:
    """Move a new guest in. One that died already is no error: its channel tells why."""
    try:
        cgroup.attach(pid)
    except ProcessLookupError:
        return


async def _remove(cgroup: Cgroup) -> None:
    for _ in range(100):
        if cgroup.remove():
            return
        await asyncio.sleep(0.002)
