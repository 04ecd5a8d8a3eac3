"""What can be set about registries, and what a transfer says of its progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from tartarus.images.manifests import MAX_IMAGE_BYTES
from tartarus.images.registry.credentials import Credentials


class RegistrySettings(msgspec.Struct, frozen=True):
    """How registries are reached. Sizes are bytes, durations seconds; registries are hosts with their port, if any.

    `mirrors`: for a registry, places to ask before it, as ``host[:port][/prefix]``. `ca_files`: certificates, in PEM,
    that a registry's own may be signed with, beside the system's. `credentials`: for a registry, before those of
    `docker_config` (Docker's config.json). `proxy`: an HTTP proxy's URL; loopback is never asked through it.
    `attempts`: how often a request is made while the registry fails; the first pause is `backoff_s`, each next
    one twice as long.

    There is no switch to skip the check of certificates: a registry with one of its own has a `ca_files` entry.
    Plain HTTP is spoken with loopback only.
    """

    mirrors: dict[str, tuple[str, ...]] = {}
    ca_files: dict[str, Path] = {}
    credentials: dict[str, Credentials] = {}
    docker_config: Path | None = None
    proxy: str = ""
    parallel: int = 4
    max_image_bytes: int = MAX_IMAGE_BYTES
    attempts: int = 5
    backoff_s: float = 0.2
    connect_timeout_s: float = 10.0
    silence_timeout_s: float = 60.0


class BlobProgress(msgspec.Struct, frozen=True):
    """Where the transfer of one blob stands. `there`: it needed no transfer."""

    digest: str
    done_bytes: int
    total_bytes: int
    state: Literal["moving", "done", "there"]


OnProgress = Callable[[BlobProgress], None]
"""Called on the event loop, about once a mebibyte for each blob."""


def silent(_progress: BlobProgress) -> None:
    """For callers that don't watch."""
