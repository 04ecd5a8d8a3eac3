"""The microVM level's `Runtime`: a template's machine is booted once for each size, saved, cloned for each guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import msgspec

from tartarus.guest.binary import agent_binary
from tartarus.guest.channel import GuestChannel, GuestExec
from tartarus.model.errors import GuestFailed, IsolationUnavailable, TartarusError, TemplateFailed, Unsupported
from tartarus.model.sandbox import Isolation, Resources
from tartarus.runtimes.base import GUEST_PREFIX, Capabilities, Guest, GuestRequest, Places, RootFs, Snapshot
from tartarus.runtimes.cgroups import Hierarchy, remove_soon
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.microvm import disks, kernel, memory, packing
from tartarus.runtimes.microvm.driver import Boot, Driver, Hardware, Machine, Parts
from tartarus.runtimes.microvm.guest import MachineGuest, renewal, with_monitor
from tartarus.runtimes.microvm.initramfs import initramfs
from tartarus.runtimes.microvm.launcher import Launcher
from tartarus.runtimes.microvm.qemu import Qemu
from tartarus.runtimes.unsaved import UnsavableRuntime

MIN_MEMORY = 128 * 1024 * 1024
"""What a distribution's kernel needs to boot."""
_BOOT_TIMEOUT_S = 60.0
_MIB = 1024 * 1024
_MOST_SIZES = 4


class Saved(msgspec.Struct, frozen=True):
    """A machine that has booted, as it is cloned: sealed memory, device state and scratch disk, as descriptors."""

    parts: Parts
    device_state: int

    def borrow(self) -> Saved:
        """The same, with descriptors of its own: closing the original does not end a clone that is under way."""
        memory_file, scratch, state = (os.dup(fd) for fd in (self.parts.memory, self.parts.scratch, self.device_state))
        return Saved(msgspec.structs.replace(self.parts, memory=memory_file, scratch=scratch), state)

    def close(self) -> None:
        """Let go of it; clones keep what they have mapped."""
        for fd in (self.parts.memory, self.parts.scratch, self.device_state):
            os.close(fd)


