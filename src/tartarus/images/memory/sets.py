"""The store of sets: each is there whole and verified, or not at all, whatever is killed at whatever moment.

A new set lies there as it was saved ("hot"), so that it can go on at once; when it has rested a while it is packed:
compressed, and groups of pages that other sets of its tenant's have are not kept twice. Using it makes it hot again.
Everything is root's own, below one directory for each tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from tartarus.durable import sync_directory, write_whole
from tartarus.images.blobfiles import in_thread
from tartarus.images.memory import bundle, files
from tartarus.images.memory.bundle import Seals
from tartarus.images.memory.files import Signature, StoredSet, packs_of, signature
from tartarus.images.memory.manifest import FORMAT, Facts, Manifest, check_name, damaged, decode, digest_of
from tartarus.images.memory.packs import Packs
from tartarus.model.errors import GuestFailed, NoSpace, SnapshotNotFound, SnapshotRefused, TartarusError

CACHED = "warm-"
"""How the ids of sets begin that can be made again: they give way when the disk budget is reached, oldest first."""
HOT_S = 300.0
"""How long a set that nobody uses stays as it was saved before it is packed."""
_STAGING = ".staging-"
_P = ParamSpec("_P")
_T = TypeVar("_T")


class KeptSet(msgspec.Struct, frozen=True):
    """A set that is in the store. `size_bytes`: what its files hold."""

    id: str
    digest: str
    size_bytes: int
    created_at: float
    facts: Facts


class Taken:
    """A set that was verified and is being used; its files stay where they are meanwhile."""

    def __init__(self, path: Path, facts: Facts, signatures: dict[str, Signature]) -> None:
        self.path = path
        self.facts = facts
        self._signatures = signatures

    def lend(self, name: str) -> int:
        """A descriptor of a file that others can then open by it, whoever they are, to read and to write.

        For who is alone with the set. What they write is noticed: by `confirm`, and by who takes the set again. Raises
        SnapshotRefused.
        """
        with files.opened(self.path / name) as fd:
            if signature(fd) != self._signatures.get(name):
                raise damaged(f"{name} was changed while it was used")
            os.fchmod(fd, 0o666)  # the directories above it stay root's own
            self._signatures[name] = signature(fd)
            return os.dup(fd)

    def confirm(self) -> None:
        """Raise SnapshotRefused if its files were changed or replaced since they were verified."""
        for name, known in self._signatures.items():
            try:
                fd = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise damaged(f"{name} is gone: {error.strerror}") from error
            try:
                if signature(fd) != known:
                    raise damaged(f"{name} was changed while it was used")
            finally:
                os.close(fd)


class MemorySets:
    """Sets below `root`. `budget_bytes`: how much all of them may take on disk."""

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget = budget_bytes
        self._locks: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = weakref.WeakValueDictionary()
        self._tenants_packs: dict[str, Packs] = {}
        self._stopping = False
        self._users: dict[tuple[str, str], int] = {}
        self._used_at: dict[tuple[str, str], float] = {}
        self._verified: dict[tuple[str, str], dict[str, Signature]] = {}

    def stop(self) -> None:
        """Begin no long work any more, and end what goes on."""
        self._stopping = True

    def open(self) -> None:
        """Remove what a killed daemon left half-done."""
        for tenant in self._tenants():
            left = (f"{_STAGING}*", "sets/.*", "sets/*/.*", "sets/*/maps/.*")
            for path in [found for pattern in left for found in tenant.glob(pattern)]:
                if path.is_dir():
                    shutil.rmtree(path)
                else:  # what was being written; or it lay in one that has gone just now
                    path.unlink(missing_ok=True)
            if (tenant / "packs").is_dir():
                self._packs(tenant.name).clean()
                self._collect(tenant.name)

    @contextlib.asynccontextmanager
    async def staging(self, tenant: str) -> AsyncIterator[Path]:
        """An empty directory for a runtime to save into, on the store's own file system; `keep` takes it away."""
        place = self._staging(tenant)
        (place / files.RAW).mkdir(mode=0o700)
        try:
            yield place / files.RAW
        finally:
            await in_thread(shutil.rmtree, place, ignore_errors=True)

    async def keep(self, tenant: str, set_id: str, staged: Path, facts: Facts) -> KeptSet:
        """Keep what was saved into `staged`; it is on disk when this returns, and nothing is kept when it raises.

        A set that had this id is replaced. Raises NoSpace, also when the disk budget is reached.
        """
        check_name(set_id)
        async with self._lock((tenant, set_id)):
            return await in_thread(_explained, self._keep, tenant, set_id, staged.parent, facts)

    def _keep(self, tenant: str, set_id: str, staging: Path, facts: Facts) -> KeptSet:
        entries, signatures = files.describe(staging)
        manifest = Manifest(format=FORMAT, created_at=time.time(), facts=facts, files=entries)
        content = manifest.encode()
        write_whole(staging / files.MANIFEST, content)
        sync_directory(staging)
        self._make_room(allocated(staging))
        self._publish(tenant, set_id, staging)
        self._verified[tenant, set_id] = signatures
        return KeptSet(set_id, digest_of(content), manifest.data_bytes, manifest.created_at, facts)

    def _publish(self, tenant: str, set_id: str, staging: Path) -> None:
        place = self._place(tenant, set_id)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        files.remove(place)
        staging.rename(place)
        sync_directory(place.parent)
        sync_directory(place.parent.parent)
        self._used_at[tenant, set_id] = time.monotonic()

    @contextlib.asynccontextmanager
    async def taken(self, tenant: str, set_id: str, digest: str) -> AsyncIterator[Taken]:
        """The set's files for `Runtime.restore`, each verified, for as long as the context lasts.

        Raises SnapshotNotFound for one that is not there, SnapshotRefused for one that is not what was written.
        """
        key = (tenant, set_id)
        async with self._lock(key):
            place = self._place(tenant, set_id)
            if not place.is_dir():
                raise SnapshotNotFound(f"the memory of {set_id} is not on this host's disk", fix="take it anew")
            facts = await in_thread(_explained, self._prepare, key, digest)
            self._users[key] = self._users.get(key, 0) + 1
        try:
            yield Taken(place / files.RAW, facts, dict(self._verified[key]))
        finally:
            self._users[key] -= 1
            self._used_at[key] = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                os.utime(place)

    def _prepare(self, key: tuple[str, str], digest: str) -> Facts:
        """Have its files lie there verified."""
        tenant, set_id = key
        found = StoredSet(self._place(tenant, set_id), digest)
        if found.is_hot:
            try:
                self._verified[key] = found.verify(self._verified.get(key, {}))
                return found.manifest.facts
            except SnapshotRefused:
                self._verified.pop(key, None)
                if found.packs is None or self._users.get(key):
                    raise
                files.remove(found.place / files.RAW)  # a copy that a crash cut short: the packs have it all
        staging = self._staging(tenant)
        try:
            signatures = found.put_together(self._packs(tenant), staging)
            staging.rename(found.place / files.RAW)
            self._verified[key] = signatures
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return found.manifest.facts

    async def export(self, tenant: str, set_id: str, digest: str, seals: Seals) -> AsyncGenerator[bytes, None]:
        """A set as one sealed file, piece by piece. Raises what `taken` does."""
        async with self.taken(tenant, set_id, digest) as found:
            pieces = bundle.write(StoredSet(found.path.parent, digest), seals)
            while piece := await in_thread(next, pieces, b""):
                yield piece

    async def bring(self, tenant: str, set_id: str, path: Path, seals: Seals) -> KeptSet:
        """Keep a set that `export` wrote. Raises SnapshotRefused for what no trusted host sealed, and NoSpace."""
        check_name(set_id)
        async with self._lock((tenant, set_id)):
            return await in_thread(_explained, self._bring, tenant, set_id, path, seals)

    def _bring(self, tenant: str, set_id: str, path: Path, seals: Seals) -> KeptSet:
        staging = self._staging(tenant)
        packs = self._packs(tenant)
        try:
            self._make_room(path.stat().st_size, counted=False)
            with packs.held():
                content = bundle.read(path, staging, packs, seals)
                self._publish(tenant, set_id, staging)
        except BaseException:
            self._collect(tenant)  # its pack, if it got one
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        manifest = decode(content)
        return KeptSet(set_id, digest_of(content), manifest.data_bytes, manifest.created_at, manifest.facts)

    async def facts(self, tenant: str, set_id: str, digest: str) -> Facts:
        """What a set says of itself. Raises SnapshotNotFound and SnapshotRefused."""
        place = self._place(tenant, set_id)
        if not place.is_dir():
            raise SnapshotNotFound(f"the memory of {set_id} is not on this host's disk", fix="take it anew")
        return (await in_thread(files.read_manifest, place, digest)).facts

    async def remove(self, tenant: str, set_id: str) -> None:
        """Forget a set; one that is being used goes when it is not. Safe to repeat."""
        while True:
            async with self._lock((tenant, set_id)):
                if not self._users.get((tenant, set_id)):
                    await in_thread(self._remove, tenant, set_id)
                    return
            await asyncio.sleep(0.02)  # a restore takes a moment

    def _remove(self, tenant: str, set_id: str) -> None:
        files.remove(self._place(tenant, set_id))
        self._verified.pop((tenant, set_id), None)
        self._used_at.pop((tenant, set_id), None)
        self._collect(tenant)

    async def cool(self, unused_s: float = HOT_S) -> None:
        """Pack the sets that nobody used for that long. Raises what kept one of them from it, after all were tried."""
        failed: TartarusError | None = None
        for tenant in self._tenants():
            for place in self._sets(tenant.name):
                key = (tenant.name, place.name)
                rested = time.monotonic() - self._used_at.setdefault(key, time.monotonic()) >= unused_s
                if self._stopping or not rested or not (place / files.RAW).is_dir():
                    continue
                try:
                    await self._cool_one(key)
                except TartarusError as error:
                    self._used_at[key] = time.monotonic()  # not again at once
                    failed = failed or error
        if failed is not None:
            raise failed

    async def _cool_one(self, key: tuple[str, str]) -> None:
        async with self._lock(key):
            if not self._users.get(key) and self._place(*key).is_dir():
                await in_thread(_explained, self._pack, key)

    def _pack(self, key: tuple[str, str]) -> None:
        tenant, set_id = key
        place = self._place(tenant, set_id)
        if packs_of(place) is None:
            packs = self._packs(tenant)
            found = StoredSet(place, digest_of((place / files.MANIFEST).read_bytes()))
            with packs.held():
                found.pack(packs, os.urandom(8).hex(), lambda: self._stopping)
        self._verified.pop(key, None)
        files.remove(place / files.RAW)

    async def sweep(self, known: Collection[str], *, older_than_s: float) -> list[str]:
        """Remove the sets that nobody knows, of an id that is not in `known`, and are older than that; their ids."""
        removed = []
        for tenant in self._tenants():
            for place in self._sets(tenant.name):
                stranger = place.name not in known and not place.name.startswith(CACHED)
                if stranger and time.time() - place.stat().st_mtime >= older_than_s:
                    await self.remove(tenant.name, place.name)
                    removed.append(place.name)
        return removed

    def used_bytes(self) -> int:
        """What all sets take on disk."""
        return allocated(self._root)

    def _make_room(self, adding: int, *, counted: bool = True) -> None:
        """Keep to the budget. `counted`: what is being added lies there already."""
        over = self.used_bytes() + (0 if counted else adding) - self._budget
        for place in (*self._copies(), *self._cached()):
            if over <= 0:
                return
            over -= allocated(place)
            files.remove(place)
        if over > 0:
            raise NoSpace(
                "no space left for the memory of this sandbox",
                why=f"it takes {adding} bytes, and memory snapshots may take {self._budget} in all",
                fix="delete some (tartarus snapshot list), or raise memory_budget in the daemon's configuration",
            )

    def _copies(self) -> list[Path]:
        """The files of packed sets that nobody uses: their packs have all of them."""
        return [place / files.RAW for place in self._unused() if (place / files.PACKED).exists()]

    def _cached(self) -> list[Path]:
        """Sets that can be made again and nobody uses, the longest unused first."""
        found = [place for place in self._unused() if place.name.startswith(CACHED)]
        return sorted(found, key=lambda place: place.stat().st_mtime)

    def _unused(self) -> Iterator[Path]:
        for tenant in self._tenants():
            for place in self._sets(tenant.name):
                key = (tenant.name, place.name)
                if not self._users.get(key) and key not in self._locks:
                    yield place

    def _collect(self, tenant: str) -> None:
        """Remove the packs that no set names; none while a set can't say which it names."""
        with contextlib.suppress(SnapshotRefused):
            self._packs(tenant).collect(
                lambda: {name for place in self._sets(tenant) for name in packs_of(place) or ()}
            )

    def _staging(self, tenant: str) -> Path:
        """A directory on the store's file system, for root alone, as all above it in the store are."""
        place = self._root / tenant / f"{_STAGING}{os.urandom(8).hex()}"
        for directory in (self._root, self._root / tenant):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.mkdir(mode=0o700)
        return place

    def _packs(self, tenant: str) -> Packs:
        return self._tenants_packs.setdefault(tenant, Packs(self._root / tenant / "packs"))

    def _place(self, tenant: str, set_id: str) -> Path:
        return self._root / tenant / "sets" / check_name(set_id)

    def _sets(self, tenant: str) -> list[Path]:
        try:
            return [path for path in (self._root / tenant / "sets").iterdir() if not path.name.startswith(".")]
        except FileNotFoundError:
            return []

    def _tenants(self) -> list[Path]:
        try:
            return [path for path in self._root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        except FileNotFoundError:
            return []

    def _lock(self, key: tuple[str, str]) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())


def allocated(place: Path) -> int:
    """What a directory's files take on disk, in bytes."""
    total = 0
    for directory, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total


def _explained(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    try:
        return work(*args, **kwargs)
    except TartarusError:
        raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace(
                "no space left for the memory of a sandbox", why=str(error),
                fix="delete snapshots, or free some disk",
            ) from error  # fmt: skip
        raise GuestFailed("the memory of a sandbox can't be kept", why=str(error)) from error
