"""Booted machines kept on disk, so that a daemon that starts anew need not boot and warm them again.

A directory is complete or not there: it is written aside, made durable and renamed. It is named by all that its
machine depends on; what is named otherwise is not looked at, and goes when there are too many. What is read back is
checked against the digests of what was written: a page that rotted would be every guest's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from tartarus.model.errors import GuestFailed
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.microvm import memory, saving
from tartarus.runtimes.microvm.driver import Parts
from tartarus.runtimes.microvm.images import Images
from tartarus.runtimes.microvm.snapshot import Frozen, Size

MOST_KEPT = 12
DIGESTS = "digests.json"
_MOST_DIGESTS = 4096
_ASIDE = ".keeping-"
_log = structlog.get_logger("tartarus.runtimes.microvm")


def name_of(needs: dict[str, str], size: Size, files: dict[str, bytes]) -> str:
    """What a machine is kept under: its monitor, kernel, processor and images, its size, what its init was told."""
    told = {name: content.hex() for name, content in files.items()}
    facts = msgspec.json.encode([needs, msgspec.to_builtins(size), told], order="sorted")
    return hashlib.sha256(facts).hexdigest()[:32]


class KeptMachines:
    """The directories below `place`, which is the daemon's alone."""

    def __init__(self, place: Path) -> None:
        self._place = place
        for leftover in place.glob(f"{_ASIDE}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def load(self, name: str, images: Images) -> Frozen | None:
        """The machine of that name; None where there is none. What can't be read is removed."""
        directory = self._place / name
        if not directory.is_dir():
            return None
        try:
            found = read(directory, images)
            try:
                _verify(found, directory)
            except BaseException:
                found.close()
                raise
        except (GuestFailed, OSError, ValueError) as error:
            _log.warning("kept_machine_unreadable", name=name, error=str(error))
            shutil.rmtree(directory, ignore_errors=True)
            return None
        os.utime(directory)
        return found

    def keep(self, name: str, frozen: Frozen) -> None:
        """Write a machine down, and forget the one that was not used for longest when there are too many."""
        try:
            self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=self._place) as scratch:
                aside = Path(scratch) / "machine"
                aside.mkdir(mode=0o700)
                (aside / DIGESTS).write_text(json.dumps(_digests(frozen)), encoding="ascii")
                write(frozen, aside)
                shutil.rmtree(self._place / name, ignore_errors=True)
                aside.rename(self._place / name)
        except OSError as error:
            _log.warning("machine_not_kept", error=str(error))
        by_use = sorted(self._place.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in by_use[MOST_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)


def _digests(frozen: Frozen) -> dict[str, str]:
    parts = {saving.MEMORY: frozen.parts.memory, saving.SCRATCH: frozen.parts.scratch}
    return {name: memory.digest(fd) for name, fd in (parts | {saving.DEVICES: frozen.device_state}).items()}


def _verify(found: Frozen, directory: Path) -> None:
    """Raise GuestFailed unless the machine that was read is the one that was written."""
    with open(directory / DIGESTS, "rb") as file:
        written = json.loads(file.read(_MOST_DIGESTS))
    if written != _digests(found):
        raise GuestFailed("a kept machine is damaged", why="it is not what was written")


def write(frozen: Frozen, directory: Path) -> None:
    """Its files, durable."""
    parts = frozen.parts
    facts = saving.Facts(parts.hardware, os.fstat(parts.scratch).st_size, frozen.warm)
    (directory / saving.FACTS).write_bytes(msgspec.json.encode(facts))
    for name, source in ((saving.MEMORY, parts.memory), (saving.SCRATCH, parts.scratch)):
        with (directory / name).open("xb") as target:
            memory.copy_data(source, target.fileno())
    size = os.fstat(frozen.device_state).st_size
    (directory / saving.DEVICES).write_bytes(os.pread(frozen.device_state, size, 0))
    for path in [*directory.iterdir(), directory]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def read(directory: Path, images: Images) -> Frozen:
    """A machine to clone from the files in a directory. Raises GuestFailed when they don't fit together."""
    frozen, fill = begin_to_read(directory, images)
    try:
        fill()
    except BaseException:
        frozen.close()
        raise
    return frozen


def begin_to_read(directory: Path, images: Images) -> tuple[Frozen, Callable[[], None]]:
    """The same, its memory empty until `fill` was called, which takes long; it must be, once.

    Into sealed memory: a monitor opens what it maps for writing, and the files must stay as they are. One may be
    started before it is filled, but must know nothing of its machine until then.
    """
    frozen = _opened(directory, images, memory.create)

    def fill() -> None:
        with (directory / saving.MEMORY).open("rb") as source:
            memory.copy_data(source.fileno(), frozen.parts.memory)
        memory.seal(frozen.parts.memory)

    return frozen, fill


def lent(directory: Path, images: Images, lend: Callable[[str], int]) -> Frozen | None:
    """The same for one guest alone, which maps the file itself: nothing is read before it is needed.

    A monitor that its guest took over may write to that file, whose only reader it is. None where what a monitor maps
    of it could not be told again when that guest is saved (Btrfs and overlayfs show their files as others').
    """
    frozen = _opened(directory, images, lambda _: lend(saving.MEMORY))
    if not saving.tells_mapping(frozen.parts.memory):
        frozen.close()
        return None
    memory.read_ahead(frozen.parts.memory)
    return frozen


def _opened(directory: Path, images: Images, open_memory: Callable[[int], int]) -> Frozen:
    facts = saving.read_facts(directory)
    held: list[int] = []
    try:
        held.append(open_memory(facts.hardware.memory_bytes))
        held.append(memory.sealed("devices", (directory / saving.DEVICES).read_bytes()))
        held.append(os.open(directory / saving.SCRATCH, os.O_RDONLY | os.O_CLOEXEC))
    except BaseException:
        close_all(held)
        raise
    parts = Parts(facts.hardware, held[0], images.root, held[2], tuple(fd for fd, _ in images.binds))
    return Frozen(parts, held[1], facts.warm)
