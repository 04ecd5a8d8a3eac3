"""The process level's `Runtime`: ordinary processes that gave up everything they do not need.

There is no mount namespace, so paths are the host's: a sandbox works in a directory of its own and
sees, read-only, what programs need to run. There is no pid namespace either: the guest agent is the
subreaper of all that runs in the sandbox and ends it. As root each sandbox gets a user id of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import msgspec

from tartarus.guest.binary import agent_memfd
from tartarus.guest.channel import GuestChannel, channel_pair
from tartarus.guest.program import Fd, Program
from tartarus.model.errors import GuestFailed, IsolationUnavailable, NoSpace, Unsupported
from tartarus.model.sandbox import Isolation
from tartarus.runtimes import trees
from tartarus.runtimes.base import GUEST_PREFIX, Capabilities, Guest, GuestRequest, Places, RootFs, Snapshot
from tartarus.runtimes.cgroups import Cgroup, Hierarchy, add_joining, admit, lacking, remove_soon, weaker_limits
from tartarus.runtimes.confine import caps, keyring, landlock, rlimits, seccomp
from tartarus.runtimes.confine.metadata import MetadataBroker
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.handle import HostGuest
from tartarus.runtimes.idmap import PRIVILEGED_BASE, SPAN
from tartarus.runtimes.nursery import Clone, Nursery, WarmNursery, exhausted_or_failed, nursery_limits, warm_command
from tartarus.runtimes.process import paths, warmup
from tartarus.runtimes.unsaved import UnsavableRuntime

_FIRST_UID = PRIVILEGED_BASE + SPAN
_UIDS = 32768
_ZYGOTE_UID = _FIRST_UID + _UIDS
PR_SET_DUMPABLE = 4


class ProcessSnapshot(WarmNursery):
    """A template's nursery and zygote at process level."""

    def __init__(
        self, rootfs: RootFs, nursery: Nursery, cgroup: Cgroup | None, confinement: Program, scratch: Path
    ) -> None:
        argv, env = warm_command(rootfs.template, guest_prefix(rootfs))
        super().__init__(nursery, argv, env | {"HOME": str(scratch)}, confinement)
        self.rootfs = rootfs
        self._cgroup = cgroup
        self._scratch = scratch

    def memory_bytes(self) -> int:
        """Memory that the zygote holds."""
        return self.zygote_memory_bytes()

    async def close(self) -> None:
        """End the nursery; it ends what is left below it."""
        await self.end()
        if self._cgroup is not None:
            await remove_soon(self._cgroup)
        await asyncio.to_thread(trees.remove_tree, self._scratch)


