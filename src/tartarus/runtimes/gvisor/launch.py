"""How runsc processes are started below a template's nursery, and saved guests restored into them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Sequence

import msgspec

from tartarus.guest.channel import channel_pair
from tartarus.guest.program import Program
from tartarus.model.errors import GuestFailed
from tartarus.model.sandbox import Mount, Resources
from tartarus.runtimes.base import GuestRequest, RootFs
from tartarus.runtimes.cgroups import Cgroup, Hierarchy, remove_soon
from tartarus.runtimes.container import mounts
from tartarus.runtimes.container.storage import directory, inodes_for, tmpfs
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.gvisor import layout, spec
from tartarus.runtimes.gvisor.kernel import Kernel
from tartarus.runtimes.gvisor.limits import with_overhead
from tartarus.runtimes.gvisor.log import RunscLog
from tartarus.runtimes.gvisor.platforms import Platforms
from tartarus.runtimes.gvisor.ready import ReadyRunsc, Started
from tartarus.runtimes.gvisor.stubs import open_kernel
from tartarus.runtimes.gvisor.watch import Watch
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.nursery import Clone, Nursery, exhausted_or_failed

READY_TIMEOUT_S = 20.0
RESTORE_TIMEOUT_S = 60.0
SLOWEST_DISK = 20 * 1024**2
"""Bytes a second, at least, when a guest is written or read."""
AGENT_COMMAND = (spec.AGENT, "agent", "--channel=0")
_COMMON = ("/runsc", "--ignore-cgroups", "--overlay2=none", "--file-access=exclusive")


class Launcher:
    """Starts them. With groups, all are in their nursery's pid namespace.

    Without groups each is process 1 of a pid namespace of its own, by which it can be ended.
    """

    def __init__(self, hierarchy: Hierarchy | None, id_map: IdMap, platforms: Platforms) -> None:
        self.hierarchy = hierarchy
        self.platforms = platforms
        self.id_map = id_map
        self.shared = hierarchy is not None
        self._n_entries = hierarchy.n_entries if hierarchy is not None else 0
        self._count = 0
        self._mount_namespace = -1

    def new_name(self, kind: str) -> str:
        """A name for a group and a guest that none had before."""
        self._count += 1
        return f"{kind}-{os.getpid()}-{self._count}"

    def group(self, name: str, resources: Resources | None) -> Cgroup | None:
        """A group with room for runsc itself; None where none can be made."""
        if self.hierarchy is None:
            return None
        return self.hierarchy.create(name, None if resources is None else with_overhead(resources))

    def _argv(self, *words: str, shared: bool = True, network: str = "none", filtered: bool = False) -> list[str]:
        root = layout.SHARED_STATE if shared else layout.STATE
        common = [*_COMMON, "--oci-seccomp"] if filtered else list(_COMMON)
        if network != "none":
            common.append("--net-disconnect-ok")  # else it could not be saved while it has a connection
        return [*common, f"--network={network}", f"--platform={self.platforms.name}", f"--root={root}", *words]

    async def start(
        self,
        nursery: Nursery,
        rootfs: RootFs,
        request: GuestRequest,
        how: Sequence[str],
        process: Sequence[str] = AGENT_COMMAND,
        env: dict[str, str] | None = None,
        *,
        shared: bool,
        storage: int | None = None,
    ) -> Started:
        """A runsc that does `how` with a new guest of this request, whose first process is `process`.

        `shared`: it is ended by its group. `storage`: as by `storage_for`, taken over; a new one if None.
        Raises GuestFailed or NoSpace; nothing stays then.
        """
        config = spec.bundle(
            process, env or {},
            user=rootfs.template.user, hostname=request.hostname, root=layout.ROOT,
            binds=[(f"/b{index}", target) for index, (_source, target) in enumerate(rootfs.binds)],
            mounts=[(f"/g/m{index}", mount) for index, mount in enumerate(request.mounts)],
            resources=request.resources, id_map=self.id_map, secrets=request.secrets,
            network=request.network is not None, hardening=rootfs.hardening,
        )  # fmt: skip
        argv = self._argv(*how, f"--bundle={layout.BUNDLE}", request.id, shared=shared,
                          network="none" if request.network is None else "sandbox",
                          filtered=rootfs.hardening.filters)  # fmt: skip
        program = layout.guest_program(
            rootfs, request.mounts, config, argv,
            n_entries=self._n_entries, owner=self.id_map.base, own_pids=not shared,
            network=request.network is not None,
        )  # fmt: skip
        flags = layout.SHARED_FLAGS if shared else layout.GUEST_FLAGS
        kept = self.storage_for(request) if storage is None else storage
        passed: list[int] = []
        try:
            passed = await self._mount_fds(request.mounts)
            born, channel, cgroup, log, watch = await self._begin(
                nursery, request.id, request.resources, program, flags,
                [kept, *passed, *([] if request.network is None else [request.network.file])],
            )  # fmt: skip
        except BaseException:
            os.close(kept)
            raise
        finally:
            close_all(passed)
        state = state_of(nursery) if shared else f"/proc/{born.pid}/root{layout.STATE}"
        return Started(request.id, state, born, channel, cgroup, kept, log, watch, program.steps)

    async def ahead(
        self, nursery: Nursery, rootfs: RootFs, request: GuestRequest, storage: int | None = None,
        before: Sequence[str] = (),
    ) -> ReadyRunsc:  # fmt: skip
        """A runsc that holds no guest yet, to be restored into. `storage` as for `start`, `before` for `add_links`."""
        # Its link is handed to it: it needs no namespace that has one.
        apart = msgspec.structs.replace(request, network=None)
        parts = await self.start(nursery, rootfs, apart, ["create"], shared=True, storage=storage)
        assert parts.cgroup is not None  # nobody starts one ahead without groups
        ready = ReadyRunsc(parts, parts.cgroup, request.resources)
        try:
            await ended(parts.born, READY_TIMEOUT_S, "starting a runsc")
            kernel = open_kernel(parts.cgroup.pids())
            if kernel is None:
                raise GuestFailed("runsc did not start", why=parts.log.text(), fix="tartarus doctor")
            ready.parts = parts._replace(born=kernel)
            os.close(parts.born.pidfd)
            await Kernel(parts.state, parts.name).add_links(request.network, before)
        except BaseException:
            await asyncio.shield(ready.discard())
            raise
        return ready

    async def restore(self, ready: ReadyRunsc, images: Sequence[int]) -> Started:
        """Restore a guest from its open image into a runsc that was started ahead.

        Raises GuestFailed; it stays then.
        """
        parts = ready.parts
        if parts.watch is not None:
            parts.watch.hurry()
        device = None
        try:
            if self.platforms.name == "kvm":
                device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
            size = sum(os.fstat(image).st_size for image in images)
            limit_s = RESTORE_TIMEOUT_S + size / SLOWEST_DISK
            await Kernel(parts.state, parts.name).restore(images, device, limit_s)
        except OSError as error:
            raise exhausted_or_failed("the guest can't be restored", error.errno or 0) from error
        except GuestFailed as error:
            raise GuestFailed(error.what, why=parts.log.text() or error.why, fix=error.fix) from error
        finally:
            if device is not None:
                os.close(device)
        return parts

    async def _begin(
        self,
        nursery: Nursery,
        name: str,
        resources: Resources,
        program: Program,
        flags: int,
        fds: Sequence[int],
    ) -> tuple[Clone, socket.socket, Cgroup | None, RunscLog, Watch | None]:
        log: RunscLog | None = None
        cgroup: Cgroup | None = None
        entries: list[int] = []
        ours, theirs = channel_pair()
        try:
            log = RunscLog()
            cgroup = self.group(name, resources)
            entries = [] if cgroup is None else cgroup.entries()
            born = await nursery.clone(program.encode(), flags, [theirs.fileno(), log.fileno(), *entries, *fds])
        except BaseException as error:
            ours.close()
            if log is not None:
                log.close()
            if cgroup is not None:
                await remove_soon(cgroup)
            if isinstance(error, OSError):
                raise exhausted_or_failed("the guest can't be set up", error.errno or 0) from error
            raise
        finally:
            theirs.close()
            close_all(entries)
        return born, ours, cgroup, log, None if cgroup is None else Watch(name, cgroup)

    def storage_for(self, request: GuestRequest) -> int:
        """Where it will write: memory, or the directory that was asked for."""
        if request.storage is not None:
            return directory(request.storage)
        return tmpfs(request.resources.disk_bytes, inodes_for(request.resources), self.id_map.base)

    async def _mount_fds(self, wanted: Sequence[Mount]) -> list[int]:
        if not wanted:
            return []
        if self._mount_namespace < 0:
            self._mount_namespace = await mounts.owner_namespace(self.id_map)
        return mounts.prepare(wanted, self._mount_namespace)

    def close(self) -> None:
        """Let go of what mounts were made with."""
        if self._mount_namespace >= 0:
            os.close(self._mount_namespace)
            self._mount_namespace = -1


def state_of(nursery: Nursery) -> str:
    """Where runscs keep what they write down about guests that are ended by their groups, as this process finds it."""
    return f"/proc/{nursery.pid}/root{layout.SHARED_STATE}"


async def ended(process: Clone, timeout_s: float, doing: str) -> None:
    """Wait until it has. Raises GuestFailed when it does not; it is killed then."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(process.pidfd, over.set)
    try:
        await asyncio.wait_for(over.wait(), timeout_s)
    except TimeoutError:
        raise GuestFailed(f"{doing} took more than {timeout_s:g} s") from None
    finally:
        loop.remove_reader(process.pidfd)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
