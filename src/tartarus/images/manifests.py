"""Manifests and indexes of images: foreign JSON in, checked nouns out; and the way back.

The formats are those of the OCI image specification 1.1 and of Docker's image manifest version 2, schema 2.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from tartarus.images.oci import Descriptor, Platform
from tartarus.images.reference import is_digest
from tartarus.model.errors import ImageRefused

MAX_MANIFEST_BYTES = 4 * 1024**2
"""The size that the distribution specification asks registries to take, and that we take of them."""
MAX_CONFIG_BYTES = 8 * 1024**2
MAX_LAYERS = 512
MAX_IMAGE_BYTES = 32 * 1024**3
"""How large an image's blobs may be together, unless a setting says otherwise."""
_MAX_INDEX_ENTRIES = 1024

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_LIST)
_LAYERS = frozenset({
    OCI_LAYER, f"{OCI_LAYER}+gzip", f"{OCI_LAYER}+zstd",
    DOCKER_LAYER, f"{DOCKER_LAYER}.gzip", f"{DOCKER_LAYER}.zstd",
})  # fmt: skip
# Go's names for what the kernel calls otherwise, as some builders write the latter.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
# Variants that every processor of the architecture runs.
_COMMON_VARIANTS = {"amd64": ("", "v1"), "arm64": ("", "v8")}
_T = TypeVar("_T")


class _Descriptor(msgspec.Struct):
    mediaType: str  # noqa: N815 - the specifications' names, here and below
    digest: str
    size: int
    platform: dict[str, object] | None = None
    annotations: dict[str, str] | None = None

    def checked(self) -> Descriptor:
        if not is_digest(self.digest):
            raise ImageRefused(
                f"the image names a blob by {self.digest[:100]!r}", why="only SHA-256 digests are taken, in lower case"
            )
        if not 0 <= self.size <= 2**53:
            raise ImageRefused(f"blob {self.digest} has an impossible size", why=f"{self.size} bytes")
        return Descriptor(self.mediaType, self.digest, self.size)


class _Document(msgspec.Struct):
    """A manifest or an index: which of them is seen by what it has. Nothing else of it is of use to us."""

    schemaVersion: int  # noqa: N815
    mediaType: str = ""  # noqa: N815
    config: _Descriptor | None = None
    layers: list[_Descriptor] | None = None
    manifests: list[_Descriptor] | None = None


class IndexEntry(msgspec.Struct, frozen=True):
    """One image of an index; `name` is how an OCI layout calls it."""

    descriptor: Descriptor
    platform: Platform | None
    name: str = ""


class Index(msgspec.Struct, frozen=True):
    """A choice of images, by platform or by name."""

    entries: tuple[IndexEntry, ...]


class Manifest(msgspec.Struct, frozen=True):
    """One image: its configuration and its layers, lowest first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Each blob once, the configuration first."""
        return tuple({blob.digest: blob for blob in (self.config, *self.layers)}.values())


def digest_of(content: bytes) -> str:
    """The SHA-256 digest of `content`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def decode(content: bytes, kind: type[_T], what: str) -> _T:
    """Read foreign JSON; ImageRefused for what is not `kind`, and for nesting that would exhaust the stack."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ImageRefused(f"the {what} can't be read", why=str(error)) from None
    except RecursionError:
        raise ImageRefused(f"the {what} can't be read", why="it is nested too deeply") from None


