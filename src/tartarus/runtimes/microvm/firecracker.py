"""The Firecracker driver: its API over a Unix socket, its snapshots, its vsock.

Written after Firecracker's OpenAPI document (1.17) and its documentation, and tested against a server that holds every
request to both; no machine was booted with it by us. MMDS and network interfaces are never configured, and its own
system call filters stay on, which is its default.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from tartarus.model.errors import GuestFailed, Unsupported
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.microvm import hardened, kernel, versions, vsock
from tartarus.runtimes.microvm.driver import BOOT_TIMEOUT_S, Hardware, Machine, Parts, disks, end, serials
from tartarus.runtimes.microvm.monitor import (
    API_SOCKET,
    DISK_BYTES_PER_S,
    DISK_OPS_PER_S,
    GUEST_CID,
    VSOCK,
    Monitor,
    Start,
    VsockMachine,
    failed_boot,
)
from tartarus.runtimes.microvm.vmmapi import VmmApi

MOST_CPUS = 32
ENTROPY_BYTES_PER_S = 1024**2
_MOST_DEVICE_BYTES = 16 * 1024 * 1024
_MIB = 1024 * 1024
_COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=4 reboot=k panic=-1 random.trust_cpu=on i8042.noaux i8042.nomux i8042.dumbkbd "
    f"cryptomgr.notests audit=0 tartarus.channel=vsock:{vsock.PORT} {hardened.COMMAND_LINE}"
)


class FirecrackerMachine(VsockMachine):
    """One Firecracker process. `copies`: see `Start`."""

    def __init__(self, monitor: Monitor, api: VmmApi, parts: Parts, *, copies: bool) -> None:
        super().__init__(monitor, api)
        self._parts = parts
        self._copies = copies

    async def pause(self) -> None:
        """Stop its processors."""
        await self.api.call("PATCH", "/vm", {"state": "Paused"})

    async def let_run(self) -> None:
        """Let its processors run."""
        await self.api.call("PATCH", "/vm", {"state": "Resumed"})

    async def save(self, device_state: int) -> None:
        """Stop it and write its memory, where it was started with `share`, and its devices' state."""
        await self.pause()
        await self._snapshot("memory", device_state)
        if self._copies:
            await asyncio.to_thread(self._take_back)

    async def save_devices(self, device_state: int) -> None:
        """Write its devices' state. It has no command for that alone: the memory that comes along is thrown away."""
        try:
            await self._snapshot("memory.unused", device_state)
        finally:
            self.monitor.home.drop("memory.unused")

    def _take_back(self) -> None:
        parts, home = self._parts, self.monitor.home
        for name, into in (("memory", parts.memory), ("scratch", parts.scratch)):
            size = os.fstat(into).st_size
            if home.holds(name, into):
                continue
            home.take(name, size, into)
            os.ftruncate(into, size)

    async def _snapshot(self, memory_name: str, device_state: int) -> None:
        body = {"snapshot_type": "Full", "snapshot_path": "state.saved", "mem_file_path": memory_name}
        async with self.saving() as home:
            await self.api.call("PUT", "/snapshot/create", body)
        await asyncio.to_thread(home.take, "state.saved", _MOST_DEVICE_BYTES, device_state)


