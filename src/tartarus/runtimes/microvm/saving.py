"""Writing a live machine down: its memory beside what it was cloned from, its devices' state, its scratch disk.

A clone maps its template's memory privately, so what it changed are the anonymous pages of that mapping; the kernel
tells them apart. The unchanged rest, and a first copy of what was changed, are written while it runs. Stopped it is
only for what it wrote meanwhile.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import mmap
import os
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from tartarus.model.errors import GuestFailed, NoSpace, TartarusError
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.microvm import memory
from tartarus.runtimes.microvm.driver import Hardware, Machine

MEMORY, DEVICES, SCRATCH, FACTS = "memory", "devices", "scratch", "machine.json"
MOST_DEVICE_BYTES = 16 * 1024 * 1024
"""QEMU's microvm has some 50 KiB of it."""
MOST_FACTS = 4096
_PAGE = mmap.PAGESIZE
_PRESENT, _SWAPPED, _SHARED, _SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 61, 1 << 55
_ENTRIES_AT_ONCE = 8192
_RUN_BYTES = 4 * 1024 * 1024
_CLEAR_SOFT_DIRTY = b"4"
_FREEZE_S = 10.0


Freeze = Callable[[bool], Awaitable[bool]]


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the files belong to."""

    hardware: Hardware
    scratch_bytes: int
    warm: bool


class Area(NamedTuple):
    """A piece of a monitor's mapping of its machine's memory."""

    start: int
    end: int
    offset: int


async def save(
    machine: Machine, base: int, scratch: int, facts: Facts, directory: Path, freeze: Freeze, *, go_on: bool
) -> float:
    """Write the files; milliseconds that the machine stood still. It goes on when this fails.

    `base`: the memory that it was cloned from. `freeze` stands its programs still, or lets them go on: in a copy none
    may run before it was made another machine. Raises GuestFailed or NoSpace.
    """
    try:
        (directory / FACTS).write_bytes(msgspec.json.encode(facts))
        with Pages(machine.pid, base, directory / MEMORY) as pages, (directory / SCRATCH).open("xb") as copy:
            await asyncio.to_thread(memory.copy_data, base, pages.file)
            await asyncio.to_thread(pages.copy_running)
            before = _written(scratch)
            await asyncio.to_thread(memory.copy_data, scratch, copy.fileno())
            began = time.perf_counter()
            try:
                if not await asyncio.wait_for(freeze(True), _FREEZE_S):
                    raise GuestFailed("a machine's programs don't stand still", why="one of them can't be frozen")
                await machine.pause()
                await asyncio.to_thread(pages.copy_stopped)
                if _written(scratch) != before:
                    copy.truncate(0)
                    await asyncio.to_thread(memory.copy_data, scratch, copy.fileno())
                await _save_devices(machine, directory / DEVICES)
            except BaseException:
                await asyncio.shield(_go_on(machine, freeze))
                raise
            if go_on:
                await _go_on(machine, freeze)
            return round((time.perf_counter() - began) * 1e3, 3)
    except TimeoutError as error:
        raise GuestFailed("a machine's memory can't be written down", why="its agent does not answer") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("a machine's memory can't be written down", why="the disk is full") from error
        raise GuestFailed("a machine's memory can't be written down", why=error.strerror or str(error)) from error


async def _go_on(machine: Machine, freeze: Freeze) -> None:
    await machine.resume()
    await asyncio.wait_for(freeze(False), _FREEZE_S)


def _written(scratch: int) -> tuple[int, int]:
    status = os.fstat(scratch)
    return status.st_mtime_ns, status.st_blocks


async def _save_devices(machine: Machine, target: Path) -> None:
    # First into memory, which the monitor's own group pays for: it may be its guest's by now.
    state = os.memfd_create("tartarus-devices", os.MFD_CLOEXEC)
    try:
        end = os.open(f"/proc/self/fd/{state}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            await machine.save_devices(end)
        finally:
            os.close(end)
        size = os.fstat(state).st_size
        if not 0 < size <= MOST_DEVICE_BYTES:
            raise GuestFailed("a machine's devices can't be saved", why=f"their state has {size} bytes")
        target.write_bytes(os.pread(state, size, 0))
    finally:
        os.close(state)


class Pages:
    """Copies what a monitor changed of its machine's memory into a file."""

    def __init__(self, pid: int, base: int, target: Path) -> None:
        self._fds: list[int] = []
        try:
            self._areas = areas(pid, base)
            self._pagemap = self._open(f"/proc/{pid}/pagemap", os.O_RDONLY)
            self._memory = self._open(f"/proc/{pid}/mem", os.O_RDONLY)
            self._clear = self._open(f"/proc/{pid}/clear_refs", os.O_WRONLY)
            self.file = self._open(str(target), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except BaseException:
            self.__exit__()
            raise
        self._copied = False

    def _open(self, path: str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._fds.append(fd)
        return fd

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *_: object) -> None:
        close_all(self._fds)
        self._fds.clear()

    def copy_running(self) -> None:
        """Copy it once; what is written from now on is seen by `copy_stopped`."""
        if soft_dirty_works():
            os.write(self._clear, _CLEAR_SOFT_DIRTY)
            self._copy(0)
            self._copied = True

    def copy_stopped(self) -> None:
        """Copy what `copy_running` did not, or what was written since."""
        self._copy(_SOFT_DIRTY if self._copied else 0)

    def _copy(self, wanted: int) -> None:
        for area in self._areas:
            for start, end in self._changed(area, wanted):
                address = start
                while address < end:
                    data = os.pread(self._memory, min(end - address, _RUN_BYTES), address)
                    if not data:
                        raise OSError(errno.EIO, "the machine's memory can't be read")
                    os.pwrite(self.file, data, area.offset + address - area.start)
                    address += len(data)

    def _changed(self, area: Area, wanted: int) -> Iterator[tuple[int, int]]:
        """Runs of addresses whose pages are the monitor's own, and were written if `wanted` says so."""
        nothing = bytes(8 * _ENTRIES_AT_ONCE)
        run = 0
        address = area.start
        while address < area.end:
            count = min(_ENTRIES_AT_ONCE, (area.end - address) // _PAGE)
            entries = os.pread(self._pagemap, 8 * count, address // _PAGE * 8)
            if len(entries) != 8 * count:
                raise OSError(errno.EIO, "the machine's page map can't be read")
            if not run and entries == nothing[: 8 * count]:
                address += count * _PAGE
                continue
            for entry in array("Q", entries):
                if entry & (_PRESENT | _SWAPPED) and not entry & _SHARED and entry & wanted == wanted:
                    run = run or address
                elif run:
                    yield run, address
                    run = 0
                address += _PAGE
        if run:
            yield run, area.end


def areas(pid: int, base: int) -> list[Area]:
    """Where a monitor maps its machine's memory. Raises GuestFailed unless that is all of it, once."""
    status = os.fstat(base)
    found = sorted(_mapped(pid, status), key=lambda area: area.offset)
    at = 0
    for area in found:
        if area.offset != at:
            break
        at += area.end - area.start
    if at != status.st_size:
        raise GuestFailed("a machine's memory can't be saved", why="its monitor does not map it as it was told to")
    return found


def _mapped(pid: int, status: os.stat_result) -> Iterator[Area]:
    """Where a process maps the file of that status."""
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, rights, offset, device, inode = line.split(maxsplit=5)[:5]
        major, _, minor = device.partition(":")
        if int(inode) == status.st_ino and os.makedev(int(major, 16), int(minor, 16)) == status.st_dev:
            start, _, end = addresses.partition("-")
            if not rights.endswith("p"):
                raise GuestFailed("a machine's memory can't be saved", why="it is not a private copy")
            yield Area(int(start, 16), int(end, 16), int(offset, 16))


def tells_mapping(fd: int) -> bool:
    """Whether `areas` finds mappings of that file: some file systems show another device there than the file has."""
    with mmap.mmap(fd, _PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ):
        return any(_mapped(os.getpid(), os.fstat(fd)))


@functools.cache
def soft_dirty_works() -> bool:
    """Whether this kernel notes which pages were written (CONFIG_MEM_SOFT_DIRTY)."""
    with mmap.mmap(-1, _PAGE) as page:
        page[0] = 1
        view = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(view)
        del view  # or the page could not be given back
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            (entry,) = array("Q", os.pread(fd, 8, address // _PAGE * 8))
        finally:
            os.close(fd)
    return bool(entry & _SOFT_DIRTY)


def read_facts(directory: Path) -> Facts:
    """What a directory holds, its files' sizes checked against it. Raises GuestFailed."""
    try:
        described = directory / FACTS
        if described.stat().st_size > MOST_FACTS:
            raise GuestFailed("a saved machine can't be read", why=f"{FACTS} is too long")
        facts = msgspec.json.decode(described.read_bytes(), type=Facts)
        sizes = {MEMORY: facts.hardware.memory_bytes, SCRATCH: facts.scratch_bytes}
        for name, size in sizes.items():
            if (directory / name).stat().st_size != size:
                raise GuestFailed("a saved machine can't be read", why=f"{name} does not have {size} bytes")
        if not 0 < (directory / DEVICES).stat().st_size <= MOST_DEVICE_BYTES:
            raise GuestFailed("a saved machine can't be read", why=f"{DEVICES} is empty or too long")
    except TartarusError:
        raise
    except (OSError, msgspec.MsgspecError) as error:
        raise GuestFailed("a saved machine can't be read", why=str(error)) from error
    return facts
