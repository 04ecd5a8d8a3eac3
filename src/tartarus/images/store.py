"""Prepared directories by digest: made once, whole or not at all, whoever asks and whatever is killed.

A build works in a temporary directory beside its place, under a file lock, and is renamed when it is on
disk. Whoever else wants the same digest waits for the lock and then finds it done. The lock is held by the
build's own child processes too (they inherit the file), so what a killed daemon left is removed only when
nothing writes to it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from tartarus.model.errors import NoSpace, TemplateFailed

_TEMPORARY = ".making-"
_LOCK = ".lock-"
_MANIFEST = "manifest.json"
# flock(2) reports no readiness to wait for; this is how often a second asker looks while the first builds.
_LOOK_EVERY_S = 0.02

Build = Callable[[Path, int], Awaitable[dict[str, Any]]]
"""Fills the empty directory it is given; the number is the lock's file, for children to inherit.
Returns facts for the manifest."""


class LayerStore:
    """Directories under `root`, each named by what it holds (``rootfs-1f3c…``)."""

    def __init__(self, root: Path, *, remove: Callable[[Path], object] = shutil.rmtree) -> None:
        """Open the store, make it if it is new, and remove what killed builds left.

        `remove`: what removes a directory; one that foreign code filled takes more care than the default has.
        """
        self._root = root
        self._remove_directory = remove
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        except OSError as error:
            raise _explained(error, str(root)) from error

    def find(self, name: str) -> Path | None:
        """The finished directory `name`, marked as used now, or None; one that lacks a part is not finished."""
        place = self._root / name
        if not ((place / "tree").is_dir() and (place / _MANIFEST).is_file()):
            return None
        os.utime(place)
        return place / "tree"

    async def get(self, name: str, build: Build) -> Path:
        """The finished directory `name`; `build` makes it if nobody has.

        Raises what `build` raises, NoSpace when the disk is full, TemplateFailed when it can't be written.
        """
        found = self.find(name)
        if found is not None:
            return found
        async with self._locked(name) as lock:
            found = self.find(name)
            if found is None:
                found = await self._make(name, lock, build)
        return found

    async def _make(self, name: str, lock: int, build: Build) -> Path:
        temporary = self._root / f"{_TEMPORARY}{name}"
        self._remove(temporary)
        self._remove(self._root / name)
        try:
            (temporary / "tree").mkdir(parents=True)
            facts = await build(temporary / "tree", lock)
            (temporary / _MANIFEST).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
            await asyncio.to_thread(_sync, temporary)
            temporary.rename(self._root / name)
            _sync(self._root)
        except OSError as error:
            raise _explained(error, name) from error
        finally:
            await asyncio.to_thread(self._remove, temporary)
        return self._root / name / "tree"

    def manifest(self, name: str) -> dict[str, Any]:
        """What was recorded when `name` was made: packages and their versions, the interpreter, the date."""
        facts: dict[str, Any] = json.loads((self._root / name / _MANIFEST).read_text())
        return facts

    def names(self) -> list[str]:
        """The names of all finished directories."""
        return [place.name for place in self._root.iterdir() if not place.name.startswith(".")]

    def remove_unused(self, keep: Collection[str], unused_s: float) -> list[str]:
        """Remove the directories that are not in `keep` and were last asked for more than `unused_s` ago."""
        removed = []
        for place in self._root.iterdir():
            if place.name.startswith(".") or place.name in keep or time.time() - place.stat().st_mtime < unused_s:
                continue
            with self._lock_now(place.name) as held:
                if held is not None:
                    # Out of sight in one step; if we are killed now, the next start removes the rest.
                    place.rename(self._root / f"{_TEMPORARY}{place.name}")
                    self._remove(self._root / f"{_TEMPORARY}{place.name}")
                    removed.append(place.name)
        return removed

    def _remove(self, place: Path) -> None:
        if place.is_dir():
            self._remove_directory(place)
        else:
            place.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        for path in [*self._root.glob(f"{_TEMPORARY}*"), *self._root.glob(f"{_LOCK}*")]:
            name = path.name.removeprefix(_TEMPORARY).removeprefix(_LOCK)
            with self._lock_now(name) as held:  # and a lock that was held is removed
                if held is not None:
                    self._remove(self._root / f"{_TEMPORARY}{name}")

    @contextlib.asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[int]:
        while True:
            with self._lock_now(name) as held:
                if held is not None:
                    yield held
                    return
            await asyncio.sleep(_LOOK_EVERY_S)

    @contextlib.contextmanager
    def _lock_now(self, name: str) -> Iterator[int | None]:
        """Hold the lock of `name` (yields its file), or find that another has it (yields None)."""
        path = self._root / f"{_LOCK}{name}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if not _is_still(path, file):
                # The holder before us removed the file; a newcomer may hold its successor.
                yield None
                return
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
        finally:
            os.close(file)


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _sync(place: Path) -> None:
    """Put everything written to the file system of `place` on disk: one call for thousands of files."""
    file = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(file) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(place))
    finally:
        os.close(file)


def _explained(error: OSError, name: str) -> TemplateFailed | NoSpace:

    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(f"no space left to prepare {name}", why=str(error), fix="free some disk, or move TARTARUS_HOME")
    return TemplateFailed(f"can't prepare {name}", why=str(error))
