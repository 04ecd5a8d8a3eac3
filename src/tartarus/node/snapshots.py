"""Snapshots of a sandbox's files: what it changed over its template, kept as a layer of its tenant's."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec

from tartarus.images.memory import KeptSet
from tartarus.images.unpack.capture import copy_tree
from tartarus.model.errors import ImageRefused, InvalidState, NameTaken, SnapshotNotFound, Unsupported
from tartarus.model.ids import new_id
from tartarus.model.library import CreateSnapshot, SnapshotInfo, SnapshotRecord
from tartarus.model.sandbox import Isolation
from tartarus.model.snapshots import ImportSnapshot, SnapshotKind
from tartarus.model.states import State
from tartarus.node.memory import Memory, Source, check_foreign
from tartarus.node.offers import Offer, Offers
from tartarus.node.proving import Prover
from tartarus.node.sandbox import Sandbox
from tartarus.node.secrecy import refuse_to_save
from tartarus.node.uploads import Uploads
from tartarus.store.sandboxes import SandboxStore

_MUST_STAY_DIRECTORIES = (".tartarus", "dev", "proc", "sys", "etc", "opt", "opt/tartarus", "usr")


class SnapshotService:
    """Every tenant's snapshots. `awake` finds a tenant's sandbox, and wakes it if it sleeps."""

    def __init__(
        self,
        store: SandboxStore,
        offers: Offers,
        prover: Prover,
        memory: Memory,
        uploads: Uploads,
        awake: Callable[[str, str], Awaitable[Sandbox]],
    ) -> None:
        self._store = store.snapshots
        self._memory = memory
        self._uploads = uploads
        self._offers = offers
        self._prover = prover
        self._awake = awake

    async def create(self, tenant: str, request: CreateSnapshot) -> SnapshotInfo:
        """Keep what a live sandbox has changed, or its memory too; it stands still meanwhile.

        Raises Unsupported where the host can't look, InvalidState for one that ends meanwhile, NameTaken.
        """
        sandbox = await self._awake(tenant, request.sandbox)
        if request.kind is SnapshotKind.MEMORY:
            return await self.create_of_memory(sandbox, name=request.name, labels=request.labels)
        return await self.create_of_files(sandbox, request.name, request.labels)

    async def check_files(self, sandbox: Sandbox, name: str) -> None:
        """Raise Unsupported or NameTaken, or what else would keep `create_of_files` from beginning."""
        refuse_to_save(sandbox.record.spec)
        os.close(_looked_at(sandbox))
        await self._check_free(sandbox.record.tenant, name)

    async def create_of_files(
        self, sandbox: Sandbox, name: str, labels: dict[str, str], *, details: dict[str, object] | None = None,
        ending: bool = False,
    ) -> SnapshotInfo:  # fmt: skip
        """Keep what it has changed; `ending`: it is in its grace, and ends afterwards. `details`: for the record."""
        refuse_to_save(sandbox.record.spec)
        tenant = sandbox.record.tenant
        changes = _looked_at(sandbox)
        try:
            store = await asyncio.to_thread(self._offers.layers, tenant)
            began = time.perf_counter()
            async with _frozen(sandbox) if ending else _still(sandbox):
                kept = await copy_tree(store, changes, self._offers.unpack_base, kind="snapshot", times=True)
        finally:
            os.close(changes)
        paused_ms = round((time.perf_counter() - began) * 1e3, 3)
        _check(kept.path)
        base = sandbox.offer
        assert base is not None  # the node sets it before anybody can find the sandbox
        layers = (kept.name, *base.layers)
        # No weaker level shows these files.
        offer = msgspec.structs.replace(base, layers=layers, key=f"{base.key}+{kept.name}", floor=Isolation.CONTAINER)
        record = await self._store.insert(
            SnapshotRecord(
                id=new_id("snap"), tenant=tenant, name=name, sandbox=sandbox.record.id,
                template=base.template.id, digest=kept.digest, size_bytes=kept.bytes, created_at=time.time(),
                labels=labels, layers=layers, details=offer.encode() | {"paused_ms": paused_ms} | (details or {}),
            )
        )  # fmt: skip
        return record.info

    async def create_of_memory(
        self, sandbox: Sandbox, *, name: str = "", labels: dict[str, str] | None = None, go_on: bool = True
    ) -> SnapshotInfo:
        """Keep all of a live sandbox. Without `go_on` it stands still afterwards, to be ended.

        Raises Unsupported where the level can't, or it has mounts; NameTaken. It goes on as before then.
        """
        self._memory.require(sandbox)
        if sandbox.record.spec.mounts:
            raise Unsupported(
                "no snapshot of memory can be taken of a sandbox with mounts",
                why="what it has open of the host's files may be other files when it goes on",
                fix="copy the files in with tartarus cp",
            )
        tenant = sandbox.record.tenant
        await self._check_free(tenant, name)
        snapshot_id = new_id("snap")
        async with sandbox.turn:
            kept, paused_ms = await self._memory.save(sandbox, snapshot_id, go_on=go_on)
        facts = {"isolation": kept.facts.isolation, "paused_ms": round(paused_ms, 3)}
        return await self._record_memory(tenant, kept, sandbox.record.id, facts, name, labels or {})

    async def _check_free(self, tenant: str, name: str) -> None:
        """Raise NameTaken before gigabytes are written for nothing; `insert` decides."""
        if name:
            with contextlib.suppress(SnapshotNotFound):
                await self._store.get(tenant, name)
                raise NameTaken(
                    f"you already have a snapshot {name!r}",
                    fix=f"choose another name, or delete it: tartarus snapshot delete {name}",
                )

    async def _record_memory(
        self, tenant: str, kept: KeptSet, sandbox: str, facts: dict[str, object], name: str, labels: dict[str, str]
    ) -> SnapshotInfo:
        try:
            offer = Source(kept.facts).offer
            record = await self._store.insert(
                SnapshotRecord(
                    id=kept.id, tenant=tenant, name=name, sandbox=sandbox, template=offer.template.id,
                    digest=kept.digest, size_bytes=kept.size_bytes, created_at=time.time(), labels=labels,
                    layers=offer.layers, details=offer.encode() | {"kind": SnapshotKind.MEMORY.value} | facts,
                )
            )  # fmt: skip
        except BaseException:
            await asyncio.shield(self._memory.sets.remove(tenant, kept.id))
            raise
        return record.info

    async def bring(self, tenant: str, request: ImportSnapshot) -> SnapshotInfo:
        """Keep a snapshot of memory that was exported. Raises SnapshotRefused and UploadNotFound."""
        await self._check_free(tenant, request.name)
        async with self._uploads.claimed(tenant, request.upload) as path:
            kept = await self._memory.sets.bring(tenant, new_id("snap"), path, self._memory.seals)
        try:
            check_foreign(Source(kept.facts))
        except BaseException:
            await asyncio.shield(self._memory.sets.remove(tenant, kept.id))
            raise
        return await self._record_memory(
            tenant, kept, "", {"isolation": kept.facts.isolation}, request.name, request.labels
        )

    async def export(self, tenant: str, name: str) -> AsyncIterator[bytes]:
        """A snapshot of memory as one sealed file. Raises SnapshotNotFound, Unsupported, SnapshotRefused."""
        record = await self._store.get(tenant, name)
        if record.kind is not SnapshotKind.MEMORY:
            raise Unsupported(
                "only snapshots of memory can be exported", fix="copy files out of a sandbox with tartarus cp"
            )
        pieces = self._memory.sets.export(tenant, record.id, record.digest, self._memory.seals)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def source(self, tenant: str, name: str) -> Source | None:
        """What a sandbox goes on from, for a snapshot of memory. Raises SnapshotNotFound and SnapshotRefused."""
        record = await self._store.get(tenant, name)
        if record.kind is not SnapshotKind.MEMORY:
            return None
        return await self._memory.source(tenant, record.id, record.digest)

    async def list(self, tenant: str) -> builtins.list[SnapshotInfo]:
        """The tenant's, newest first."""
        return [record.info for record in await self._store.list(tenant)]

    async def get(self, tenant: str, name: str) -> SnapshotInfo:
        """One of them, by id, name or id prefix. Raises SnapshotNotFound."""
        return (await self._store.get(tenant, name)).info

    async def delete(self, tenant: str, name: str) -> None:
        """Forget one; live sandboxes made from it go on, and other snapshots made of those."""
        record = await self._store.get(tenant, name)
        await self._store.remove(record)
        if record.kind is SnapshotKind.MEMORY:
            await self._memory.sets.remove(tenant, record.id)
            return
        self._prover.retire(tenant, Offer.of(record.details))


