"""Firecracker through its jailer, with a program in its place that takes the documented arguments alone."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.runtimes.microvm import choice, memory
from tartarus.runtimes.microvm.driver import Hardware, Parts
from tartarus.runtimes.microvm.firecracker import Firecracker, FirecrackerMachine
from tartarus.runtimes.microvm.jailer import Jailed
from tartarus.runtimes.microvm.launcher import FIRST_UID, Launcher

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "system-python")]
STAND_IN = Path(__file__).parent / "contract" / "jailer.py"


@pytest.fixture
def place() -> Iterator[Path]:
    """Where jails and disks lie: one file system."""
    path = Path(tempfile.mkdtemp(prefix="tartarus-jails-", dir="/var/tmp"))
    shutil.copy(STAND_IN, path / "jailer")
    (path / "jailer").chmod(0o755)
    (path / "firecracker-v1.17").write_text("copied by the jailer")
    choice.clear_homes(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def launcher() -> AsyncIterator[Launcher]:
    """The nursery of monitors."""
    made = await Launcher.open()
    yield made
    await made.close()


def driver(launcher: Launcher, place: Path) -> Firecracker:
    """The driver, jailed."""
    program = str(place / "firecracker-v1.17")
    return Firecracker(Jailed(launcher, place / "homes" / "jails", program, str(place / "jailer")), program)


def parts(place: Path) -> Parts:
    """A sealed memory, an image that has a name, a scratch disk that may get one."""
    sealed = memory.create(1024**2)
    os.pwrite(sealed, b"memory ", 0)
    memory.seal(sealed)
    (place / "root.erofs").write_bytes(b"erofs image")
    (place / "root.erofs").chmod(0o444)
    scratch = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(scratch, b"scratch disk")
    return Parts(Hardware(1024**2, 1), sealed, os.open(place / "root.erofs", os.O_RDONLY), scratch)


def state() -> int:
    """A device state."""
    fd = os.memfd_create("state")
    os.write(fd, b"state of devices")
    return fd


async def found(machine: FirecrackerMachine) -> dict[str, Any]:
    """What the jailed program saw."""
    into = os.memfd_create("found")
    machine.monitor.home.take("found.json", 1024**2, into)
    seen: dict[str, Any] = json.loads(os.pread(into, 1024**2, 0))
    return seen


async def test_a_jail_holds_what_its_machine_is_made_of(launcher: Launcher, place: Path) -> None:
    """And nothing else; what only is to be read can't be written, and clones share their memory's file."""
    shared = parts(place)
    machines = [await driver(launcher, place).restore(shared, state(), None)]
    jailed = driver(launcher, place)
    machines += [await jailed.restore(shared, state(), None) for _ in range(2)]
    inodes = []
    for machine in machines:
        assert isinstance(machine, FirecrackerMachine)
        inodes.append((machine.monitor.home.path / "memory").stat().st_ino)
        seen = await found(machine)
        assert seen["names"] == ["memory", "root", "scratch", "state"]
        assert set(seen["uid"]) == {machine.monitor.home.uid}
        assert machine.monitor.home.uid >= FIRST_UID
        assert seen["reads"]["memory"] == "memory "
        assert seen["reads"]["root"] == "erofs i"
        assert seen["writes"] == {
            "memory": "PermissionError", "root": "PermissionError", "scratch": "written", "state": "PermissionError",
        }  # fmt: skip
    assert inodes[1] == inodes[2]
    assert os.pread(shared.scratch, 12, 0) == b"monitor disk"
    for machine in machines:
        machine.kill()
        await machine.ended
        machine.channel.close()
    assert os.listdir(place / "homes" / "jails" / "firecracker-v1.17") == []
    choice.clear_homes(place)
    assert os.listdir(place / "homes") == []


async def test_what_a_jailed_machine_saves_is_taken_out(launcher: Launcher, place: Path) -> None:
    """Its memory and its disk, where the disk could only be copied in."""
    made = parts(place)
    (place / "named").write_bytes(b"fresh scratch")
    scratch = os.open(place / "named", os.O_RDWR)
    (place / "named").unlink()
    made = Parts(made.hardware, memory.create(1024**2), made.root, scratch)
    machine = await driver(launcher, place).restore(made, state(), None)
    assert isinstance(machine, FirecrackerMachine)
    machine.monitor.home.drop("memory")  # one that boots has none yet
    into = os.memfd_create("state")
    await machine.save(into)
    assert os.pread(into, 100, 0) == b"of the machine"
    assert os.pread(made.memory, 14, 0) == b"of the machine"
    assert os.fstat(made.memory).st_size == 1024**2
    assert os.pread(scratch, 13, 0) == b"monitorcratch"
    machine.kill()
    await machine.ended
    machine.channel.close()


async def test_a_jailer_that_fails_is_told_with_its_words(launcher: Launcher, place: Path) -> None:
    """And nothing stays."""
    (place / "jailer").write_text("#!/bin/sh\necho jailer: Cannot mknod /dev/kvm >&2\nexit 1\n")
    with pytest.raises(GuestFailed, match="Cannot mknod"):
        await driver(launcher, place).restore(parts(place), state(), None)
    assert os.listdir(place / "homes" / "jails" / "firecracker-v1.17") == []


def test_programs_that_the_jailer_does_not_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before any machine."""
    launcher: Launcher = None  # type: ignore[assignment] # nothing is started
    with pytest.raises(IsolationUnavailable, match="not start Firecracker"):
        Jailed(launcher, place, "/bin/sleep", "/usr/bin/jailer")
    monkeypatch.setenv("PATH", str(place / "nothing"))
    with pytest.raises(IsolationUnavailable, match="jailer is missing"):
        Jailed(launcher, place, str(place / "firecracker-v1.17"))
