"""How runsc processes are started below a template's nursery: guests, and commands that act on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Sequence

from tartarus.guest.channel import channel_pair
from tartarus.guest.program import Program
from tartarus.model.errors import GuestFailed
from tartarus.model.sandbox import Mount, Resources
from tartarus.runtimes.base import GuestRequest, RootFs
from tartarus.runtimes.cgroups import Cgroup, Hierarchy, remove_soon
from tartarus.runtimes.container import mounts
from tartarus.runtimes.container.storage import directory, inodes_for, tmpfs
from tartarus.runtimes.gvisor import layout, spec
from tartarus.runtimes.gvisor.limits import with_overhead
from tartarus.runtimes.gvisor.log import RunscLog
from tartarus.runtimes.gvisor.platforms import Platforms
from tartarus.runtimes.gvisor.ready import ReadyRunsc, Started
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.nursery import Clone, Nursery, exhausted_or_failed

READY_TIMEOUT_S = 20.0
_TELL_TIMEOUT_S = 20.0
_AFTER_END_S = 5.0
AGENT_COMMAND = (spec.AGENT, "agent", "--channel=0")
_COMMON = ("/runsc", "--ignore-cgroups", "--overlay2=none", "--file-access=exclusive")


class Launcher:
    """Starts them. With groups, all are in their nursery's pid namespace, and runscs can act on each other's guests.

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

    def _argv(self, *words: str, shared: bool = True, network: str = "none") -> list[str]:
        root = layout.SHARED_STATE if shared else layout.STATE
        return [*_COMMON, f"--network={network}", f"--platform={self.platforms.name}", f"--root={root}", *words]

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
        images: Sequence[int] = (),
    ) -> Started:
        """A runsc that does `how` with a new guest of this request, whose first process is `process`.

        `shared`: other runscs will act on it. `storage`: as by `storage_for`, taken over; a new one if None.
        `images`: a saved guest's open files (`layout.IMAGE_FILES`). Raises GuestFailed or NoSpace; nothing stays then.
        """
        config = spec.bundle(
            process, env or {},
            user=rootfs.template.user, hostname=request.hostname, root=layout.ROOT,
            binds=[(f"/b{index}", target) for index, (_source, target) in enumerate(rootfs.binds)],
            mounts=[(f"/g/m{index}", mount) for index, mount in enumerate(request.mounts)],
            resources=request.resources, id_map=self.id_map, secrets=request.secrets, network=request.network >= 0,
        )  # fmt: skip
        argv = self._argv(*how, f"--bundle={layout.BUNDLE}", request.id, shared=shared,
                          network="sandbox" if request.network >= 0 else "none")  # fmt: skip
        program = layout.guest_program(
            rootfs, request.mounts, config, argv,
            n_entries=self._n_entries, owner=self.id_map.base, own_pids=not shared, n_images=len(images),
            network=request.network >= 0,
        )  # fmt: skip
        flags = layout.SHARED_FLAGS if shared else layout.GUEST_FLAGS
        kept = self.storage_for(request) if storage is None else storage
        passed: list[int] = []
        try:
            passed = await self._mount_fds(request.mounts)
            born, channel, cgroup, log = await self._begin(
                nursery, request.id, request.resources, program, flags,
                [kept, *passed, *images, *([request.network] if request.network >= 0 else [])],
            )  # fmt: skip
        except BaseException:
            os.close(kept)
            raise
        finally:
            for fd in passed:
                os.close(fd)
        return Started(request.id, born, channel, cgroup, kept, _mounts_of(born), log, program.steps)

    async def ahead(
        self, nursery: Nursery, rootfs: RootFs, request: GuestRequest, storage: int | None = None
    ) -> ReadyRunsc:
        """A runsc that holds no guest yet, to be restored into. `storage` as for `start`."""
        parts = await self.start(nursery, rootfs, request, ["create"], shared=True, storage=storage)
        ready = self._ready(nursery, parts, request.resources)
        try:
            await self._created(ready)
        except BaseException:
            await asyncio.shield(ready.discard())
            raise
        return ready

    async def heir(self, nursery: Nursery, old: Started, resources: Resources) -> ReadyRunsc:
        """A runsc with the mounts of another one, whose guest will go on in it."""
        name = self.new_name("heir")
        program = layout.heir_program(self._argv("create", f"--bundle={layout.BUNDLE}", name), self._n_entries)
        born, channel, cgroup, log = await self._begin(
            nursery, name, resources, program, layout.COMMAND_FLAGS, [old.world]
        )
        heir = old._replace(name=name, born=born, channel=channel, cgroup=cgroup, log=log, steps=program.steps)
        ready = self._ready(nursery, heir, resources)
        try:
            await self._created(ready)
        except BaseException:
            await asyncio.shield(ready.end())
            raise
        return ready

    def _ready(self, nursery: Nursery, parts: Started, resources: Resources) -> ReadyRunsc:
        assert parts.cgroup is not None  # nobody starts one ahead without groups
        return ReadyRunsc(parts, parts.cgroup, nursery.pid, resources)

    async def _created(self, ready: ReadyRunsc) -> None:
        born = ready.parts.born
        try:
            await ended(born, READY_TIMEOUT_S, "starting a runsc")
        finally:
            os.close(born.pidfd)
        if not ready.alive:
            raise GuestFailed("runsc did not start", why=ready.parts.log.text(), fix="tartarus doctor")

    async def _begin(
        self,
        nursery: Nursery,
        name: str,
        resources: Resources,
        program: Program,
        flags: int,
        fds: Sequence[int],
    ) -> tuple[Clone, socket.socket, Cgroup | None, RunscLog]:
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
            for fd in entries:
                os.close(fd)
        return born, ours, cgroup, log

    async def restore(self, nursery: Nursery, ready: ReadyRunsc, images: Sequence[int] = ()) -> Started:
        """Restore into one that was started ahead: the template's image, or that of open `images`.

        Raises GuestFailed or NoSpace; it stays then.
        """
        where = layout.RESTORED if images else layout.IMAGES
        command = self._argv("restore", f"--image-path={where}", "--bundle=/", ready.name)
        program = layout.command_program(command, self._n_entries, n_images=len(images))
        entries = ready.cgroup.entries()
        try:
            born = await self._command(nursery, program, ready.parts.log, [*entries, *images], mounts=bool(images))
        finally:
            for fd in entries:
                os.close(fd)
        return ready.parts._replace(born=born, steps=program.steps)

    async def checkpoint(
        self, nursery: Nursery, name: str, into: int | None, timeout_s: float, gone: Awaitable[object]
    ) -> str:
        """Write a guest into an open directory, or into the template's image; what runsc said. Its runsc ends.

        `gone` completes when the guest's first process has ended, with this or by itself. Raises GuestFailed when no
        runsc could be asked or none answered in time.
        """
        where = layout.IMAGES if into is None else layout.SAVED
        command = self._argv(
            "checkpoint", "--compression=none", "--exclude-committed-zero-pages", f"--image-path={where}", name
        )
        program = layout.command_program(command, 0, saves=into is not None)
        log = RunscLog()
        try:
            fds = [] if into is None else [into]
            born = await self._command(nursery, program, log, fds, mounts=into is not None)
            asking = asyncio.ensure_future(ended(born, timeout_s, "saving the sandbox"))
            end = asyncio.ensure_future(gone)
            try:
                await asyncio.wait({asking, end}, return_when=asyncio.FIRST_COMPLETED)
                # When the guest has ended there is little left to do for the command, or nobody left to ask.
                await asyncio.wait_for(asking, timeout_s if asking.done() else _AFTER_END_S)
            except TimeoutError:
                raise GuestFailed("the sandbox ended while it was being saved") from None
            finally:
                end.cancel()
                asking.cancel()
                await asyncio.wait({asking})
                os.close(born.pidfd)
            return log.text()
        finally:
            log.close()

    async def tell(self, nursery: Nursery, what: Sequence[str], name: str, rest: Sequence[str] = ()) -> str:
        """Have runsc do something with a guest within its own kernel; what it said, which is nothing if it did.

        Raises GuestFailed when no runsc could be asked or none answered in time.
        """
        log = RunscLog()
        try:
            program = layout.command_program(self._argv(*what, name, *rest), 0)
            born = await self._command(nursery, program, log, [], mounts=False)
            try:
                await ended(born, _TELL_TIMEOUT_S, f"runsc {what[0]}")
            finally:
                os.close(born.pidfd)
            return log.text()
        finally:
            log.close()

    async def name(self, nursery: Nursery, name: str, hostname: str) -> None:
        """Give a restored guest a host name, by a process of the agent's program in it.

        Nothing else in a guest has the privilege that this takes. Raises GuestFailed.
        """
        said = await self.tell(nursery, ["exec", "--cap=CAP_SYS_ADMIN", "--user=0:0", "--cwd=/"], name, [
            spec.AGENT, "name", hostname,
        ])  # fmt: skip
        if said:
            raise GuestFailed("the restored sandbox can't be named", why=said, fix="tartarus doctor")

    async def _command(
        self, nursery: Nursery, program: Program, log: RunscLog, fds: Sequence[int], *, mounts: bool
    ) -> Clone:
        unused, theirs = channel_pair()
        try:
            flags = layout.SHARED_FLAGS if mounts else layout.COMMAND_FLAGS
            return await nursery.clone(program.encode(), flags, [theirs.fileno(), log.fileno(), *fds])
        except OSError as error:
            raise exhausted_or_failed("runsc can't be started", error.errno or 0) from error
        finally:
            unused.close()
            theirs.close()

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


def _mounts_of(born: Clone) -> int:
    """Its mount namespace; -1 when it has ended already, which its owner will find out."""
    try:
        return os.open(f"/proc/{born.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


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
