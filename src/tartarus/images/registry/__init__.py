"""The client side of the OCI distribution specification 1.1: images from registries into the blob store, and back.

The node calls `pull` when a template names an image, and `push` when a user publishes one.
"""

from __future__ import annotations

from tartarus.images.registry.configuration import read_settings
from tartarus.images.registry.credentials import Credentials, DockerConfig
from tartarus.images.registry.pulling import pull
from tartarus.images.registry.pushing import push
from tartarus.images.registry.settings import BlobProgress, OnProgress, RegistrySettings

__all__ = [
    "BlobProgress",
    "Credentials",
    "DockerConfig",
    "OnProgress",
    "RegistrySettings",
    "pull",
    "push",
    "read_settings",
]