def parse_manifest(content: bytes, media_type: str = "", max_bytes: int = MAX_IMAGE_BYTES) -> Manifest | Index:
    """Read a manifest or an index; `media_type` is what its bearer called it, or nothing.

    Raises ImageRefused for what is neither, for an image of more than `max_bytes`, and for layers that we don't take.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        raise ImageRefused("the manifest is too large", why=f"at most {MAX_MANIFEST_BYTES} bytes are taken")
    _refuse_schema_1(content, media_type)
    document = decode(content, _Document, "manifest")
    kind = _media_type(document, media_type)
    if document.manifests is not None:
        return Index(tuple(_entry(entry) for entry in document.manifests))
    assert document.config is not None
    return _manifest(kind, document.config, document.layers or [], max_bytes)


class _Version(msgspec.Struct):
    schemaVersion: int = 0  # noqa: N815


def _refuse_schema_1(content: bytes, media_type: str) -> None:
    if "docker.distribution.manifest.v1" in media_type or decode(content, _Version, "manifest").schemaVersion == 1:
        raise ImageRefused(
            "the image has a manifest of Docker's schema 1",
            why="its digests don't cover what is run, and Docker dropped it",
            fix="push the image again with a current Docker, podman or skopeo",
        )


def _media_type(document: _Document, declared: str) -> str:
    """What the document is, when its header, its own word and its fields agree.

    A document that is an index to one reader and a manifest to another would let the two run different images.
    """
    is_index = document.manifests is not None
    if document.schemaVersion != 2 or is_index == (document.config is not None) or (is_index and document.layers):
        raise ImageRefused(
            "the manifest is neither one image nor an index of images",
            why="it must have schemaVersion 2, and either config and layers or manifests",
        )
    if declared and document.mediaType and declared != document.mediaType:
        raise ImageRefused("the manifest contradicts itself", why=f"{document.mediaType!r} came as {declared!r}")
    kind = declared or document.mediaType or (OCI_INDEX if is_index else OCI_MANIFEST)
    if kind not in (INDEXES if is_index else MANIFESTS):
        raise ImageRefused("the manifest is of a kind that is not an image's", why=f"its media type is {kind[:100]!r}")
    entries = document.manifests if is_index else document.layers
    limit = _MAX_INDEX_ENTRIES if is_index else MAX_LAYERS
    if entries is not None and len(entries) > limit:
        raise ImageRefused(f"the manifest has {len(entries)} entries", why=f"at most {limit} are taken")
    return kind


def _entry(found: _Descriptor) -> IndexEntry:
    platform = None
    if found.platform is not None:
        words = {name: value for name, value in found.platform.items() if isinstance(value, str)}
        architecture = words.get("architecture", "")
        platform = Platform(
            words.get("os", ""), ARCHITECTURES.get(architecture, architecture), words.get("variant", "")
        )
    notes = found.annotations or {}
    # containerd writes the full name beside the specification's, which Docker cuts to the tag.
    name = notes.get("io.containerd.image.name") or notes.get("org.opencontainers.image.ref.name") or ""
    return IndexEntry(found.checked(), platform, name)


def _manifest(kind: str, config: _Descriptor, layers: list[_Descriptor], max_bytes: int) -> Manifest:
    if config.mediaType not in {OCI_CONFIG, DOCKER_CONFIG}:
        raise ImageRefused(
            "this is not a container image", why=f"its configuration is of the kind {config.mediaType[:100]!r}"
        )
    found = Manifest(kind, config.checked(), tuple(_layer(layer) for layer in layers))
    if found.config.size > MAX_CONFIG_BYTES:
        raise ImageRefused("the image's configuration is too large", why=f"at most {MAX_CONFIG_BYTES} bytes are taken")
    sizes: dict[str, int] = {}
    for blob in (found.config, *found.layers):
        if sizes.setdefault(blob.digest, blob.size) != blob.size:
            raise ImageRefused(f"the image gives blob {blob.digest} two sizes")
    if sum(sizes.values()) > max_bytes:
        raise ImageRefused(
            f"the image is {sum(sizes.values())} bytes large", why=f"the limit is {max_bytes}",
            fix="raise the limit of images, if you mean it",
        )  # fmt: skip
    return found


def _layer(found: _Descriptor) -> Descriptor:
    kind = found.mediaType
    if kind not in _LAYERS:
        why = f"its media type is {kind[:100]!r}"
        if "nondistributable" in kind or "foreign" in kind:
            why = "it is to be fetched from somewhere else (a non-distributable layer, as of Windows images)"
        elif "encrypted" in kind:
            why = "it is encrypted, and we have no key"
        raise ImageRefused(f"layer {found.digest[:80]} can't be used", why=why)
    return found.checked()


def choose(index: Index, wanted: Platform) -> Descriptor:
    """The manifest for that platform. Raises ImageRefused, saying which there are, when there is none."""
    fitting = [entry for entry in index.entries if entry.platform is not None and fits(entry.platform, wanted)]
    if fitting:
        # The plainest first: a variant is a demand on the processor.
        best = min(fitting, key=lambda entry: entry.platform.variant if entry.platform is not None else "")
        return best.descriptor
    if len(index.entries) == 1 and index.entries[0].platform is None:
        return index.entries[0].descriptor  # its configuration will tell
    there = sorted({platform_name(entry.platform) for entry in index.entries if entry.platform is not None})
    raise ImageRefused(
        f"the image does not exist for {platform_name(wanted)}",
        why=f"it has {', '.join(name[:40] for name in there[:20]) or 'no platform at all'}",
    )


def fits(offered: Platform, wanted: Platform) -> bool:
    """Whether what is made for `offered` runs where `wanted` is asked for."""
    if (offered.os, offered.architecture) != (wanted.os, wanted.architecture):
        return False
    if wanted.variant:
        return offered.variant == wanted.variant
    common = _COMMON_VARIANTS.get(wanted.architecture)
    return common is None or offered.variant in common


def platform_name(platform: Platform) -> str:
    """``linux/arm64/v8``."""
    return "/".join(part for part in (platform.os, platform.architecture, platform.variant) if part)


def write_manifest(config: Descriptor, layers: tuple[Descriptor, ...]) -> bytes:
    """An OCI manifest. Docker's names of layers become OCI's, so that one document speaks one language."""
    return msgspec.json.encode({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _plain(config),
        "layers": [_plain(layer) for layer in layers],
    })  # fmt: skip


def _plain(descriptor: Descriptor) -> dict[str, object]:
    kind = descriptor.media_type
    if kind.startswith(DOCKER_LAYER):
        kind = OCI_LAYER + kind.removeprefix(DOCKER_LAYER).replace(".", "+")
    return {"mediaType": kind, "digest": descriptor.digest, "size": descriptor.size}