class ProcessRuntime(UnsavableRuntime):
    """Makes process-level guests; needs no privilege."""

    isolation = Isolation.PROCESS
    best = Capabilities(
        warm_start=True, pause=True, own_network=False, own_pids=False, mounts=False, memory_limit="cgroup",
        cpu_limit="cgroup", pids_limit="cgroup", disk_limit="each file (rlimit)",
    )  # fmt: skip

    def __init__(self, state_dir: Path, hierarchy: Hierarchy | None) -> None:
        self._base = state_dir / "process"
        self._base.mkdir(parents=True, exist_ok=True)
        state_dir.chmod(0o711)
        self._base.chmod(0o711)
        self._hierarchy = hierarchy
        self._privileged = os.geteuid() == 0
        self._landlock_abi = landlock.abi()
        if self._landlock_abi == 0:
            raise IsolationUnavailable(
                "the process level needs Landlock",
                why="this kernel has none",
                fix="use Linux 5.13 or later with lsm=landlock",
            )
        self._agent_fd = agent_memfd()
        self._snapshots: set[ProcessSnapshot] = set()
        self._count = 0
        self._uids: set[int] = set()
        self._nursery_count = 0

    def capabilities(self) -> Capabilities:
        """What this host gives the level."""
        missing = lacking(self._hierarchy)
        return msgspec.structs.replace(
            self.best,
            memory_limit="each process (rlimit)" if "memory" in missing else "cgroup",
            cpu_limit="none" if "cpu" in missing else "cgroup",
            pids_limit="each user (rlimit)" if "pids" in missing else "cgroup",
            missing=(*weaker_limits(missing), *landlock.unenforceable(self._landlock_abi)),
        )

    async def snapshot(self, rootfs: RootFs) -> Snapshot:
        """Start a template's nursery. Raises IsolationUnavailable where guests could not reach their files."""
        if self._privileged:
            paths.require_reachable([self._base, *rootfs.layers])
        nursery = await Nursery.spawn(f"template {rootfs.template.id}", shared_pids=True)
        # Guests inherit this empty ring and can't use it; one for each would be counted against their user's quota.
        program = Program()
        keyring.add_keyring(program)
        self._nursery_count += 1
        cgroup: Cgroup | None = None
        try:
            if self._hierarchy is not None:
                # Without it, one that is stopped when the daemon dies would never be found again.
                cgroup = self._hierarchy.create(
                    f"nursery-{rootfs.template.id}-process-{os.getpid()}-{self._nursery_count}", nursery_limits()
                )
                cgroup.attach(nursery.pid)
            await nursery.run(program)
        except BaseException as error:
            nursery.close()
            if cgroup is not None:
                await remove_soon(cgroup)
            if isinstance(error, OSError):
                raise exhausted_or_failed("the nursery's cgroup can't be set up", error.errno or 0) from error
            raise
        uid = _ZYGOTE_UID if self._privileged else None
        scratch = self._make_home(f"warm-{os.getpid()}-{self._nursery_count}", uid or os.getuid())
        confinement = warmup.confinement(rootfs, self._base, self._landlock_abi, uid, (_FIRST_UID, _UIDS))
        snapshot = ProcessSnapshot(rootfs, nursery, cgroup, confinement, scratch)
        self._snapshots.add(snapshot)
        snapshot.nursery.control.closed.add_done_callback(lambda _: self._snapshots.discard(snapshot))
        return snapshot

    async def clone(self, snapshot: Snapshot, request: GuestRequest, *, warm: bool) -> Guest:
        """Fork a guest that confines itself to a fresh directory."""
        assert isinstance(snapshot, ProcessSnapshot)
        if request.mounts:
            raise Unsupported("a process-level sandbox has no mounts", fix="use --isolation container, or tartarus cp")
        uid = self._take_uid()
        try:
            home = self._make_home(request.id, uid)
        except OSError as error:
            self._uids.discard(uid)
            trees.remove_tree(self._base / request.id)
            raise exhausted_or_failed("the sandbox's directory can't be made", error.errno or 0) from error
        try:
            return await self._clone(snapshot, request, uid, home, warm=warm)
        except BaseException:
            self._uids.discard(uid)
            trees.remove_tree(home)
            raise

    async def _clone(
        self, snapshot: ProcessSnapshot, request: GuestRequest, uid: int, home: Path, *, warm: bool
    ) -> Guest:
        ours, theirs = channel_pair()
        broker, asker = (None, None) if self._privileged else socket.socketpair()
        cgroup: Cgroup | None = None
        born: Clone | None = None
        entries: list[int] = []
        try:
            program = self._program(snapshot.rootfs, request, home, uid)
            if self._hierarchy is not None:
                cgroup = self._hierarchy.create(request.id, request.resources)
                entries = cgroup.entries()
            fds = [theirs.fileno(), self._agent_fd, *([] if asker is None else [asker.fileno()]), *entries]
            born = await snapshot.clone(program.encode(), 0, fds, warm=warm)
            admit(cgroup, ours, born.pid, len(entries))
        except BaseException as error:
            ours.close()
            if broker is not None:
                broker.close()
            if born is not None:
                os.close(born.pidfd)
            if cgroup is not None:
                await remove_soon(cgroup)
            if isinstance(error, OSError):
                raise exhausted_or_failed("the guest can't be set up", error.errno or 0) from error
            raise
        finally:
            theirs.close()
            if asker is not None:
                asker.close()
            close_all(entries)
        nursery = snapshot.nursery
        metadata = None if broker is None else MetadataBroker(broker, [str(home)])

        async def end_guest(pid: int) -> None:
            if not nursery.control.closed.done():
                await nursery.end_guest(pid)

        async def after_end() -> None:
            if cgroup is None:  # else its processes were found there, whoever their parent is
                with contextlib.suppress(GuestFailed):
                    await end_guest(0)
            if metadata is not None:
                metadata.close()
            await asyncio.to_thread(trees.remove_tree, home)
            self._uids.discard(uid)

        channel = GuestChannel(ours)
        await channel.open()
        guest = HostGuest(
            born,
            channel,
            cgroup,
            request.resources,
            steps=program.steps,
            warm=warm,
            disk_bytes=lambda _pid: trees.tree_bytes(home),
            end_guest=end_guest,
            after_end=after_end,
        )
        snapshot.hold(guest)
        return guest

    def _take_uid(self) -> int:
        """A user id that no live sandbox has; without privilege there is only our own."""
        if not self._privileged:
            return os.getuid()
        for _ in range(_UIDS):
            self._count += 1
            uid = _FIRST_UID + self._count % _UIDS
            if uid not in self._uids:
                self._uids.add(uid)
                return uid
        raise NoSpace("every process-level user id is in use", fix="end other sandboxes")

    def _make_home(self, name: str, uid: int) -> Path:
        home = self._base / name
        home.mkdir(mode=0o700)
        (home / "tmp").mkdir(mode=0o700)
        if self._privileged:
            os.chown(home, uid, uid)
            os.chown(home / "tmp", uid, uid)
        return home

    def places(self, rootfs: RootFs, guest_id: str) -> Places:
        """The guest's own directory is its home; the template lies where the host has it."""
        home = str(self._base / guest_id)
        return Places(home=home, workdir=home, prefix=guest_prefix(rootfs))

    def _program(self, rootfs: RootFs, request: GuestRequest, home: Path, uid: int) -> Program:
        program = Program()
        n_entries = self._hierarchy.n_entries if self._hierarchy is not None else 0
        add_joining(program, 2 if self._privileged else 3, n_entries)
        program.syscall("umask", 0o22, step="umask")
        rlimits.add_rlimits(program, request.resources, Isolation.PROCESS)
        if self._privileged:
            caps.add_bounding_drop(program)
            program.syscall("setgroups", 0, 0, step="leave all groups")
            program.syscall("setresgid", uid, uid, uid, step="take a group of its own")
            program.syscall("setresuid", uid, uid, uid, step="take a user of its own")
            # A change of user leaves a process undumpable, and its own /dev/stdin out of its reach; the agent differs.
            program.syscall("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0, step="be dumpable again")
        program.syscall("chdir", str(home), step="enter the working directory")
        caps.add_capability_drop(program, bounding=not self._privileged)
        landlock.add_landlock(
            program, self._landlock_abi, paths.rules(rootfs, home, own_terminals=self._privileged), tcp=False
        )
        broker = None if self._privileged else Fd(2)
        seccomp.add_seccomp(
            program, Isolation.PROCESS, own_uid=self._privileged, landlock_abi=self._landlock_abi, broker=broker,
            hardening=rootfs.hardening,
        )  # fmt: skip
        return program

    async def close(self) -> None:
        """End every nursery."""
        for snapshot in list(self._snapshots):
            await snapshot.close()
        self._snapshots.clear()
        os.close(self._agent_fd)


def guest_prefix(rootfs: RootFs) -> str:
    """Where the template's `/opt/tartarus` lies on the host: its guests see the host's paths."""
    return f"{rootfs.layers[0]}{GUEST_PREFIX}"