def _looked_at(sandbox: Sandbox) -> int:
    """As `_opened`. Raises Unsupported where the host can't look."""
    changes = _opened(sandbox)
    if changes is None:
        raise Unsupported(
            "no snapshot of files can be taken of this sandbox",
            why=f"it runs at the {sandbox.record.isolation.value} level, or without root",
            fix="snapshots of files take the container level and a daemon that runs as root",
        )
    return changes


@contextlib.asynccontextmanager
async def _frozen(sandbox: Sandbox) -> AsyncIterator[None]:
    """The guest of a sandbox that is about to end: whoever ignored its signal writes no more."""
    await sandbox.guest.pause()
    yield


def _opened(sandbox: Sandbox) -> int | None:
    """A descriptor of what the sandbox has changed; None where the host can't look.

    Opened at once and kept: the path leads through a number that is another sandbox's when this one has ended.
    """
    changes = sandbox.guest.changes()
    if changes is None:
        return None
    try:
        return os.open(changes, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        # A warm interpreter that somebody replaced makes its guests' storage as it likes.
        raise ImageRefused("the sandbox's changes can't be read", why=error.strerror or "") from error


@contextlib.asynccontextmanager
async def _still(sandbox: Sandbox) -> AsyncIterator[None]:
    """The sandbox, paused; it goes on afterwards if it was running. Raises InvalidState for one that has ended."""
    paused = sandbox.record.state is State.PAUSED
    if not paused:
        await sandbox.pause()
    try:
        yield
    finally:
        if not paused:
            with contextlib.suppress(InvalidState):  # it ended meanwhile
                await asyncio.shield(sandbox.resume())


def _check(layer: Path) -> None:
    """Nothing but directories may stand where a sandbox's own mounts go; a live sandbox can't have put it there."""
    for name in _MUST_STAY_DIRECTORIES:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if not stat.S_ISDIR(os.lstat(layer / name).st_mode):
                raise ImageRefused(f"the snapshot has no directory at /{name}", why="the sandbox's own mounts go there")
