"""What a template's machine has as read-only disks: one image of its layers, and one for each host directory it shows.

A host directory (`/usr` of the host base) is packed once for all templates, and again when something in it changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from tartarus.model.errors import NoSpace, Unsupported
from tartarus.model.units import format_size
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.microvm import packing
from tartarus.runtimes.trees import remove_tree

_log = structlog.get_logger("tartarus.runtimes.microvm")
_KEPT_S = 30 * 86400.0
_MOST_BINDS = 8
_READ_BYTES = 1024 * 1024
_OTHERS_READ, _OTHERS_ENTER = 0o004, 0o005
_MOST_UNREADABLE = 1000
_BLOCK = 4096
_ROOM = 1.1
"""What an image takes of what its files have: names and directories come on top."""


class Images(msgspec.Struct, frozen=True):
    """Open images. `identity`: of the root's content and of the binds', which a saved machine must find again."""

    root: int
    binds: tuple[tuple[int, str], ...]
    identity: str

    def close(self) -> None:
        """Let go of them; machines keep what they have open."""
        close_all((self.root, *(fd for fd, _ in self.binds)))


class Packer:
    """Keeps the images of a daemon in `place`."""

    def __init__(self, place: Path, stage: Path, id_map: IdMap) -> None:
        self._place = place
        self._stage = stage
        self._id_map = id_map
        self._lock = asyncio.Lock()
        for leftover in place.glob(".*-*"):
            remove_tree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        for image in place.glob("*.erofs"):
            if time.time() - image.stat().st_mtime > _KEPT_S:
                image.unlink(missing_ok=True)

    async def open(self, rootfs: RootFs) -> Images:
        """The images of a template, packed now if they are not there."""
        for directory in (self._place, self._stage):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(rootfs.binds) > _MOST_BINDS:
            raise Unsupported(f"a microVM shows at most {_MOST_BINDS} directories of the host")
        held: list[tuple[int, str]] = []
        try:
            async with self._lock:
                root, identity = await self._root(rootfs)
                held.append((root, "/"))
                for source, target in rootfs.binds:
                    fd, name = await self._bind(Path(source))
                    held.append((fd, target))
                    identity = hashlib.sha256(f"{identity} {target} {name}".encode()).hexdigest()
        except BaseException:
            close_all(fd for fd, _ in held)
            raise
        return Images(root, tuple(held[1:]), identity)

    async def _root(self, rootfs: RootFs) -> tuple[int, str]:
        image = self._place / f"{rootfs.digest.replace(':', '-')}.erofs"
        digest = image.with_suffix(".sha256")
        if not (image.exists() and digest.exists()):
            _log.info("packing", template=rootfs.template.id)
            await self._pack(image, packing.merged(rootfs.layers), f"the image of template {rootfs.template.id}")
            content = await asyncio.to_thread(_sha256, image)
            digest.write_text(content)
        os.utime(image)
        return os.open(image, os.O_RDONLY | os.O_CLOEXEC), digest.read_text()

    async def _bind(self, source: Path) -> tuple[int, str]:
        found = await asyncio.to_thread(survey, source)
        stamp, unreadable = found.stamp, found.unreadable
        prefix = f"host-{hashlib.sha256(os.fsencode(source)).hexdigest()[:12]}-"
        image = self._place / f"{prefix}{stamp}.erofs"
        if not image.exists():
            _log.info("packing", directory=str(source), size_bytes=found.size_bytes)
            _require_room(self._place, found.size_bytes, source)
            await self._pack(image, packing.Source((source,), unreadable), f"the image of the host's {source}")
            for other in self._place.glob(f"{prefix}*"):
                if other != image:
                    other.unlink(missing_ok=True)
        os.utime(image)
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        # By its number too: what was packed anew lies differently, whatever it holds.
        return fd, f"{stamp} {os.fstat(fd).st_ino}"

    async def _pack(self, target: Path, source: packing.Source, what: str) -> None:
        aside = self._place / f".making-{os.getpid()}"
        aside.unlink(missing_ok=True)
        try:
            await packing.pack(source, self._stage, aside, self._id_map, what)
            aside.rename(target)
        finally:
            aside.unlink(missing_ok=True)


class Survey(NamedTuple):
    """What lies below a host directory: a stamp of it, what not everybody may read (paths below it), how much it is."""

    stamp: str
    unreadable: tuple[str, ...]
    size_bytes: int


def survey(top: Path) -> Survey:
    """Look at all of it, but for what is mounted there. Raises Unsupported."""
    seen = hashlib.sha256()
    unreadable: list[str] = []
    size = 0
    pending = [os.fspath(top)]
    device = top.stat().st_dev
    while pending:
        directory = pending.pop()
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                facts = f"{status.st_mode} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
                seen.update(f"{entry.path}\0{facts}\n".encode("utf-8", "surrogateescape"))
                is_directory = entry.is_dir(follow_symlinks=False)
                needed = _OTHERS_ENTER if is_directory else _OTHERS_READ
                if not entry.is_symlink() and (status.st_mode & needed) != needed:
                    unreadable.append(os.path.relpath(entry.path, top))
                elif is_directory and status.st_dev == device:
                    pending.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    size += -(-status.st_size // _BLOCK) * _BLOCK
    if len(unreadable) > _MOST_UNREADABLE:
        raise Unsupported(f"{top} has too many files that only root may read", fix="use a template of its own files")
    return Survey(seen.hexdigest()[:24], tuple(unreadable), size)


def _require_room(place: Path, size: int, what: Path) -> None:
    free = shutil.disk_usage(place).free
    if free < size * _ROOM:
        raise NoSpace(
            f"there is no room for microVMs' image of the host's {what}",
            why=f"it takes {format_size(int(size * _ROOM))}, and {format_size(free)} are free in {place}",
            fix="make room there, or use a template of its own files",
        )


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            found.update(chunk)
    return found.hexdigest()