class MachineSnapshot:
    """A template's image and its saved machines, one for each size that was asked for."""

    def __init__(self, rootfs: RootFs, image: int) -> None:
        self.rootfs = rootfs
        self.image = image
        self.saved: dict[tuple[Hardware, int], Saved] = {}
        self.lock = asyncio.Lock()
        self._guests: set[MachineGuest] = set()
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether guests can still be made from it."""
        return not self._closed

    @property
    def is_warm(self) -> bool:
        """False: no interpreter is parked in its machines."""
        return False

    @property
    def in_use(self) -> bool:
        """Whether a guest that was made from it still lives."""
        return bool(self._guests)

    def hold(self, guest: MachineGuest) -> None:
        """That guest was made from it."""
        self._guests.add(guest)
        guest.ended.add_done_callback(lambda _: self._guests.discard(guest))

    def keep(self, size: tuple[Hardware, int], saved: Saved) -> None:
        """Have a saved machine of that size; the oldest of too many goes."""
        while len(self.saved) >= _MOST_SIZES:
            self.saved.pop(next(iter(self.saved))).close()
        self.saved[size] = saved

    async def warm(self) -> None:
        """Refuse: see `Capabilities.warm_start`."""
        raise TemplateFailed(
            "a microVM's interpreter can't be warmed", why="its guests are cloned with the agent alone"
        )

    def cool(self) -> None:
        """Nothing is parked."""

    def memory_bytes(self) -> int:
        """Memory that its saved machines hold."""
        return sum(memory.allocated(saved.parts.memory) for saved in self.saved.values())

    async def close(self) -> None:
        """End its guests and let go of its machines."""
        if self._closed:
            return
        self._closed = True
        for guest in list(self._guests):
            await guest.destroy()
        for saved in self.saved.values():
            saved.close()
        self.saved.clear()
        os.close(self.image)


class MicrovmRuntime(UnsavableRuntime):
    """Makes microVM guests."""

    isolation = Isolation.MICROVM

    def __init__(self, state_dir: Path, kernels: Path, hierarchy: Hierarchy | None, id_map: IdMap) -> None:
        if not id_map.privileged:
            raise IsolationUnavailable(
                "microVMs need the daemon to be root", why="each monitor gets a user of its own", fix="run it as root"
            )
        self.place = state_dir / "machines"
        self._stage = state_dir / "machine-stage"
        for directory in (self.place, self._stage):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kernels = kernels
        self._hierarchy = hierarchy
        self._id_map = id_map
        self._driver: Driver | None = None
        self._launcher: Launcher | None = None
        self._boot: Boot | None = None
        self._lock = asyncio.Lock()
        self._count = 0
        self._snapshots: set[MachineSnapshot] = set()

    def capabilities(self) -> Capabilities:
        """What this level gives."""
        limits = "the machine's" if self._hierarchy is not None else "the machine's, without a cgroup behind it"
        return Capabilities(
            warm_start=False,
            pause=True,
            own_network=True,
            own_pids=True,
            mounts=False,
            memory_limit=limits,
            cpu_limit="cgroup" if self._hierarchy is not None else "the machine's processors",
            pids_limit="none inside the machine",
            disk_limit="scratch disk",
            missing=("no mounts of host directories", "no warm interpreter"),
        )

    def places(self, rootfs: RootFs, guest_id: str) -> Places:  # noqa: ARG002 - each guest has a root of its own
        """As the template's files say."""
        return Places(home=rootfs.template.user.home, workdir=rootfs.template.workdir, prefix=GUEST_PREFIX)

    async def snapshot(self, rootfs: RootFs) -> Snapshot:
        """Pack the template's files, once for each digest; its machines are booted when a size is asked for."""
        await self._open()
        if rootfs.template.user.uid or rootfs.template.user.gid:
            raise IsolationUnavailable(
                "the microVM level runs commands as root only", fix="use a template whose user is root"
            )
        target = self.place / f"{rootfs.digest.replace(':', '-')}.erofs"
        async with self._lock:
            if not target.exists():
                aside = self.place / f".making-{os.getpid()}"
                aside.unlink(missing_ok=True)
                try:
                    await packing.pack(rootfs, self._stage, aside, self._id_map)
                    aside.rename(target)
                finally:
                    aside.unlink(missing_ok=True)
        snapshot = MachineSnapshot(rootfs, os.open(target, os.O_RDONLY | os.O_CLOEXEC))
        self._snapshots.add(snapshot)
        return snapshot

    async def clone(self, snapshot: Snapshot, request: GuestRequest, *, warm: bool) -> Guest:  # noqa: ARG002
        """A new machine, going on where the saved one of its size stands; that one is booted first if need be."""
        assert isinstance(snapshot, MachineSnapshot)
        if request.mounts or request.build or request.storage is not None:
            raise Unsupported("a microVM takes no mounts and builds no templates", fix="use the container level")
        size = (hardware_for(request.resources), request.resources.disk_bytes)
        async with snapshot.lock:
            saved = snapshot.saved.get(size)
            if saved is None:
                saved = await self._save(snapshot, *size)
                snapshot.keep(size, saved)
            borrowed = saved.borrow()
        try:
            guest = await self._restore(borrowed, request)
        finally:
            borrowed.close()
        snapshot.hold(guest)
        return guest

    async def close(self) -> None:
        """End every machine."""
        for snapshot in list(self._snapshots):
            await snapshot.close()
        self._snapshots.clear()
        if self._launcher is not None:
            await self._launcher.close()
        if self._boot is not None:
            os.close(self._boot.kernel)
            os.close(self._boot.initramfs)
            self._boot = None

    async def _open(self) -> None:
        async with self._lock:
            if self._driver is not None:
                return
            chosen = kernel.default(self._kernels)
            self._boot = Boot(
                _in_memory("kernel", chosen.image.read_bytes()),
                _in_memory("initramfs", initramfs(agent_binary().read_bytes(), chosen.load_order())),
            )
            self._launcher = await Launcher.open()
            self._driver = Qemu(self._launcher)

    async def _save(self, snapshot: MachineSnapshot, hardware: Hardware, disk_bytes: int) -> Saved:
        """Boot a machine until its agent serves, and save it there."""
        assert self._driver is not None
        assert self._boot is not None
        scratch = await self._fresh_scratch(disk_bytes)
        state = os.memfd_create("tartarus-devices", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        held = [scratch, state]
        try:
            memory_file = memory.create(hardware.memory_bytes)
            held.append(memory_file)
            parts = Parts(hardware, memory_file, snapshot.image, scratch, self._boot, share=True)
            machine = await self._driver.boot(parts, None)
            channel = GuestChannel(machine.channel)
            try:
                await _boot(machine, channel)
                await machine.save(state)
            finally:
                machine.kill()
                await asyncio.shield(machine.ended)
                channel.close()
            memory.seal(memory_file)
            memory.seal(state)
        except BaseException:
            for fd in held:
                os.close(fd)
            raise
        return Saved(msgspec.structs.replace(parts, share=False), state)

    async def _fresh_scratch(self, size: int) -> int:
        self._count += 1
        path = self.place / f".scratch-{os.getpid()}-{self._count}"
        try:
            await disks.make_scratch(path, size)
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        finally:
            path.unlink(missing_ok=True)

    async def _restore(self, saved: Saved, request: GuestRequest) -> MachineGuest:
        assert self._driver is not None
        held = os.open(self.place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        cgroup = None
        machine: Machine | None = None
        state = -1
        try:
            await asyncio.to_thread(memory.copy_data, saved.parts.scratch, held)
            if self._hierarchy is not None:
                limits = with_monitor(request.resources, saved.parts.hardware.memory_bytes)
                cgroup = self._hierarchy.create(request.id, limits)
            state = os.open(f"/proc/self/fd/{saved.device_state}", os.O_RDONLY | os.O_CLOEXEC)
            machine = await self._driver.restore(msgspec.structs.replace(saved.parts, scratch=held), state, cgroup)
            guest = MachineGuest(machine, cgroup, request.resources, held, request.hostname)
        except BaseException:
            if machine is not None:
                machine.kill()
            if cgroup is not None:
                await remove_soon(cgroup)
            os.close(held)
            raise
        finally:
            if state >= 0:
                os.close(state)
        try:
            await guest.open()
            await machine.resume()
        except BaseException:
            await guest.destroy()
            raise
        return guest


def hardware_for(resources: Resources) -> Hardware:
    """The machine that holds these limits: whole MiB and whole processors, rounded up."""
    memory_bytes = -(-max(resources.memory_bytes, MIN_MEMORY) // _MIB) * _MIB
    return Hardware(memory_bytes, max(1, -(-resources.cpu_milli // 1000)))


async def _boot(machine: Machine, channel: GuestChannel) -> None:
    await channel.open()
    try:
        async with asyncio.timeout(_BOOT_TIMEOUT_S):
            await channel.ready()
            await _rehearse(channel)
    except (TimeoutError, GuestFailed) as error:
        said = "" if machine.ended.done() else await machine.console()
        raise IsolationUnavailable(
            "a machine does not boot here", why=said.strip()[-1000:] or str(error), fix="tartarus doctor says more"
        ) from error


async def _rehearse(channel: GuestChannel) -> None:
    """Do once what every clone does first, so that clones find what it takes in their memory, not on their disk."""
    await channel.renew(renewal("localhost"))
    process = channel.exec(GuestExec(argv=("/bin/sh", "-c", ":"), env={}))
    with contextlib.suppress(TartarusError):  # a template without a shell
        await process.wait()


def _in_memory(name: str, content: bytes) -> int:
    """A sealed memory file: monitors, which have users of their own, open it through their descriptor."""
    fd = os.memfd_create(f"tartarus-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    memory.seal(fd)
    return fd
