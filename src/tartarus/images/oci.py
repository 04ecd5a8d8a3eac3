"""The nouns of OCI images, as this package keeps them: checked once where foreign JSON is read, plain data after.

Field names follow the OCI image specification 1.1 (config.md, manifest.md, descriptor.md).
"""

from __future__ import annotations

import platform

import msgspec

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Descriptor(msgspec.Struct, frozen=True):
    """A blob: its digest (``sha256:`` and 64 hex digits) and its size in bytes."""

    media_type: str
    digest: str
    size: int


class Platform(msgspec.Struct, frozen=True):
    """What an image runs on, in Go's names (``linux``, ``amd64``)."""

    os: str = "linux"
    architecture: str = "amd64"
    variant: str = ""


class ImageConfig(msgspec.Struct, frozen=True):
    """What an image says of how it is run. `env` keeps its order; `user` is as written (``1000:1000``, ``app``)."""

    env: dict[str, str] = {}
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    labels: dict[str, str] = {}
    exposed_ports: tuple[str, ...] = ()
    shell: tuple[str, ...] = ()
    stop_signal: str = ""
    healthcheck: tuple[str, ...] = ()


class Image(msgspec.Struct, frozen=True):
    """An image whose blobs are all in the blob store.

    `digest` names the manifest (content-addressed identity of the whole); `layers` are lowest first, `diff_ids`
    their uncompressed digests in the same order.
    """

    reference: str
    digest: str
    config: ImageConfig
    config_digest: str
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[str, ...]
    platform: Platform = Platform()


def host_platform() -> Platform:
    """What images must be for, to run here."""
    machine = platform.machine()
    return Platform(architecture=_ARCHITECTURES.get(machine, machine))
