"""Images as blobs of the store: put together from what a source brought, made new, found again."""

from __future__ import annotations

from tartarus.images.blobs import BlobStore
from tartarus.images.configs import read_config, write_config
from tartarus.images.manifests import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    OCI_CONFIG,
    OCI_MANIFEST,
    Index,
    Manifest,
    fits,
    parse_manifest,
    platform_name,
    write_manifest,
)
from tartarus.images.oci import Descriptor, Image, ImageConfig, Platform
from tartarus.model.errors import ImageRefused


def image_of(manifest: Manifest, digest: str, config: bytes, reference: str, wanted: Platform) -> Image:
    """Put together what was read. Raises ImageRefused when parts disagree, or it is for another platform."""
    run, platform, diff_ids = read_config(config)
    if len(diff_ids) != len(manifest.layers):
        raise ImageRefused(
            "the image contradicts itself",
            why=f"its manifest has {len(manifest.layers)} layers, its configuration {len(diff_ids)}",
        )
    # The variant is often left out here; an index that names it has been believed then.
    if not fits(platform, wanted if platform.variant else Platform(wanted.os, wanted.architecture)):
        raise ImageRefused(f"the image is for {platform_name(platform)}, not for {platform_name(wanted)}")
    return Image(
        reference=reference,
        digest=digest,
        config=run,
        config_digest=manifest.config.digest,
        layers=manifest.layers,
        diff_ids=diff_ids,
        platform=platform,
    )


def blobs_of(image: Image) -> tuple[str, ...]:
    """The digests of all blobs that belong to it: what to hold in the store while the image is in use."""
    return tuple(dict.fromkeys((image.digest, image.config_digest, *(layer.digest for layer in image.layers))))


async def store_image(
    blobs: BlobStore,
    config: ImageConfig,
    layers: tuple[Descriptor, ...],
    diff_ids: tuple[str, ...],
    platform: Platform,
    reference: str = "",
) -> Image:
    """Make an image of layers that are in the store: writes its configuration and its manifest."""
    written = await blobs.put_bytes(write_config(config, diff_ids, platform), OCI_CONFIG)
    content = write_manifest(written, layers)
    stored = await blobs.put_bytes(content, OCI_MANIFEST)
    found = parse_manifest(content)  # what others would refuse is not made either
    assert isinstance(found, Manifest)
    return Image(
        reference=reference,
        digest=stored.digest,
        config=config,
        config_digest=written.digest,
        layers=found.layers,
        diff_ids=diff_ids,
        platform=platform,
    )


def stored_manifest(blobs: BlobStore, digest: str) -> tuple[Manifest, bytes]:
    """The manifest that is in the store under that digest, read and as it is. Raises ImageNotFound."""
    content = blobs.read(digest, MAX_MANIFEST_BYTES)
    found = parse_manifest(content, max_bytes=2**63)
    if isinstance(found, Index):
        raise ImageRefused(f"{digest} is an index, not an image")
    return found, content


def stored_image(blobs: BlobStore, digest: str, reference: str = "") -> Image:
    """The image whose manifest is in the store under that digest. Raises ImageNotFound."""
    manifest, _ = stored_manifest(blobs, digest)
    config = blobs.read(manifest.config.digest, MAX_CONFIG_BYTES)
    _, platform, _ = read_config(config)
    return image_of(manifest, digest, config, reference, platform)
