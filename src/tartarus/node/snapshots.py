"""Snapshots of a sandbox's files: what it changed over its template, kept as a layer of its tenant's."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from tartarus.images.unpack.capture import copy_tree
from tartarus.model.errors import ImageRefused, InvalidState, Unsupported
from tartarus.model.ids import new_id
from tartarus.model.library import CreateSnapshot, SnapshotInfo, SnapshotRecord
from tartarus.model.sandbox import Isolation
from tartarus.model.states import State
from tartarus.node.offers import Offer, Offers
from tartarus.node.proving import Prover
from tartarus.node.sandbox import Sandbox
from tartarus.store.sandboxes import SandboxStore

_MUST_STAY_DIRECTORIES = (".tartarus", "dev", "proc", "sys", "etc", "opt", "opt/tartarus", "usr")


class SnapshotService:
    """Every tenant's snapshots. `live` finds a tenant's sandbox."""

    def __init__(
        self, store: SandboxStore, offers: Offers, prover: Prover, live: Callable[[str, str], Sandbox]
    ) -> None:
        self._store = store.snapshots
        self._offers = offers
        self._prover = prover
        self._live = live

    async def create(self, tenant: str, request: CreateSnapshot) -> SnapshotInfo:
        """Keep what a live sandbox has changed; it stands still meanwhile.

        Raises Unsupported where the host can't look, InvalidState for one that ends meanwhile, NameTaken.
        """
        sandbox = self._live(tenant, request.sandbox)
        changes = _opened(sandbox)
        if changes is None:
            raise Unsupported(
                "no snapshot can be taken of this sandbox",
                why=f"it runs at the {sandbox.record.isolation.value} level, or without root",
                fix="snapshots take the container level and a daemon that runs as root",
            )
        try:
            store = await asyncio.to_thread(self._offers.layers, tenant)
            async with _still(sandbox):
                kept = await copy_tree(store, changes, self._offers.unpack_base, kind="snapshot", times=True)
        finally:
            os.close(changes)
        _check(kept.path)
        base = sandbox.offer
        assert base is not None  # the node sets it before anybody can find the sandbox
        layers = (kept.name, *base.layers)
        # No weaker level shows these files.
        offer = msgspec.structs.replace(base, layers=layers, key=f"{base.key}+{kept.name}", floor=Isolation.CONTAINER)
        record = await self._store.insert(
            SnapshotRecord(
                id=new_id("snap"), tenant=tenant, name=request.name, sandbox=sandbox.record.id,
                template=base.template.id, digest=kept.digest, size_bytes=kept.bytes, created_at=time.time(),
                labels=request.labels, layers=layers, details=offer.encode(),
            )
        )  # fmt: skip
        return record.info

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
        self._prover.retire(tenant, Offer.of(record.details))


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
