"""From the blob store to a registry: blobs that it lacks, several at a time, then the manifest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from tartarus.images.blobs import BlobStore
from tartarus.images.oci import Descriptor, Image
from tartarus.images.reference import Reference
from tartarus.images.registry.client import Repository, connect
from tartarus.images.registry.places import origin
from tartarus.images.registry.pulling import at_most
from tartarus.images.registry.settings import BlobProgress, OnProgress, RegistrySettings, silent
from tartarus.images.stored import stored_manifest
from tartarus.model.errors import ImageNotFound, InvalidRequest

_READ_BYTES = 1024**2


async def push(
    image: Image,
    reference: Reference,
    blobs: BlobStore,
    settings: RegistrySettings,
    on_progress: OnProgress = silent,
) -> str:
    """Publish an image of the store as `reference`; returns the digest of its manifest.

    Blobs that the repository has are skipped; where the image came from the same registry, the others are taken
    over there. The manifest goes last: whoever finds it finds the rest.

    Raises:
        ImageNotFound: a blob of the image is no longer in the store.
        InvalidRequest: the reference has another digest than the image.
        RegistryFailed: the registry could not be reached, or does not let us.
    """
    if reference.digest and reference.digest != image.digest:
        raise InvalidRequest(f"the image's digest is {image.digest}, not {reference.digest}", fix="push it by a tag")
    manifest, content = stored_manifest(blobs, image.digest)
    place = origin(reference)
    source = _mountable(image.reference, reference)
    async with connect(place, settings) as repository:
        scopes = [f"repository:{place.repository}:pull,push"]
        if source:
            scopes.append(f"repository:{source}:pull")
        repository.ask_for(*scopes)
        upload = _Push(repository, blobs, on_progress, source)
        await at_most(settings.parallel, upload.blob, manifest.blobs)
        await repository.put_manifest(reference.tag or image.digest, content, manifest.media_type)
    return image.digest


def _mountable(came_from: str, target: Reference) -> str:
    """The repository of the same registry that the image came from, or nothing."""
    try:
        source = Reference.parse(came_from)
    except InvalidRequest:  # it never was in a registry
        return ""
    return source.repository if source.registry == target.registry and source.repository != target.repository else ""


class _Push:
    def __init__(self, repository: Repository, blobs: BlobStore, on_progress: OnProgress, source: str) -> None:
        self._repository = repository
        self._blobs = blobs
        self._on_progress = on_progress
        self._source = source

    async def blob(self, descriptor: Descriptor) -> None:
        if self._blobs.find(descriptor.digest) is None:
            raise ImageNotFound(f"blob {descriptor.digest} is not in the store", fix="pull the image again")
        moved = not await self._repository.has_blob(descriptor.digest) and await self._repository.put_blob(
            descriptor, lambda: self._content(descriptor), self._source
        )
        state = BlobProgress(descriptor.digest, descriptor.size, descriptor.size, "done" if moved else "there")
        self._on_progress(state)

    async def _content(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        done = 0
        with self._blobs.open(descriptor.digest) as file:
            while chunk := await asyncio.to_thread(file.read, _READ_BYTES):
                yield chunk
                done += len(chunk)
                self._on_progress(BlobProgress(descriptor.digest, done, descriptor.size, "moving"))
