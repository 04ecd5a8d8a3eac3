"""From a registry into the blob store: manifest, configuration, then the layers, several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from tartarus.images.blobs import BlobStore
from tartarus.images.manifests import MAX_CONFIG_BYTES, Index, Manifest, choose, parse_manifest
from tartarus.images.oci import Descriptor, Image, Platform, host_platform
from tartarus.images.reference import Reference
from tartarus.images.registry.client import Repository, connect
from tartarus.images.registry.places import places
from tartarus.images.registry.settings import BlobProgress, OnProgress, RegistrySettings, silent
from tartarus.images.stored import image_of
from tartarus.model.errors import ImageNotFound, ImageRefused, RegistryFailed, TartarusError


async def pull(
    reference: Reference,
    blobs: BlobStore,
    settings: RegistrySettings,
    on_progress: OnProgress = silent,
    platform: Platform | None = None,
) -> Image:
    """Bring an image into the store, for `platform` (this host's if None); what is there already is not fetched.

    Mirrors that fail or don't have it are passed over. Everything is verified but the layers' uncompressed
    digests, which are for the unpacker. The blobs are safe from collection for blobs.GRACE_S: hold them.

    Raises:
        ImageNotFound: the registry has no such image.
        ImageRefused: it is damaged, dishonest, too large, or not for the platform.
        RegistryFailed: the registry could not be reached or refuses us.
        NoSpace: the disk is full.
    """
    candidates = places(reference, settings.mirrors.get(reference.registry, ()))
    for place in candidates:
        try:
            async with connect(place, settings) as repository:
                pulling = _Pull(repository, blobs, settings, on_progress)
                return await pulling.image(reference, platform or host_platform())
        except (ImageNotFound, RegistryFailed):
            if place is candidates[-1]:
                raise
    raise AssertionError("a reference has at least its own registry")


class _Pull:
    def __init__(
        self, repository: Repository, blobs: BlobStore, settings: RegistrySettings, on_progress: OnProgress
    ) -> None:
        self._repository = repository
        self._blobs = blobs
        self._settings = settings
        self._on_progress = on_progress

    async def image(self, reference: Reference, platform: Platform) -> Image:
        content, kind = await self._repository.manifest(reference.target)
        found = parse_manifest(content, kind, self._settings.max_image_bytes)
        if isinstance(found, Index):
            content, found = await self._chosen(choose(found, platform))
        stored = await self._blobs.put_bytes(content, found.media_type)
        await self._blob(found.config)
        config = self._blobs.read(found.config.digest, MAX_CONFIG_BYTES)
        image = image_of(found, stored.digest, config, str(reference), platform)
        layers = [blob for blob in found.blobs if blob.digest != found.config.digest]
        await at_most(self._settings.parallel, self._blob, layers)
        return image

    async def _chosen(self, descriptor: Descriptor) -> tuple[bytes, Manifest]:
        content, kind = await self._repository.manifest(descriptor.digest)
        if len(content) != descriptor.size:
            raise ImageRefused("the index gives its image's manifest another size than it has")
        # The index's word for it counts as the bearer's; an index in an index is refused: it could go on for ever.
        found = parse_manifest(content, descriptor.media_type, self._settings.max_image_bytes)
        if isinstance(found, Index) or (kind and kind != found.media_type):
            raise ImageRefused("the index leads to something else than an image's manifest", why=kind)
        return content, found

    async def _blob(self, descriptor: Descriptor) -> Path:
        if self._blobs.find(descriptor.digest) is not None:
            place = await self._blobs.ingest(descriptor, self._repository.blob(descriptor))  # checks its size
            self._on_progress(BlobProgress(descriptor.digest, descriptor.size, descriptor.size, "there"))
            return place

        def moved(done: int) -> None:
            self._on_progress(BlobProgress(descriptor.digest, done, descriptor.size, "moving"))

        place = await self._blobs.ingest(descriptor, self._repository.blob(descriptor), moved)
        self._on_progress(BlobProgress(descriptor.digest, descriptor.size, descriptor.size, "done"))
        return place


async def at_most(parallel: int, work: Callable[[Descriptor], Awaitable[object]], items: Iterable[Descriptor]) -> None:
    """Do the work for each item, so many at a time; the first failure ends the rest and is raised as it is."""
    slots = asyncio.Semaphore(max(parallel, 1))

    async def one(item: Descriptor) -> None:
        async with slots:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(one(item))
    except BaseExceptionGroup as failures:
        for failure in failures.exceptions:
            if isinstance(failure, TartarusError):
                raise failure from None
        raise
