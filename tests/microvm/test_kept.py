"""Booted machines on disk: they come back as they were written, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tartarus.runtimes.microvm import memory
from tartarus.runtimes.microvm.driver import Hardware, Parts
from tartarus.runtimes.microvm.kept import KeptMachines
from tartarus.runtimes.microvm.snapshot import Frozen

SIZE = 16 * 1024**2
IMAGES: Any = SimpleNamespace(root=-1, binds=())
NAME = "0123456789abcdef"


def machine(tmp_path: Path) -> Frozen:
    """What a saved machine is made of."""
    pages = memory.create(SIZE)
    os.pwrite(pages, b"page" * 1024, 5 * 1024**2 + 4096)
    os.pwrite(pages, bytes(8192), 9 * 1024**2)  # zeros that take space
    memory.seal(pages)
    scratch = os.open(tmp_path / "scratch", os.O_RDWR | os.O_CREAT)
    os.ftruncate(scratch, SIZE)
    os.pwrite(scratch, b"disk", SIZE - 4)
    devices = memory.sealed("devices", b"state" * 1000)
    return Frozen(Parts(Hardware(SIZE, 1), pages, -1, scratch, ()), devices, True)


def test_a_kept_machine_comes_back(tmp_path):
    frozen = machine(tmp_path)
    KeptMachines(tmp_path / "kept").keep(NAME, frozen)
    found = KeptMachines(tmp_path / "kept").load(NAME, IMAGES)
    assert found is not None
    assert found.warm
    for ours, theirs in (
        (frozen.parts.memory, found.parts.memory),
        (frozen.parts.scratch, found.parts.scratch),
        (frozen.device_state, found.device_state),
    ):
        assert os.pread(ours, SIZE, 0) == os.pread(theirs, SIZE, 0)
    assert memory.allocated(found.parts.memory) < 64 * 1024
    found.close()
    frozen.close()


@pytest.mark.parametrize("name", ["memory", "scratch", "devices", "digests.json", "machine.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone"])
def test_a_damaged_one_is_not_used(tmp_path, name, damage):
    frozen = machine(tmp_path)
    kept = KeptMachines(tmp_path / "kept")
    kept.keep(NAME, frozen)
    frozen.close()
    path = tmp_path / "kept" / NAME / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 3] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-1])
    before = set(os.listdir("/proc/self/fd"))
    assert kept.load(NAME, IMAGES) is None
    assert not path.parent.exists()
    assert set(os.listdir("/proc/self/fd")) == before
