"""From the name of a template or snapshot to the root file system that sandboxes are made on.

Built-in templates are prepared here on first use; users' own templates and snapshots lie in a layer store of their
tenant's, since whoever can name a layer by its content must not get somebody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from tartarus.images import LayerStore, catalogue, prepare
from tartarus.model.definition import TemplateResources
from tartarus.model.errors import InvalidState, TemplateBlocked, TemplateFailed, TemplateNotFound
from tartarus.model.library import TemplateRecord, TemplateStatus
from tartarus.model.sandbox import Isolation
from tartarus.model.settings import Settings
from tartarus.model.shipped import NAMES
from tartarus.model.template import Template
from tartarus.node.levels import Levels
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.trees import remove_tree
from tartarus.store.sandboxes import SandboxStore

IMAGE = "image"
"""The base of a template that brings all its files; every other base is the host."""


class Offer(msgspec.Struct, frozen=True):
    """What a sandbox can be made of. `layers` are names in the tenant's layer store, top first.

    `floor`: the weakest level it may have (`auto`: none). `key` names the content, within the tenant.
    """

    template: Template
    key: str
    floor: Isolation = Isolation.AUTO
    limits: TemplateResources = TemplateResources()
    layers: tuple[str, ...] = ()

    def encode(self) -> dict[str, object]:
        """As a record's `details` keep it."""
        return {"offer": msgspec.to_builtins(self)}

    @classmethod
    def of(cls, details: dict[str, object]) -> Offer:
        """What `encode` gave."""
        return msgspec.convert(details["offer"], cls)


class Offers:
    """Finds templates and snapshots, and prepares each once."""

    def __init__(self, settings: Settings, store: SandboxStore, levels: Levels) -> None:
        self._settings = settings
        self._store = store
        self._levels = levels
        self._rootfs: dict[tuple[str, str], RootFs] = {}
        self._preparing: dict[tuple[str, str], asyncio.Lock] = {}
        self._layers: dict[str, LayerStore] = {}

    @property
    def host_floor(self) -> Isolation:
        """The weakest level that the administrator allows here."""
        return self._settings.isolation_floor

    @property
    def uid_base(self) -> int | None:
        """The host id that is a sandbox's root, where ids are mapped by a daemon that has root."""
        return self._levels.id_map.base if self._levels.id_map.privileged else None

    @property
    def unpack_base(self) -> int | None:
        """The host id that an image's first ordinary id becomes: also where a user has subordinate ids."""
        return self._levels.id_map.base if self.ids > 1 else None

    @property
    def ids(self) -> int:
        """How many user ids sandboxes have."""
        return self._levels.id_map.span

    def remover(self, place: Path) -> bool:
        """Remove a directory of layers, whoever its files belong to; whether it is gone."""
        if self.unpack_base is None or self.uid_base is not None:
            return remove_tree(place)
        from tartarus.images.unpack.removal import remover

        return remover(self.unpack_base)(place)

    async def record(self, tenant: str, template: str) -> TemplateRecord:
        """A template of the tenant's own. Raises TemplateNotFound."""
        return await self._store.templates.get(tenant, template)

    def layers(self, tenant: str) -> LayerStore:
        """The tenant's own layer store. Nobody else on the host may look into it: layers hold set-id programs."""
        store = self._layers.get(tenant)
        if store is None:
            place = self._settings.cache_dir / "tenants" / tenant
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            store = self._layers[tenant] = LayerStore(place / "layers", remove=self.remover)
        return store

    async def find(self, tenant: str, template: str, snapshot: str = "") -> Offer:
        """What the caller asked for; a snapshot brings its own template.

        Raises TemplateNotFound, SnapshotNotFound, InvalidState, TemplateBlocked.
        """
        if snapshot:
            return Offer.of((await self._store.snapshots.get(tenant, snapshot)).details)
        built_in = catalogue().get(template)
        if built_in is not None:
            return Offer(template=built_in, key=f"built-in:{built_in.id}")
        try:
            record = await self._store.templates.get(tenant, template)
        except TemplateNotFound:
            if template in NAMES:
                raise TemplateNotFound(
                    f"template {template!r} is not built yet", fix=f"tartarus template build {template}"
                ) from None
            known = [*catalogue(), *(own.name for own in await self._store.templates.list(tenant))]
            raise TemplateNotFound(f"no template {template!r}", fix=f"known: {', '.join(sorted(known))}") from None
        return own_offer(record)

    async def host(self) -> RootFs:
        """The host's own programs and nothing of anybody's."""
        return await self.prepared("", Offer(catalogue()["host"], "built-in:host"), lambda _line: None)

    async def prepared(self, tenant: str, offer: Offer, progress: Callable[[str], None]) -> RootFs:
        """Its root file system, made if need be. Raises TemplateFailed and NoSpace."""
        mine = "" if offer.key.startswith("built-in:") and not offer.layers else tenant
        key = (mine, offer.key)
        ready = self._rootfs.get(key)
        if ready is not None:
            return ready
        async with self._preparing.setdefault(key, asyncio.Lock()):
            if key not in self._rootfs:
                self._rootfs[key] = await self._prepare(mine, offer, progress)
        return self._rootfs[key]

    async def _prepare(self, tenant: str, offer: Offer, progress: Callable[[str], None]) -> RootFs:
        own = await asyncio.to_thread(self._own_layers, tenant, offer) if offer.layers else ()
        if offer.template.base == IMAGE:
            return RootFs(offer.template, own, (), f"{tenant}:{offer.key}")
        host = await prepare(offer.template, self._settings, self.uid_base, progress)
        digest = f"{tenant}:{offer.key}:{host.digest}" if tenant else host.digest
        return RootFs(host.template, (*own, *host.layers), host.binds, digest)

    def _own_layers(self, tenant: str, offer: Offer) -> tuple[Path, ...]:
        store = self.layers(tenant)
        found = [store.find(name) for name in offer.layers]
        missing = [name for name, place in zip(offer.layers, found, strict=True) if place is None]
        if missing:
            raise TemplateFailed(
                f"template {offer.template.id!r} lacks files on disk", why=f"missing: {', '.join(missing)}",
                fix="make it again, with --replace",
            )  # fmt: skip
        return tuple(place for place in found if place is not None)

    def forget(self, tenant: str, offer: Offer) -> RootFs | None:
        """The offer is gone: prepare it anew if it comes back. Returns what was made of it."""
        return self._rootfs.pop((tenant, offer.key), None)

    def in_use(self) -> Iterable[RootFs]:
        """Every root file system that was prepared."""
        return self._rootfs.values()


def own_offer(record: TemplateRecord) -> Offer:
    """The offer of a user's own template. Raises InvalidState or TemplateBlocked while it can't be used."""
    if record.status is TemplateStatus.BLOCKED:
        raise TemplateBlocked(
            f"template {record.name!r} is blocked", why=record.message,
            fix=f"see: tartarus template scan {record.name}; build it on newer packages, or change the policy",
        )  # fmt: skip
    if record.status is not TemplateStatus.READY:
        raise InvalidState(
            f"template {record.name!r} is {record.status.value}",
            why=record.message,
            fix="wait for it, or make it again",
        )
    return Offer.of(record.details)
