"""All that a node does for templates and snapshots, put together."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tartarus.model.library import SnapshotRecord, TemplateRecord
from tartarus.model.settings import Settings
from tartarus.node.levels import Levels
from tartarus.node.memory import Memory
from tartarus.node.networking import Networking
from tartarus.node.offers import Offer, Offers
from tartarus.node.pool import SnapshotPool
from tartarus.node.profiles import Profiles
from tartarus.node.proving import Prover
from tartarus.node.sandbox import Sandbox
from tartarus.node.scanning import Scanner
from tartarus.node.snapshots import SnapshotService
from tartarus.node.spares import SparePool
from tartarus.node.templates import TemplateService
from tartarus.node.uploads import Uploads
from tartarus.store.sandboxes import SandboxStore

if TYPE_CHECKING:
    from tartarus.node.building import Builder
    from tartarus.node.connecting import Connections
    from tartarus.node.stacks import Stacks

_UNUSED_KEPT_S = 3600.0
_CACHE_KEPT_S = 30 * 86400.0
_CACHE = "build-"
"""What the layers that a Dockerfile's steps made are named: kept for the next build of it."""


class Tools:
    """What making templates takes, each made when it is first needed: most daemons' first sandbox needs none."""

    def __init__(
        self, settings: Settings, store: SandboxStore, levels: Levels, offers: Offers, uploads: Uploads,
        scanner: Scanner, prover: Prover, networking: Networking,
    ) -> None:  # fmt: skip
        self._networking = networking
        self._settings = settings
        self._store = store
        self._levels = levels
        self._offers = offers
        self._uploads = uploads
        self._scanner = scanner
        self._prover = prover

    @functools.cached_property
    def stacks(self) -> Stacks:
        """Images and archives into layers."""
        from tartarus.node.stacks import Stacks

        return Stacks(self._settings, self._offers, self._uploads)

    @functools.cached_property
    def connections(self) -> Connections:
        """The network of build steps."""
        from tartarus.node.connecting import Connections

        return Connections(self._networking)

    @functools.cached_property
    def builder(self) -> Builder:
        """Dockerfiles into layers."""
        from tartarus.node.building import Builder

        return Builder(
            self._store, self._offers, self.stacks, self._levels, self.connections, self._uploads, self.contexts,
            self._scanner, self._prover,
        )  # fmt: skip

    @property
    def contexts(self) -> Path:
        """Where build contexts lie while their build goes on."""
        return self._settings.cache_dir / "contexts"

    async def clean(self) -> None:
        """Remove what a killed daemon's builds left."""
        await asyncio.to_thread(self._offers.remover, self.contexts)


class Library:
    """`open` before use, `close` at the end."""

    def __init__(
        self,
        settings: Settings,
        store: SandboxStore,
        levels: Levels,
        pool: SnapshotPool,
        offers: Offers,
        spares: SparePool,
        memory: Memory,
        awake: Callable[[str, str], Awaitable[Sandbox]],
        networking: Networking,
        profiles: Profiles,
    ) -> None:
        self._memory = memory
        self.held: Callable[[], Iterable[Offer | None]] = tuple
        self._tenants = settings.cache_dir / "tenants"
        self._store = store
        self._pool = pool
        self._offers = offers
        self.uploads = Uploads(settings.cache_dir / "uploads", most_bytes=settings.upload_bytes)
        prover = Prover(levels, pool, offers, spares, profiles)
        scanner = Scanner(settings, self.uploads, lambda: offers.uid_base)
        self._tools = Tools(settings, store, levels, offers, self.uploads, scanner, prover, networking)
        self.templates = TemplateService(store, offers, self._tools, prover, scanner)
        self.snapshots = SnapshotService(store, offers, prover, memory, self.uploads, awake)

    async def open(self) -> None:
        """Remove what an earlier daemon left, and warm what users made."""
        await asyncio.to_thread(self.uploads.open)
        await asyncio.to_thread(self._memory.sets.open)
        await self._sweep_memory(older_than_s=0.0)
        await self._tools.clean()
        holders = {str(record.details.get("holder")) for record in await self._store.templates.all()}
        for tenant in await asyncio.to_thread(_names, self._tenants):
            await asyncio.to_thread(self._offers.layers, tenant)  # opening it removes what was half-made
            await asyncio.to_thread(_release_others, self._tenants / tenant / "blobs", holders)
        await self.templates.open()

    async def close(self) -> None:
        """Stop warming, remove uploads that nobody used."""
        await self.templates.close()
        await self._memory.close()
        await asyncio.to_thread(self.uploads.close)

    async def sweep(self) -> None:
        """Remove layers and blobs that no template, snapshot or live sandbox needs."""
        records: list[TemplateRecord | SnapshotRecord] = [
            *await self._store.templates.all(),
            *await self._store.snapshots.all(),
        ]
        await self._pool.sweep()
        needed = [*self._offers.in_use(), *self._pool.rootfs_in_use()]
        used = {path.parent.name for rootfs in needed for path in rootfs.layers}
        for record in records:
            used.update(record.layers)
        for offer in self.held():
            used.update(() if offer is None else offer.layers)
        await self._sweep_memory(older_than_s=_UNUSED_KEPT_S)
        self._memory.cool()
        tenants = await asyncio.to_thread(_names, self._tenants)
        for tenant in tenants:
            if not self.templates.is_making(tenant):
                await asyncio.to_thread(self._sweep_one, tenant, used)

    async def _sweep_memory(self, *, older_than_s: float) -> None:
        """Remove what was saved for snapshots that are not recorded, or sandboxes that have ended."""
        known = {record.id for record in await self._store.snapshots.all()}
        known |= {record.id for record in await self._store.alive()}
        await self._memory.sets.sweep(known, older_than_s=older_than_s)

    def _sweep_one(self, tenant: str, used: set[str]) -> None:
        layers = self._offers.layers(tenant)
        cached = {name for name in layers.names() if name.startswith(_CACHE)}
        layers.remove_unused(used | cached, _UNUSED_KEPT_S)
        layers.remove_unused(used, _CACHE_KEPT_S)
        self._tools.stacks.blobs(tenant).collect()


def _release_others(blobs: Path, holders: set[str]) -> None:
    """Hold nothing for what was being made when an earlier daemon was killed."""
    if blobs.is_dir():
        from tartarus.images.blobs import BlobStore

        store = BlobStore(blobs)
        for owner in store.held().keys() - holders:
            store.release(owner)


def _names(place: Path) -> list[str]:
    try:
        return [path.name for path in place.iterdir()]
    except FileNotFoundError:
        return []
