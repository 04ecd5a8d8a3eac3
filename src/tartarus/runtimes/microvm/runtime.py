"""The microVM level's `Runtime`: a template's machine is booted once for each size, saved, cloned for each guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import msgspec

from tartarus.guest.channel import GuestChannel, GuestExec
from tartarus.model.errors import GuestFailed, IsolationUnavailable, TartarusError, TemplateFailed, Unsupported
from tartarus.model.sandbox import Isolation, Resources
from tartarus.model.settings import MicrovmMonitor
from tartarus.network import taps
from tartarus.runtimes.base import GUEST_PREFIX, Capabilities, Guest, GuestRequest, Places, RootFs, Snapshot
from tartarus.runtimes.cgroups import Cgroup, Hierarchy, remove_soon
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.microvm import choice, hardened, kept, memory, saving
from tartarus.runtimes.microvm.driver import BOOT_TIMEOUT_S, Machine, Parts, bind_serial
from tartarus.runtimes.microvm.guest import MachineGuest, Origin, renewal, with_monitor
from tartarus.runtimes.microvm.images import Packer
from tartarus.runtimes.microvm.machinery import Machinery, last_words, reach_agent
from tartarus.runtimes.microvm.packing import packing_tool
from tartarus.runtimes.microvm.ready import Begun, ReadyMachines
from tartarus.runtimes.microvm.snapshot import KERNEL_MEMORY, Frozen, MachineSnapshot, Size, hardware_for
from tartarus.runtimes.nursery import WARM_UP_TIMEOUT_S, warm_command

_RUNNER_FD = 3
_LOADED_KEPT_S = 30.0
_REHEARSED = (("/bin/sh", "-c", ":"), ("true",), ("python3", "-c", "pass"))
_SETTLE_S = 0.5
"""How long a machine that has rehearsed goes on until it is saved: its kernel tidies up after programs that ended."""


class MicrovmRuntime:
    """Makes microVM guests."""

    isolation = Isolation.MICROVM
    best = Capabilities(
        warm_start=True, pause=True, own_network=True, own_pids=True, mounts=False,
        memory_limit="the machine's kernel", cpu_limit="cgroup", pids_limit="the machine's kernel",
        disk_limit="scratch disk", saves_memory=True, missing=("no mounts of host directories",),
    )  # fmt: skip

    def __init__(
        self,
        state_dir: Path,
        kernels: Path,
        hierarchy: Hierarchy | None,
        id_map: IdMap,
        monitor: MicrovmMonitor = MicrovmMonitor.AUTO,
        *,
        jailer: bool = False,
    ) -> None:
        if not id_map.privileged:
            raise IsolationUnavailable(
                "microVMs need the daemon to be root", why="each monitor gets a user of its own", fix="run it as root"
            )
        choice.require_some(monitor)
        packing_tool()
        self.place = state_dir / "machines"
        self._monitor = monitor
        self._jailer = jailer
        self._packer = Packer(self.place, state_dir / "machine-stage", id_map)
        self._kept = kept.KeptMachines(self.place / "kept")
        self._kernels = kernels
        self._hierarchy = hierarchy
        self._machinery: Machinery | None = None
        self._lock = asyncio.Lock()
        self._snapshots: set[MachineSnapshot] = set()
        self._loaded: dict[tuple[int, int, int], tuple[Frozen, asyncio.Task[None]]] = {}
        self._loading = asyncio.Lock()
        self._ready = ReadyMachines(self._begin_ahead)
        self._count = 0

    def capabilities(self) -> Capabilities:
        """What this level gives."""
        limits = self.best.memory_limit if self._hierarchy is not None else "the machine's kernel, without a cgroup"
        missing = list(self.best.missing)
        if self._machinery is not None and self._machinery.accelerator == "tcg":
            missing.append(f"emulated (TCG), so its programs run slowly: {self._machinery.why}")
        return msgspec.structs.replace(
            self.best,
            memory_limit=limits,
            cpu_limit="cgroup" if self._hierarchy is not None else "the machine's processors",
            missing=tuple(missing),
        )

    def places(self, rootfs: RootFs, guest_id: str) -> Places:  # noqa: ARG002 - each guest has a root of its own
        """As the template's files say."""
        return Places(home=rootfs.template.user.home, workdir=rootfs.template.workdir, prefix=GUEST_PREFIX)

    async def prove(self) -> str:
        """Boot a machine with nothing in it; how that went, in words. Raises IsolationUnavailable."""
        machinery = await self._open()
        took_ms = await machinery.try_one()
        kernel = machinery.kernel_release
        how = "KVM" if machinery.accelerator == "kvm" else f"emulated (TCG), since {machinery.why}"
        return f"{machinery.version}, {how}; Linux {kernel} booted in {took_ms:.0f} ms"

    async def snapshot(self, rootfs: RootFs) -> Snapshot:
        """Pack the template's files, once for each digest; its machines are booted when a size is asked for."""
        await self._open()
        made = MachineSnapshot(self, rootfs, await self._packer.open(rootfs))
        self._snapshots = {snapshot for snapshot in self._snapshots if snapshot.alive} | {made}
        return made

    async def clone(self, snapshot: Snapshot, request: GuestRequest, *, warm: bool) -> Guest:
        """A new machine, going on where the saved one of its size stands; that one is booted first if need be."""
        assert isinstance(snapshot, MachineSnapshot)
        _refuse_what_it_lacks(request)
        frozen = await snapshot.frozen(request.resources, warm=warm, network=request.network is not None)
        try:
            begun = self._ready.take(frozen) if request.network is None else None
            if begun is None:
                begun = await self._begin(frozen, request)
            elif begun.cgroup is not None:
                begun.cgroup.limit(with_monitor(request.resources, frozen.parts.hardware.memory_bytes))
            guest = await self._restore(snapshot, frozen, request, begun)
            # One with a network card would have to know whose link it leads to.
            if self._machinery is not None and self._machinery.driver.stands_ready and request.network is None:
                self._ready.prepare(frozen)
        finally:
            frozen.close()
        return guest

    def needs(self, snapshot: Snapshot) -> dict[str, str]:
        """What must be the same where a guest of this snapshot is restored."""
        assert isinstance(snapshot, MachineSnapshot)
        machinery = self._machinery
        if machinery is None:
            raise IsolationUnavailable("the microVM level was not opened")
        return {
            "monitor": f"{machinery.driver.name} {machinery.version}",
            "accelerator": machinery.accelerator,
            "processor": machinery.processor,
            "kernel": machinery.kernel_digest,
            "images": snapshot.images.identity,
            "hardening": snapshot.rootfs.hardening.digest,
        }

    async def restore(self, snapshot: Snapshot, saved: Path, request: GuestRequest) -> Guest:
        """A new machine that goes on where one was saved; all that are made of the same files share their memory."""
        assert isinstance(snapshot, MachineSnapshot)
        _refuse_what_it_lacks(request)
        machinery = await self._open()
        frozen: Frozen | None = None
        filled: asyncio.Task[None] | None = None
        if request.lend is not None and machinery.driver.maps_files:
            frozen = await asyncio.to_thread(kept.lent, saved, snapshot.images, request.lend)
        if frozen is None:
            frozen, filled = await self._load(snapshot, saved)
        try:
            return await self._restore(snapshot, frozen, request, await self._begin(frozen, request, filled))
        finally:
            frozen.close()

    async def close(self) -> None:
        """End every machine."""
        await self._ready.close()
        for snapshot in list(self._snapshots):
            await snapshot.close()
        self._snapshots.clear()
        while self._loaded:
            _, (frozen, filled) = self._loaded.popitem()
            await asyncio.wait([filled])  # it writes to that
            frozen.close()
        if self._machinery is not None:
            await self._machinery.close()
            self._machinery = None
        choice.clear_homes(self.place)

    async def _open(self) -> Machinery:
        async with self._lock:
            if self._machinery is not None and self._machinery.alive:
                return self._machinery
            opened = await Machinery.open(self.place, self._kernels, self._monitor, jailer=self._jailer)
            # If there is an old one, its nursery was killed, and with that every machine. The saved ones are not in
            # it, and what they need was known from it until now.
            old, self._machinery = self._machinery, opened
            if old is not None:
                await old.close()
            return opened

    def _group(self, request: GuestRequest, memory_bytes: int) -> Cgroup | None:
        if self._hierarchy is None:
            return None
        return self._hierarchy.create(request.id, with_monitor(request.resources, memory_bytes))

    async def freeze(self, snapshot: MachineSnapshot, size: Size) -> Frozen:
        """A machine whose agent serves, its interpreter parked if it is to be warm: as it was kept, or booted now."""
        images = snapshot.images
        files = sandbox_files(snapshot.rootfs, tuple(target for _, target in images.binds), warm=size.warm)
        name = kept.name_of(self.needs(snapshot), size, files)
        frozen = await asyncio.to_thread(self._kept.load, name, images)
        if frozen is None:
            frozen = await self._boot(snapshot, size, files)
            await asyncio.to_thread(self._kept.keep, name, frozen)
        return frozen

    async def _boot(self, snapshot: MachineSnapshot, size: Size, files: dict[str, bytes]) -> Frozen:
        machinery = await self._open()
        images = snapshot.images
        self._count += 1
        name = f"booting-{os.getpid()}-{self._count}"
        request = GuestRequest(name, name, snapshot.rootfs.template.resources)
        cgroup = self._group(request, size.hardware.memory_bytes)
        try:
            booting = machinery.booting(
                images.root, tuple(fd for fd, _ in images.binds), size.hardware, size.disk_bytes, files, cgroup,
                hardened.words(snapshot.rootfs.hardening),
            )  # fmt: skip
            async with booting as (machine, parts):
                channel = await reach_agent(machine, BOOT_TIMEOUT_S + (WARM_UP_TIMEOUT_S if size.warm else 0.0))
                if size.warm and not (await channel.ready()).warm_runner:
                    raise TemplateFailed(
                        f"warming template {snapshot.rootfs.template.id} failed", why=await last_words(machine)
                    )
                await _rehearse(channel, size, snapshot.rootfs.template.resources)
                return await _save_booted(machine, parts, channel, warm=size.warm)
        finally:
            if cgroup is not None:
                await remove_soon(cgroup)

    async def _load(self, snapshot: MachineSnapshot, saved: Path) -> tuple[Frozen, asyncio.Task[None]]:
        """Saved files as a machine to clone, whose memory is there when the task is done.

        Kept for a while, so that the many children of a fork share one.
        """
        try:
            status = (saved / saving.MEMORY).stat()
        except OSError as error:
            raise GuestFailed("a saved machine can't be read", why=error.strerror or str(error)) from error
        key = (status.st_dev, status.st_ino, status.st_mtime_ns)
        async with self._loading:
            found = self._loaded.get(key)
            if found is None:
                frozen, fill = await asyncio.to_thread(kept.begin_to_read, saved, snapshot.images)
                filled = asyncio.create_task(asyncio.to_thread(fill))
                found = self._loaded[key] = frozen, filled
                filled.add_done_callback(lambda done: self._loaded_whole(key, done))
            return found[0].borrow(), found[1]

    def _loaded_whole(self, key: tuple[int, int, int], filled: asyncio.Task[None]) -> None:
        kept_s = 0.0 if filled.cancelled() or filled.exception() is not None else _LOADED_KEPT_S
        asyncio.get_running_loop().call_later(kept_s, self._forget, key, filled)

    def _forget(self, key: tuple[int, int, int], filled: asyncio.Task[None]) -> None:
        if key in self._loaded and self._loaded[key][1] is filled:
            self._loaded.pop(key)[0].close()

    async def _restore(
        self, snapshot: MachineSnapshot, frozen: Frozen, request: GuestRequest, begun: Begun
    ) -> MachineGuest:
        """The guest that `begun` becomes, which is this method's."""
        hardware = frozen.parts.hardware
        try:
            origin = Origin(os.dup(frozen.parts.memory), hardware, frozen.warm, self.needs(snapshot))
        except BaseException:
            await asyncio.shield(begun.discard())
            raise
        guest = MachineGuest(
            begun.machine, begun.cgroup, request.resources, begun.scratch, request.hostname, origin, request.network
        )
        try:
            await guest.open(request.session)
            await begun.machine.resume()
        except BaseException:
            await guest.destroy()
            raise
        snapshot.hold(guest)
        return guest

    async def _begin(self, frozen: Frozen, request: GuestRequest, filled: asyncio.Task[None] | None = None) -> Begun:
        """A machine where the saved one stood still, with a scratch disk and a cgroup of its own.

        `filled`: done when the memory is there.
        """
        machinery = await self._open()
        if request.network is not None and not frozen.parts.hardware.network:
            raise GuestFailed("a machine can't be joined to the network", why="it was saved without a network card")
        cgroup: Cgroup | None = None
        tap = await _tap(frozen, request)
        scratch = os.open(self.place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            await asyncio.to_thread(memory.copy_data, frozen.parts.scratch, scratch)
            cgroup = self._group(request, frozen.parts.hardware.memory_bytes)
            state = os.open(f"/proc/self/fd/{frozen.device_state}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                parts = msgspec.structs.replace(frozen.parts, scratch=scratch, tap=tap)
                machine = await machinery.driver.restore(parts, state, cgroup, filled)
            finally:
                os.close(state)
        except BaseException:
            if cgroup is not None:
                await remove_soon(cgroup)
            os.close(scratch)
            raise
        finally:
            if tap is not None:
                os.close(tap)
        return Begun(machine, scratch, cgroup)

    async def _begin_ahead(self, frozen: Frozen) -> Begun:
        self._count += 1
        name = f"ready-{os.getpid()}-{self._count}"
        return await self._begin(frozen, GuestRequest(name, name, Resources()))


async def _tap(frozen: Frozen, request: GuestRequest) -> int | None:
    """Where the machine's network card leads, as a descriptor of its own: to its slot, or nowhere without one."""
    if request.network is not None:
        return os.dup(request.network.file)
    return await asyncio.to_thread(taps.create_apart) if frozen.parts.hardware.network else None


def sandbox_files(rootfs: RootFs, binds: tuple[str, ...], *, warm: bool) -> dict[str, bytes]:
    """What a machine's init is told of its sandbox: whose programs run, how confined, what is shown, what is parked."""
    template, user = rootfs.template, rootfs.template.user
    files = {"user": " ".join(map(str, (user.uid, user.gid, *user.groups))).encode()}
    if program := hardened.program_of(rootfs.hardening, user):
        files["program"] = program
    if binds:
        files["binds"] = "".join(f"{bind_serial(index)} {target}\n" for index, target in enumerate(binds)).encode()
    if warm:
        argv, env = warm_command(template)
        argv[2:4] = ["companion", f"--link={_RUNNER_FD}"]
        files["argv"] = b"".join(word.encode() + b"\0" for word in argv)
        files["env"] = b"".join(f"{name}={value}".encode() + b"\0" for name, value in env.items())
    return files


def _refuse_what_it_lacks(request: GuestRequest) -> None:
    if request.mounts:
        raise Unsupported(
            "a microVM takes no mounts",
            why="a file server between the machine and the host would be a door",
            fix="copy files with tartarus cp, or use the container or gvisor level",
        )
    if request.build or request.storage is not None:
        raise Unsupported("templates are not built at the microVM level", fix="build at the container level")


async def _rehearse(channel: GuestChannel, size: Size, usual: Resources) -> None:
    """Do once what every clone does first, so that clones find what it takes in their memory, not on their disk."""
    if hardware_for(usual, network=size.hardware.network) != size.hardware:
        usual = msgspec.structs.replace(usual, memory_bytes=size.hardware.memory_bytes - KERNEL_MEMORY)
    await channel.renew(renewal("localhost", usual))
    for argv in _REHEARSED:
        with contextlib.suppress(TartarusError):  # a template without that program
            await channel.exec(GuestExec(argv=argv, env={})).wait()
    await asyncio.sleep(_SETTLE_S)


async def _save_booted(machine: Machine, parts: Parts, channel: GuestChannel, *, warm: bool) -> Frozen:
    """Stop it and keep its memory, its devices' state and its scratch disk as descriptors of their own."""
    held: list[int] = []
    try:
        state = os.memfd_create("tartarus-devices", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        held.append(state)
        await machine.save(state)
        channel.close()
        machine.kill()
        await asyncio.shield(machine.ended)
        held += [os.dup(parts.memory), os.dup(parts.scratch)]
        for fd in held[:2]:
            memory.seal(fd)
    except BaseException:
        close_all(held)
        raise
    saved = msgspec.structs.replace(parts, memory=held[1], scratch=held[2], boot=None, share=False, tap=None)
    return Frozen(saved, state, warm)
