"""The Cloud Hypervisor driver: its REST API over a Unix socket, its snapshots, its vsock.

Written after its OpenAPI document (0.3.0) and its documentation, and tested against a server that holds every request
to both; no machine was booted with it by us. Its own system call filters and its own Landlock domain are on, inside
of the walls that every monitor gets.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec

from tartarus.model.errors import GuestFailed, Unsupported
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.microvm import hardened, kernel, versions, vsock
from tartarus.runtimes.microvm.driver import BOOT_TIMEOUT_S, Machine, Parts, disks, end, serials
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

BASE = "/api/v1"
_SAVED = "saved"
_URL = "file:///proc/self/cwd/saved"
"""The monitor's own directory, whatever its path is for others."""
_MEMORY, _CONFIG, _STATE = "memory-ranges", "config.json", "state.json"
_MOST_JSON = 8 * 1024 * 1024
_KEPT = ("cpus", "memory", "payload", "disks", "rng", "serial", "console", "vsock")
"""What a saved configuration may hold; whatever else a monitor that was taken over wrote into it is left out."""
_COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 random.trust_cpu=on cryptomgr.notests audit=0 tartarus.off=poweroff "
    f"tartarus.channel=vsock:{vsock.PORT} {hardened.COMMAND_LINE}"
)


class Devices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The devices' state of a saved machine: two files of the monitor's, as text."""

    config: str
    state: str


class CloudHypervisorMachine(VsockMachine):
    """One Cloud Hypervisor process."""

    def __init__(self, monitor: Monitor, api: VmmApi, parts: Parts) -> None:
        super().__init__(monitor, api)
        self._parts = parts

    async def pause(self) -> None:
        """Stop its processors."""
        await self.api.call("PUT", "/vm.pause")

    async def let_run(self) -> None:
        """Let its processors run."""
        await self.api.call("PUT", "/vm.resume")

    async def save(self, device_state: int) -> None:
        """Stop it and write its memory and its devices' state."""
        await self.pause()
        await self._snapshot(device_state, self._parts.memory)

    async def save_devices(self, device_state: int) -> None:  # noqa: ARG002 - see its words
        """Refuse: its machines do not map the memory that they were cloned from, so nobody else could save that."""
        raise Unsupported(
            "Cloud Hypervisor's live machines can't be saved", why="it copies the memory of a machine that it restores",
            fix="use QEMU or Firecracker",
        )  # fmt: skip

    async def _snapshot(self, device_state: int, memory_file: int) -> None:
        async with self.saving() as home:
            home.directory(_SAVED)
            await self.api.call("PUT", "/vm.snapshot", {"destination_url": _URL})
        size = self._parts.hardware.memory_bytes
        await asyncio.to_thread(self._take_memory, size, memory_file)
        texts = [await asyncio.to_thread(self._text, name) for name in (_CONFIG, _STATE)]
        os.ftruncate(device_state, 0)
        os.pwrite(device_state, msgspec.json.encode(Devices(*texts)), 0)

    def _take_memory(self, size: int, into: int) -> None:
        self.monitor.home.take(f"{_SAVED}/{_MEMORY}", size, into)
        os.ftruncate(into, size)

    def _text(self, name: str) -> str:
        held = os.memfd_create(name)
        try:
            self.monitor.home.take(f"{_SAVED}/{name}", _MOST_JSON, held)
            return os.pread(held, _MOST_JSON, 0).decode("utf-8", "replace")
        finally:
            os.close(held)


