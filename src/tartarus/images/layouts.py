"""The two ways to lay out images in files: the OCI image layout, and what `docker save` writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import msgspec

from tartarus.images.blobs import BlobStore
from tartarus.images.bundles import Bundle, fetch, read
from tartarus.images.configs import read_config
from tartarus.images.manifests import (
    MAX_CONFIG_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Index,
    IndexEntry,
    Manifest,
    choose,
    decode,
    digest_of,
    parse_manifest,
    write_manifest,
)
from tartarus.images.oci import Descriptor, Image, Platform
from tartarus.images.reference import Reference
from tartarus.images.registry.settings import BlobProgress, OnProgress
from tartarus.images.stored import image_of
from tartarus.model.errors import ImageNotFound, ImageRefused, InvalidRequest

_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class _Layout(msgspec.Struct):
    imageLayoutVersion: str  # noqa: N815 - the specifications' names, here and below


class _Saved(msgspec.Struct):
    Config: str
    Layers: list[str] | None = None
    RepoTags: list[str] | None = None


async def load_layout(
    bundle: Bundle, blobs: BlobStore, on_progress: OnProgress, reference: str, platform: Platform
) -> Image:
    """The image of an OCI image layout (image specification, image-layout.md): the named one, or the only one."""
    layout = decode(read(bundle, "oci-layout", MAX_MANIFEST_BYTES), _Layout, "file oci-layout")
    if not layout.imageLayoutVersion.startswith("1."):
        raise ImageRefused("the OCI layout is of an unknown version", why=layout.imageLayoutVersion[:100])
    index = parse_manifest(read(bundle, "index.json", MAX_MANIFEST_BYTES))
    if not isinstance(index, Index):
        raise ImageRefused("the layout's index.json is not an index")
    entry, name = _named(index, reference)
    descriptor = choose(entry, platform) if len(entry.entries) > 1 else entry.entries[0].descriptor
    content = _document(bundle, descriptor)
    found = parse_manifest(content, descriptor.media_type)
    if isinstance(found, Index):
        # The layout's index leads to the image's own; one that leads on could go on for ever.
        descriptor = choose(found, platform)
        content = _document(bundle, descriptor)
        found = parse_manifest(content, descriptor.media_type)
        if isinstance(found, Index):
            raise ImageRefused("the image's index leads to another index")
    stored = await blobs.put_bytes(content, found.media_type)
    for blob in found.blobs:
        await _ingest(bundle, _blob_name(blob.digest), blob, blobs, on_progress)
    config = blobs.read(found.config.digest, MAX_CONFIG_BYTES)
    return image_of(found, stored.digest, config, reference or name, platform)


def _named(index: Index, reference: str) -> tuple[Index, str]:
    """The entries that `reference` names, or all if they have but one name; and that name."""
    if not index.entries:
        raise ImageNotFound("the archive has no image")
    by_name: dict[str, list[IndexEntry]] = {}
    for entry in index.entries:
        by_name.setdefault(entry.name, []).append(entry)
    name = _pick(by_name, reference)
    return Index(tuple(by_name[name])), name


def _pick(names: Iterable[str], reference: str) -> str:
    """Which of an archive's names is meant: the only one, or the one that `reference` is."""
    names = list(names)
    if len(names) == 1:
        return names[0]
    wanted = {reference, _canonical(reference), reference.rpartition(":")[2]} - {""}
    for name in names:
        if name in wanted or _canonical(name) in wanted:
            return name
    shown = ", ".join(ascii(name[:100])[1:-1] or "one without a name" for name in names[:20])
    raise InvalidRequest("the archive has several images", why=shown, fix="name the one you mean")


def _canonical(name: str) -> str:
    try:
        return str(Reference.parse(name))
    except InvalidRequest:
        return ""


def _blob_name(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _document(bundle: Bundle, descriptor: Descriptor) -> bytes:
    content = read(bundle, _blob_name(descriptor.digest), MAX_MANIFEST_BYTES)
    if digest_of(content) != descriptor.digest or len(content) != descriptor.size:
        raise ImageRefused(f"blob {descriptor.digest} is not what its digest and its size say")
    return content


async def _ingest(bundle: Bundle, name: str, blob: Descriptor, blobs: BlobStore, on_progress: OnProgress) -> None:
    def moved(done: int) -> None:
        on_progress(BlobProgress(blob.digest, done, blob.size, "moving"))

    there = blobs.find(blob.digest) is not None
    await blobs.ingest(blob, fetch(bundle, name), moved)
    on_progress(BlobProgress(blob.digest, blob.size, blob.size, "there" if there else "done"))


async def load_saved(
    bundle: Bundle, blobs: BlobStore, on_progress: OnProgress, reference: str, platform: Platform
) -> Image:
    """The image of a `docker save` archive that `reference` names, or the only one.

    Its layers are known by their uncompressed digests alone, so that is what they are stored and verified under; a
    layer that some builder compressed is verified when it is unpacked.
    """
    saved = decode(read(bundle, "manifest.json", MAX_MANIFEST_BYTES), list[_Saved], "file manifest.json")
    by_name = {tag: image for image in saved for tag in image.RepoTags or [image.Config]}
    if not by_name:
        raise ImageNotFound("the archive has no image")
    single = len({image.Config for image in by_name.values()}) == 1
    name = next(iter(by_name)) if single and reference not in by_name else _pick(by_name, reference)
    image = by_name[name]
    config = read(bundle, image.Config, MAX_CONFIG_BYTES)
    _, _, diff_ids = read_config(config)
    layers = image.Layers or []
    if len(layers) != len(diff_ids) or len(layers) > MAX_LAYERS:
        raise ImageRefused(
            "the image contradicts itself", why=f"it has {len(layers)} layers and the digests of {len(diff_ids)}"
        )
    found = [await _layer(bundle, layer, diff_id) for layer, diff_id in zip(layers, diff_ids, strict=True)]
    stored = await blobs.put_bytes(config, OCI_CONFIG)
    content = write_manifest(stored, tuple(found))
    manifest = parse_manifest(content)  # refuses what is too large as a whole, before it is copied
    assert isinstance(manifest, Manifest)
    for layer, blob in zip(layers, found, strict=True):
        await _ingest(bundle, layer, blob, blobs, on_progress)
    kept = await blobs.put_bytes(content, OCI_MANIFEST)
    canonical = _canonical(name) if image.RepoTags else ""
    return image_of(manifest, kept.digest, config, reference or canonical, platform)


async def _layer(bundle: Bundle, name: str, diff_id: str) -> Descriptor:
    size = bundle.size(name)
    if size is None or size > MAX_IMAGE_BYTES:
        raise ImageRefused(f"the archive's layer {name[:100]!r} is {'missing' if size is None else 'too large'}")
    with bundle.file(name) as (file, start):
        magic = os.pread(file, min(size, 4), start)
    if magic.startswith(_GZIP_MAGIC) or magic == _ZSTD_MAGIC:
        return Descriptor(
            f"{OCI_LAYER}+{'zstd' if magic == _ZSTD_MAGIC else 'gzip'}", await _digest(bundle, name), size
        )
    return Descriptor(OCI_LAYER, diff_id, size)


async def _digest(bundle: Bundle, name: str) -> str:
    found = hashlib.sha256()
    async for chunk in fetch(bundle, name)(0):
        found.update(chunk)
    return f"sha256:{found.hexdigest()}"
