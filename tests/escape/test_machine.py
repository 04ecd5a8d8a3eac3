"""The microVM level from inside, as root of the machine's own kernel: what is there to attack, and what comes of it.

The catalogue's attacks ask a shared kernel for what it must not give; here the kernel is the attacker's. What counts is
what its machine has (no network, no bus to search, no disk it may write but its own), that what it uses up is its own,
and that whatever it does to itself ends it and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.microvm.conftest import RESOURCES, anyio_backend, rootfs, runtime, sh, snapshot, start, state_dir

from tartarus.guest.channel import GuestExec
from tartarus.model.errors import TartarusError
from tartarus.runtimes.base import GuestRequest
from tartarus.runtimes.microvm.guest import MONITOR_BYTES, MachineGuest
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.microvm.snapshot import MachineSnapshot, hardware_for

__all__ = ["anyio_backend", "rootfs", "runtime", "snapshot", "state_dir"]
pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "microvm", "cgroups")]
MIB = 1024**2


@pytest.fixture(scope="module")
async def inside(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> AsyncIterator[MachineGuest]:
    """One machine for all attacks that leave it alive."""
    guest = await start(runtime, snapshot, "escape-shared")
    yield guest
    assert (await sh(guest, "echo alive")) == "alive\n"
    await guest.destroy()


@pytest.mark.parametrize(
    ("attack", "answer"),
    [
        ("ls /sys/class/net", "lo\n"),
        ("ls /sys/bus/pci/devices 2>/dev/null", ""),
        ("ls /dev/kvm /dev/vfio /dev/vhost-net /dev/vhost-vsock 2>/dev/null", ""),
        ("ls /sys/bus/usb/devices /sys/class/scsi_host /sys/class/drm 2>/dev/null", ""),
        ("ls /sys/block", "vda\nvdb\n"),
        ("cat /sys/block/vda/ro /sys/block/vdb/ro", "1\n0\n"),
        ("ls /sys/bus/virtio/devices | wc -l", "4\n"),
        ("ls /sys/class/virtio-ports", "vport2p1\n"),
        ("mount -t 9p host /root 2>/dev/null || mount -t virtiofs host /root 2>/dev/null || echo none", "none\n"),
        ("cat /dev/vport2p1 2>&1 >/dev/null | grep -c busy", "1\n"),
    ],
    ids=lambda text: text[:40] if len(text) > 12 else "",
)
async def test_a_machine_has_little(inside: MachineGuest, attack: str, answer: str) -> None:
    """Two disks, a console port, randomness; nothing that leads out."""
    assert await sh(inside, attack) == answer


@pytest.mark.parametrize(
    "attack",
    [
        "dd if=/dev/zero of=/dev/vda bs=4096 count=1",
        "echo 0 > /sys/block/vda/ro; mount -o remount,rw /dev/vda; dd if=/dev/zero of=/dev/vda bs=4096 count=1",
        "dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync seek=1",
    ],
)
async def test_the_image_that_all_share_stays_as_it_is(
    inside: MachineGuest, snapshot: MachineSnapshot, attack: str
) -> None:
    """Whatever its kernel is told, the monitor has the image open for reading only."""
    before = os.pread(snapshot.images.root, 1 << 20, 0)
    await sh(inside, f"({attack}) 2>/dev/null; sync")
    assert os.pread(snapshot.images.root, 1 << 20, 0) == before
    flags = Path(f"/proc/{inside.pid}/fdinfo")
    image = os.fstat(snapshot.images.root)
    held = [fd for fd in flags.iterdir() if os.stat(f"/proc/{inside.pid}/fd/{fd.name}").st_ino == image.st_ino]
    assert held
    for fd in held:
        assert int(fd.read_text().split("flags:")[1].split()[0], 8) & os.O_ACCMODE == os.O_RDONLY


async def test_what_it_uses_up_is_its_own(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """Memory, disk and tasks: the host gives what the limits say and the monitor's share, and other machines go on."""
    other = await start(runtime, snapshot, "escape-other")
    guest = await start(runtime, snapshot, "escape-bombs")
    most = hardware_for(RESOURCES).memory_bytes + MONITOR_BYTES
    # First the limits that its own kernel holds are lifted, as a root can.
    for bomb in (
        "echo max > /sys/fs/cgroup/sandbox/memory.max; dd if=/dev/zero of=/dev/null bs=400M count=1",
        "mount -t tmpfs -o size=100% none /root; dd if=/dev/zero of=/root/fill bs=1M count=1000",
        "dd if=/dev/zero of=/work/fill bs=1M count=1000; rm /work/fill",
        "echo max > /sys/fs/cgroup/sandbox/pids.max; for i in $(seq 200); do sleep 20 & done",
    ):
        with contextlib.suppress(TartarusError, TimeoutError):
            await asyncio.wait_for(sh(guest, f"({bomb}) 2>/dev/null >&2; echo"), 30)
        used = guest.stats()
        assert used.memory_bytes <= most
        assert used.disk_bytes <= RESOURCES.disk_bytes
        assert used.pids <= 64
    assert await sh(other, "echo alive") == "alive\n"
    await asyncio.gather(guest.destroy(), other.destroy())


async def test_a_device_that_is_told_nonsense(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """Its own registers and port memory, as root may reach them: at the worst its machine ends."""
    guest = await start(runtime, snapshot, "escape-registers")
    other = await start(runtime, snapshot, "escape-neighbour")
    nonsense = "for at in 0xfeb00000 0xfeb02000 0xc0000000 0xfec00000; do dd if=/dev/urandom of=/dev/mem bs=64 count=8"
    script = f"{nonsense} seek=$((at/64)) conv=notrunc; done; dd if=/dev/urandom of=/dev/port bs=1 count=200 seek=1280"
    guest.channel.exec(GuestExec(argv=("/bin/sh", "-c", f"({script}) 2>/dev/null"), env={"PATH": "/bin"}))
    await asyncio.sleep(1)
    assert await sh(other, "echo alive") == "alive\n"
    await asyncio.gather(guest.destroy(), other.destroy())


async def test_a_flood_on_the_console_is_forgotten(inside: MachineGuest) -> None:
    """Of what its kernel says the monitor keeps the last 64 KiB."""
    before = inside.stats().memory_bytes
    await sh(inside, "dd if=/dev/zero bs=64k count=30 2>/dev/null | head -c 100000 > /dev/ttyS0; echo end > /dev/ttyS0")
    assert len(await inside.console()) <= 4000
    assert inside.stats().memory_bytes < before + 32 * MIB


async def test_a_limit_that_is_below_what_a_kernel_needs(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """The machine gets what its kernel needs; its programs what was asked for."""
    few = msgspec.structs.replace(RESOURCES, memory_bytes=16 * MIB)
    guest = await runtime.clone(snapshot, GuestRequest("escape-small", "small", few), warm=False)
    assert isinstance(guest, MachineGuest)
    await guest.ready()
    said = await sh(guest, "dd if=/dev/zero of=/dev/shm/fill bs=1M count=64 2>/dev/null; echo $?")
    assert said != "0\n"
    await guest.destroy()