class CloudHypervisor:
    """Starts Cloud Hypervisor.

    `on_demand`: restored machines take pages from the saved memory when they touch them, which needs the right to
    handle page faults of the kernel (userfaultfd); else the monitor copies all of it before it goes on.
    """

    name = versions.CLOUD_HYPERVISOR.name
    modules: tuple[str, ...] = kernel.VSOCK_BOOT
    command_line = _COMMAND_LINE
    loads_packed_kernels = False
    stands_ready = False
    maps_files = False
    takes_tap = False

    def __init__(self, start: Start, program: str | None = None, *, on_demand: bool = False) -> None:
        self._start = start
        self._on_demand = on_demand
        self._program = program or versions.program_of(versions.CLOUD_HYPERVISOR)

    async def version(self) -> str:
        """Its version. Raises IsolationUnavailable below 51."""
        return await asyncio.to_thread(versions.version_of, self._program, versions.CLOUD_HYPERVISOR)

    async def boot(self, parts: Parts, cgroup: Cgroup | None) -> Machine:
        """Start a machine from its kernel, and wait until its agent serves."""
        assert parts.boot is not None
        machine = await self._begin({"memory": parts.memory, **disks(parts)}, parts, cgroup)
        try:
            # Files of its own: its Landlock domain takes no rule for a memory file.
            for name, fd in (("kernel", parts.boot.kernel), ("initramfs", parts.boot.initramfs)):
                await asyncio.to_thread(machine.monitor.home.put, name, os.pread(fd, os.fstat(fd).st_size, 0))
            await machine.api.call("PUT", "/vm.create", configuration(parts))
            await machine.api.call("PUT", "/vm.boot")
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
        """Start a machine where another was saved."""
        if filled is not None:
            await asyncio.shield(filled)
        devices = read_devices(device_state)
        machine = await self._begin({"memory": parts.memory, **disks(parts)}, parts, cgroup)
        home = machine.monitor.home
        body: dict[str, Any] = {"source_url": _URL, "prefault": False, "resume": False}
        if self._on_demand:
            body["memory_restore_mode"] = "OnDemand"
        try:
            home.directory(_SAVED, written=False)
            home.put(f"{_SAVED}/{_CONFIG}", restored_configuration(devices.config, parts))
            home.put(f"{_SAVED}/{_STATE}", devices.state.encode())
            home.link(f"{_SAVED}/{_MEMORY}", "../memory")
            await machine.api.call("PUT", "/vm.restore", body)
            machine.started()
        except BaseException:
            await end(machine)
            raise
        return machine

    async def _begin(self, files: dict[str, int], parts: Parts, cgroup: Cgroup | None) -> CloudHypervisorMachine:
        argv = [self._program, "--api-socket", f"path={API_SOCKET}", "--seccomp", "true"]
        monitor = await Monitor.start(self._start, argv, files, cgroup)
        try:
            return CloudHypervisorMachine(monitor, VmmApi(monitor.home, API_SOCKET, BASE), parts)
        except BaseException:
            await monitor.end()
            raise


def configuration(parts: Parts) -> dict[str, Any]:
    """A machine, as `vm.create` takes it."""
    cpus = parts.hardware.cpus
    words = parts.boot.words if parts.boot else ""
    return {
        "cpus": {"boot_vcpus": cpus, "max_vcpus": cpus, "nested": False},
        "memory": {"size": parts.hardware.memory_bytes, "shared": False, "prefault": False},
        "payload": {"kernel": "kernel", "initramfs": "initramfs", "cmdline": f"{_COMMAND_LINE} {words}".rstrip()},
        "disks": [_disk(name, serial) for name, serial in zip(disks(parts), serials(parts), strict=True)],
        "rng": {"src": "/dev/urandom"},
        # Its own standard output, which is a pipe to us.
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "vsock": {"cid": GUEST_CID, "socket": VSOCK, "id": "vsock"},
        "landlock_enable": True,
        "landlock_rules": [{"path": ".", "access": "rw"}],
    }


def restored_configuration(saved: str, parts: Parts) -> bytes:
    """A saved configuration, with everything that names something on the host said anew. Raises GuestFailed."""
    try:
        found = msgspec.json.decode(saved, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise GuestFailed("a saved machine can't be read", why=f"its configuration: {error}") from error
    wanted = configuration(parts)
    made = {key: found[key] for key in _KEPT if key in found}
    devices = made.get("disks", [])
    shapes = (made.get("vsock", {}), made.get("memory", {}), *(devices if isinstance(devices, list) else (None,)))
    if not all(isinstance(shape, dict) for shape in shapes) or len(devices) != len(wanted["disks"]):
        raise GuestFailed("a saved machine can't be read", why="its configuration is not what was saved")
    # What it says beside that (where its devices are on the bus) belongs to the saved state.
    made["disks"] = [_keep_place(disk) | new for disk, new in zip(devices, wanted["disks"], strict=True)]
    made["vsock"] = _keep_place(made.get("vsock", {})) | wanted["vsock"]
    for name in ("memory", "payload", "rng", "serial", "console", "landlock_enable", "landlock_rules"):
        made[name] = wanted[name]
    # The kernel was only needed to boot, and its files are not there any more.
    made["payload"] = {"kernel": "root", "cmdline": _COMMAND_LINE}
    return msgspec.json.encode(made)


def read_devices(device_state: int) -> Devices:
    """What `save` wrote. Raises GuestFailed."""
    size = os.fstat(device_state).st_size
    try:
        return msgspec.json.decode(os.pread(device_state, min(size, 2 * _MOST_JSON), 0), type=Devices)
    except msgspec.MsgspecError as error:
        raise GuestFailed("a saved machine can't be read", why=f"its devices: {error}") from error


def _keep_place(device: dict[str, Any]) -> dict[str, Any]:
    return {key: device[key] for key in ("id", "pci_segment", "pci_device_id") if device.get(key) is not None}


def _disk(name: str, serial: str) -> dict[str, Any]:
    return {
        "id": name,
        "path": name,
        "serial": serial,
        "readonly": name != "scratch",
        # Never guessed: a guest that writes another format's header to its disk could have the host's files read.
        "image_type": "Raw",
        "rate_limiter_config": {
            "bandwidth": {"size": DISK_BYTES_PER_S, "refill_time": 1000},
            "ops": {"size": DISK_OPS_PER_S, "refill_time": 1000},
        },
    }
