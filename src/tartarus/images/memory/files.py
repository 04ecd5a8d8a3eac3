"""The files of one set: written with their maps, checked against them, packed and put together again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from tartarus.durable import sync_directory, write_whole
from tartarus.images.memory.manifest import (
    MAP_ENTRY,
    MAX_DATA_BYTES,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    check_map,
    check_name,
    damaged,
    decode,
    entries_of,
    file_digest,
    group_size,
)
from tartarus.images.memory.packs import Packs, Place, Reader
from tartarus.images.memory.sparse import content_map, read_group, write_group
from tartarus.model.errors import GuestFailed, InvalidState, SnapshotRefused

MANIFEST, MAPS, RAW, PACKED = "manifest.json", "maps", "raw", "packs.json"
_MAX_PACKS = 65536
_THREADS = 2
_BATCH_ENTRIES = 64

Signature = tuple[int, ...]
"""What tells that a file was not touched: nobody sets a file's change time but the kernel."""


def signature(fd: int) -> Signature:
    """Which file it is, and when it was last changed."""
    found = os.fstat(fd)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def describe(place: Path) -> tuple[tuple[FileEntry, ...], dict[str, Signature]]:
    """Write the maps of the files in ``raw``, all on disk when it returns; the files are then no more to be changed.

    Raises GuestFailed for what no runtime may leave there.
    """
    raw, maps = place / RAW, place / MAPS
    maps.mkdir(mode=0o700)
    names = sorted(os.listdir(raw))
    entries, signatures = [], {}
    with ThreadPoolExecutor(1, "memory-sync") as syncing, contextlib.ExitStack() as held:
        files = [(name, held.enter_context(_regular(raw / _saved_name(name, len(names))))) for name in names]
        on_disk = [syncing.submit(os.fdatasync, fd) for _, fd in files]
        for name, fd in files:
            content, size = content_map(fd), os.fstat(fd).st_size
            write_whole(maps / name, content)
            entries.append(FileEntry(name, size, len(content) // MAP_ENTRY.size, file_digest(size, content)))
            if size > MAX_FILE_BYTES:
                raise GuestFailed(
                    "the saved sandbox can't be kept", why=f"{name} is larger than {MAX_FILE_BYTES} bytes"
                )
        for done in on_disk:
            done.result()
        # Only now: what was written is on disk, and nothing touches the files from here on.
        for name, fd in files:
            os.fchmod(fd, 0o600)
            signatures[name] = signature(fd)
    if not entries or sum(entry.groups for entry in entries) > MAX_DATA_BYTES:
        raise GuestFailed("the saved sandbox can't be kept", why="there is nothing of it, or too much")
    for directory in (raw, maps):
        sync_directory(directory)
    return tuple(entries), signatures


def _saved_name(name: str, count: int) -> str:
    if count > MAX_FILES:
        raise GuestFailed("the saved sandbox can't be kept", why=f"it has {count} files, and {MAX_FILES} are known")
    return check_name(name)


@contextlib.contextmanager
def _regular(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise damaged(f"{path.name} is no file")
        yield fd
    finally:
        os.close(fd)


class StoredSet:
    """One set below `place`. Synchronous: call it in threads."""

    def __init__(self, place: Path, digest: str) -> None:
        """Read its manifest and its maps. Raises SnapshotRefused unless they are those of that digest."""
        self.place = place
        self.manifest = read_manifest(place, digest)
        self._maps: dict[str, bytes] = {}
        for entry in self.manifest.files:
            content = _read(place / MAPS / entry.name, entry.groups * MAP_ENTRY.size)
            check_map(entry, content)
            self._maps[entry.name] = content

    @property
    def is_hot(self) -> bool:
        """Whether its files lie there as they were saved."""
        return (self.place / RAW).is_dir()

    @property
    def packs(self) -> list[str] | None:
        """The packs that have its groups, in the order in which later ones count; None when it is not packed."""
        return packs_of(self.place)

    def verify(self, known: dict[str, Signature]) -> dict[str, Signature]:
        """Check its files, all of them or those that `known` does not have unchanged; their signatures."""
        if set(os.listdir(self.place / RAW)) != {entry.name for entry in self.manifest.files}:
            raise damaged("it has other files than were written")
        found = {}
        for entry in self.manifest.files:
            with opened(self.place / RAW / entry.name) as fd:
                before = signature(fd)
                if known.get(entry.name) != before and (
                    os.fstat(fd).st_size != entry.size or content_map(fd) != self._maps[entry.name]
                ):
                    raise damaged(f"{entry.name} is not what was written")
                if signature(fd) != before:
                    raise damaged(f"{entry.name} was changed while it was checked")
                found[entry.name] = before
        return found

    def pack(self, packs: Packs, name: str, stop: Callable[[], bool]) -> None:
        """Have all its groups in packs. What is found in the packs of others is checked, and else written anew.

        Raises InvalidState when `stop` says so; nothing has changed then.
        """
        known, used = packs.known(), set()
        reader = packs.reader()
        with contextlib.ExitStack() as held:
            held.callback(reader.close)

            def missing() -> Iterator[tuple[int, FileEntry, int, bytes]]:
                seen: set[bytes] = set()
                for entry in self.manifest.files:
                    fd = held.enter_context(opened(self.place / RAW / entry.name))
                    for number, digest in entries_of(self._maps[entry.name]):
                        if digest in seen:
                            continue
                        seen.add(digest)
                        place = known.get(digest)
                        if place is not None and _is_there(reader, digest, place):
                            used.add(place.pack)
                        else:
                            yield fd, entry, number, digest

            def read(piece: tuple[int, FileEntry, int, bytes]) -> tuple[bytes, bytes]:
                if stop():
                    raise InvalidState("the daemon is stopping", fix="the set stays as it is until it runs again")
                fd, entry, number, digest = piece
                group = read_group(fd, number, group_size(entry, number))
                if hashlib.sha256(group).digest() != digest:
                    raise damaged(f"{entry.name} is not what was written")
                return digest, group

            made = packs.write(name, missing(), read)
        write_whole(self.place / PACKED, msgspec.json.encode([*sorted(used), *([name] if made else [])]))
        sync_directory(self.place)

    def put_together(self, packs: Packs, target: Path) -> dict[str, Signature]:
        """Write its files from its packs into an empty directory; their signatures."""
        names = self.packs
        if names is None:
            raise damaged("its files are gone")
        reader, places = packs.reader(), packs.index(names)
        found = {}
        try:
            for entry in self.manifest.files:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(target / entry.name, flags, 0o600)
                try:
                    os.ftruncate(fd, entry.size)
                    self._fill(fd, entry, reader, places)
                    found[entry.name] = signature(fd)
                finally:
                    os.close(fd)
        finally:
            reader.close()
        return found

    def _fill(self, fd: int, entry: FileEntry, reader: Reader, places: dict[bytes, Place]) -> None:
        def put(batch: list[tuple[int, bytes]]) -> None:
            for number, group in self.groups(entry, reader, places, batch):
                write_group(fd, number, group)

        entries = list(entries_of(self._maps[entry.name]))
        batches = [entries[at : at + _BATCH_ENTRIES] for at in range(0, len(entries), _BATCH_ENTRIES)]
        with ThreadPoolExecutor(_THREADS, "memory-unpack") as threads:
            for _ in threads.map(put, batches):
                pass

    @staticmethod
    def groups(
        entry: FileEntry, reader: Reader, places: dict[bytes, Place], wanted: list[tuple[int, bytes]]
    ) -> Iterator[tuple[int, bytes]]:
        """(number, content) of groups of a file, each checked."""
        for number, digest in wanted:
            place = places.get(digest)
            if place is None:
                raise damaged(f"pages of {entry.name} are gone")
            group = reader.group(digest, place)
            if len(group) != group_size(entry, number):
                raise damaged(f"a group of {entry.name} has another size")
            yield number, group

    def map_of(self, name: str) -> bytes:
        """A file's map."""
        return self._maps[name]


def read_manifest(place: Path, digest: str | None = None) -> Manifest:
    """The manifest of the set at `place`. Raises SnapshotRefused."""
    return decode(_read(place / MANIFEST, MAX_MANIFEST_BYTES), digest)


def packs_of(place: Path) -> list[str] | None:
    """The packs that the set at `place` names; None when it names none."""
    try:
        names = msgspec.json.decode(_read(place / PACKED, 1024**2), type=list[str])
    except SnapshotRefused:
        return None
    except msgspec.DecodeError as error:
        raise damaged(f"its list of packs can't be read: {error}") from error
    if len(names) > _MAX_PACKS:
        raise damaged(f"it names more than {_MAX_PACKS} packs")
    return [check_name(name) for name in names]


def remove(place: Path) -> None:
    """Remove a directory of the store's, out of sight in one step first."""
    aside = place.with_name(f".removing-{os.urandom(8).hex()}")
    with contextlib.suppress(FileNotFoundError):
        place.rename(aside)
        shutil.rmtree(aside)


def _is_there(reader: Reader, digest: bytes, place: Place) -> bool:
    try:
        reader.group(digest, place)
    except (SnapshotRefused, OSError):
        return False
    return True


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file of the set, opened once; whatever is done with it is done with this descriptor."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise damaged(f"{path.name} can't be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise damaged(f"{path.name} is no file")
        yield fd
    finally:
        os.close(fd)


def _read(path: Path, most: int) -> bytes:
    with opened(path) as fd, os.fdopen(os.dup(fd), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise damaged(f"{path.name} is longer than it was")
    return content
