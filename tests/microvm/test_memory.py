"""Copies of a machine's memory: whole, holes left holes, and none of what is cut short meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tartarus.model.errors import GuestFailed
from tartarus.runtimes.microvm import memory

MIB = 1024**2


def sparse(path: Path) -> int:
    """64 MiB of data in pieces of odd sizes at odd places, in a file four times as long."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, 256 * MIB)
    for index in range(16):
        os.pwrite(fd, bytes([index + 1]) * (4 * MIB + 4096 * index), 15 * MIB * index + 4096 * index)
    return fd


def test_much_of_it(tmp_path: Path) -> None:
    """By several threads at once, into memory and into a file."""
    source = sparse(tmp_path / "source")
    for target in (memory.create(1), os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)):
        memory.copy_data(source, target)
        assert memory.digest(target) == memory.digest(source)
        assert memory.allocated(target) <= memory.allocated(source) + MIB
        os.close(target)
    os.close(source)


def test_one_that_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, not filled up with zeros."""
    source, target = sparse(tmp_path / "source"), memory.create(1)
    pieces = list(memory._pieces(source, 256 * MIB))
    monkeypatch.setattr(memory, "_pieces", lambda *_: iter(pieces))
    os.ftruncate(source, 100 * MIB)
    with pytest.raises(GuestFailed, match="shrank"):
        memory.copy_data(source, target)
    os.close(source)
    os.close(target)
