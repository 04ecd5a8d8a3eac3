"""Groups of pages, compressed and stored once for each tenant, whichever of its sets they are found in.

A pack is what one set added: frames of zstd one after another, and an index of their digests. It stays until no set
names it. A group is only ever believed when its digest fits, wherever it was found.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import zstandard

from tartarus.durable import private, sync_directory, write_whole
from tartarus.images.memory.manifest import GROUP, damaged

T = TypeVar("T")
_INDEX = struct.Struct(">32sQI")
_MAX_INDEX_BYTES = 2**28
MAX_FRAME = GROUP + 1024
# Twice as fast as level 1 on pages of programs, and a tenth larger.
_LEVEL = -1
_THREADS = 2
_BATCH = 64
_NICE = 15
_KNOWN_PACKS = 32
"""How many of a tenant's packs, newest first, are looked through for groups that a new set has too."""


class Place(NamedTuple):
    """Where a group's frame lies."""

    pack: str
    offset: int
    size: int


class Packs:
    """The packs below one directory. Synchronous: call it in threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._holds = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is collected meanwhile: what is found here, and what is written, is soon named by a set."""
        self._root.mkdir(mode=0o700, exist_ok=True)
        with self._lock:
            self._holds += 1
        try:
            yield
        finally:
            with self._lock:
                self._holds -= 1

    def collect(self, needed: Callable[[], set[str]]) -> None:
        """Remove the packs that are not `needed`, unless somebody is about to name some."""
        with self._lock:
            if not self._holds:
                for name in set(self.names()) - needed():
                    self.remove(name)

    def names(self) -> list[str]:
        """Every whole pack, newest first."""
        found = sorted(self._root.glob("*.pack"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [path.stem for path in found]

    def index(self, names: Iterable[str]) -> dict[bytes, Place]:
        """Where each group of these packs lies. Raises SnapshotRefused for a pack that is gone or damaged."""
        places: dict[bytes, Place] = {}
        for name in names:
            try:
                content = _read_capped(self._root / f"{name}.index", _MAX_INDEX_BYTES)
            except OSError as error:
                raise damaged(f"a part of its pages is gone: {error.strerror}") from error
            if len(content) % _INDEX.size:
                raise damaged("an index of its pages is cut off")
            for digest, offset, size in _INDEX.iter_unpack(content):
                places[digest] = Place(name, offset, size)
        return places

    def known(self) -> dict[bytes, Place]:
        """Where groups lie that a new set need not write again."""
        return self.index(self.names()[:_KNOWN_PACKS])

    def write(self, name: str, work: Iterable[T], read: Callable[[T], tuple[bytes, bytes]]) -> bool:
        """Make a pack of what `read` gives for each piece of work, (digest, group); on disk when it returns.

        `read` runs in several threads. False when there was no work.
        """
        new = self._root / f".{name}.new"
        index = bytearray()
        offset = 0
        try:
            with open(new, "xb", opener=private) as file:
                for digest, frame in _compressed(work, read):
                    file.write(frame)
                    index += _INDEX.pack(digest, offset, len(frame))
                    offset += len(frame)
                file.flush()
                os.fsync(file.fileno())
            if not index:
                return False
            write_whole(self._root / f"{name}.index", bytes(index))
            new.rename(self._root / f"{name}.pack")
            sync_directory(self._root)
        finally:
            new.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Forget a pack that no set names."""
        (self._root / f"{name}.pack").unlink(missing_ok=True)
        (self._root / f"{name}.index").unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what a killed daemon left half-done."""
        whole = {path.stem for path in self._root.glob("*.pack")}
        for path in [*self._root.glob(".*.new"), *self._root.glob("*.index")]:
            if path.name.startswith(".") or path.stem not in whole:
                path.unlink(missing_ok=True)

    def reader(self) -> Reader:
        """Reads groups; close it."""
        return Reader(self._root)


class Reader:
    """Reads groups from packs, each checked against its digest. Several threads may share one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def group(self, digest: bytes, place: Place) -> bytes:
        """One group. Raises SnapshotRefused when it is not what was written."""
        return unpacked(self.frame(place), digest)

    def frame(self, place: Place) -> bytes:
        """A group's frame as it lies there."""
        if place.size > MAX_FRAME:
            raise damaged("a group of its pages is too long")
        with self._lock:
            if place.pack not in self._files:
                try:
                    path = self._root / f"{place.pack}.pack"
                    self._files[place.pack] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                except OSError as error:
                    raise damaged(f"a part of its pages is gone: {error.strerror}") from error
        return os.pread(self._files[place.pack], place.size, place.offset)

    def close(self) -> None:
        """Let go of the packs."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def unpacked(frame: bytes, digest: bytes) -> bytes:
    """The group in a frame. Raises SnapshotRefused when it is another one, or claims to be more than a group."""
    try:
        # The library would reserve what a frame claims before it looks at any limit.
        if not 0 < zstandard.frame_content_size(frame) <= GROUP:
            raise damaged("a group of its pages claims an impossible size")
        group = zstandard.ZstdDecompressor().decompress(frame, max_output_size=GROUP)
    except zstandard.ZstdError as error:
        raise damaged(f"a group of its pages can't be read: {error}") from error
    if hashlib.sha256(group).digest() != digest:
        raise damaged("a group of its pages is not what was written")
    return group


def _compressed(work: Iterable[T], read: Callable[[T], tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    local = threading.local()

    def compress(piece: T) -> tuple[bytes, bytes]:
        if not hasattr(local, "compressor"):
            local.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        digest, group = read(piece)
        frame: bytes = local.compressor.compress(group)
        return digest, frame

    source = iter(work)
    with ThreadPoolExecutor(_THREADS, "memory-pack", _be_nice) as threads:
        while batch := list(islice(source, _BATCH)):
            yield from threads.map(compress, batch)


def _be_nice() -> None:
    """What packs what rests gives way to whatever runs."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _read_capped(path: Path, most: int) -> bytes:
    with open(path, "rb", opener=private) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise damaged(f"{path.name} is larger than {most} bytes")
    return content