class Firecracker:
    """Starts Firecracker."""

    name = versions.FIRECRACKER.name
    modules: tuple[str, ...] = kernel.VSOCK_BOOT
    command_line = _COMMAND_LINE
    loads_packed_kernels = False
    stands_ready = False
    maps_files = False
    takes_tap = False

    def __init__(self, start: Start, program: str | None = None) -> None:
        self._start = start
        self._program = program or versions.program_of(versions.FIRECRACKER)

    async def version(self) -> str:
        """Its version. Raises IsolationUnavailable below 1.8."""
        return await asyncio.to_thread(versions.version_of, self._program, versions.FIRECRACKER)

    async def boot(self, parts: Parts, cgroup: Cgroup | None) -> Machine:
        """Start a machine from its kernel, and wait until its agent serves."""
        if parts.hardware.cpus > MOST_CPUS:
            raise Unsupported(f"Firecracker's machines have at most {MOST_CPUS} processors", fix="ask for fewer")
        assert parts.boot is not None
        files = {"kernel": parts.boot.kernel, "initramfs": parts.boot.initramfs, **disks(parts)}
        if parts.share and not self._start.copies:
            files["memory"] = parts.memory
        machine = await self._begin(files, parts, cgroup)
        try:
            for path, body in configuration(parts):
                await machine.api.call("PUT", path, body)
            machine.started()
            await machine.reach(BOOT_TIMEOUT_S)
        except GuestFailed as error:
            raise await failed_boot(machine, error) from error
        except BaseException:
            await end(machine)
            raise
        return machine

    async def restore(
        self, parts: Parts, device_state: int, cgroup: Cgroup | None, filled: asyncio.Task[None] | None = None
    ) -> Machine:
        """Start a machine where another was saved; its memory is mapped privately from the saved one."""
        if filled is not None:
            await asyncio.shield(filled)
        machine = await self._begin({"memory": parts.memory, "state": device_state, **disks(parts)}, parts, cgroup)
        backend = {"backend_type": "File", "backend_path": "memory"}
        body = {"snapshot_path": "state", "mem_backend": backend, "resume_vm": False}
        try:
            await machine.api.call("PUT", "/snapshot/load", body)
            machine.started()
        except BaseException:
            await end(machine)
            raise
        return machine

    async def _begin(self, files: dict[str, int], parts: Parts, cgroup: Cgroup | None) -> FirecrackerMachine:
        argv = [self._program, "--api-sock", API_SOCKET]
        monitor = await Monitor.start(self._start, argv, files, cgroup)
        try:
            api = VmmApi(monitor.home, API_SOCKET)
            return FirecrackerMachine(monitor, api, parts, copies=self._start.copies)
        except BaseException:
            await monitor.end()
            raise


def configuration(parts: Parts) -> list[tuple[str, dict[str, Any]]]:
    """The requests that make and start a machine, in their order."""
    names = list(disks(parts))
    words = [f"disk.{serial}=vd{chr(ord('a') + index)}" for index, serial in enumerate(serials(parts))]
    boot = {
        "kernel_image_path": "kernel",
        "initrd_path": "initramfs",
        "boot_args": " ".join([_COMMAND_LINE, *words, parts.boot.words if parts.boot else ""]).rstrip(),
    }
    hardware = _machine_config(parts.hardware)
    drives = [(f"/drives/{name}", _drive(name, read_only=name != "scratch")) for name in names]
    return [
        ("/machine-config", hardware),
        ("/boot-source", boot),
        *drives,
        ("/vsock", {"guest_cid": GUEST_CID, "uds_path": VSOCK}),
        ("/entropy", {"rate_limiter": {"bandwidth": _bucket(ENTROPY_BYTES_PER_S)}}),
        ("/actions", {"action_type": "InstanceStart"}),
    ]


def _machine_config(hardware: Hardware) -> dict[str, Any]:
    return {
        "vcpu_count": hardware.cpus,
        "mem_size_mib": hardware.memory_bytes // _MIB,
        "smt": False,
        "track_dirty_pages": False,
    }


def _drive(name: str, *, read_only: bool) -> dict[str, Any]:
    limits = {"bandwidth": _bucket(DISK_BYTES_PER_S), "ops": _bucket(DISK_OPS_PER_S)}
    return {
        "drive_id": name,
        "path_on_host": name,
        "is_root_device": False,
        "is_read_only": read_only,
        # What a machine flushes need not survive the host: the disk ends with the machine, or is saved whole.
        "cache_type": "Unsafe",
        "io_engine": "Sync",
        "rate_limiter": limits,
    }


def _bucket(per_s: int) -> dict[str, int]:
    return {"size": per_s, "refill_time": 1000}
