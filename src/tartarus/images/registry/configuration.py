"""The host's registries.toml: what an administrator says of registries, checked whole before any of it counts.

proxy = "http://proxy.example:3128"     # for registries that are not on this host
docker_config = "/root/.docker/config.json"
max_image = "32GiB"
parallel = 4

[registry."docker.io"]
mirrors = ["mirror.example:5000/hub"]   # asked first, in this order
[registry."registry.example:8443"]
ca_file = "/etc/ssl/registry-ca.pem"    # beside the system's authorities
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import httpx
import msgspec

from tartarus.images.manifests import MAX_IMAGE_BYTES
from tartarus.images.reference import Reference
from tartarus.images.registry.places import places
from tartarus.images.registry.settings import RegistrySettings
from tartarus.model.errors import InvalidRequest
from tartarus.model.units import parse_size

_MAX_BYTES = 1024**2
_MOST_PARALLEL = 32


class _Registry(msgspec.Struct, forbid_unknown_fields=True):
    mirrors: tuple[str, ...] = ()
    ca_file: str = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    proxy: str = ""
    max_image: str | int = MAX_IMAGE_BYTES
    parallel: int = 4
    registry: dict[str, _Registry] = {}


def read_settings(path: Path) -> RegistrySettings:
    """What the file says; the defaults when there is no file. Raises InvalidRequest, which names the bad key."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return RegistrySettings()
    except OSError as error:
        raise InvalidRequest(f"can't read {path}", why=error.strerror or "") from None
    try:
        if len(content) > _MAX_BYTES:
            raise InvalidRequest("it is too large")
        said = msgspec.convert(tomllib.loads(content.decode()), _File)
        return _settings(said)
    except (ValueError, msgspec.ValidationError, RecursionError) as error:
        raise InvalidRequest(f"{path} is not valid", why=str(error)) from None
    except InvalidRequest as error:
        raise InvalidRequest(f"{path} is not valid", why=str(error)) from None


def _settings(said: _File) -> RegistrySettings:
    mirrors, ca_files = {}, {}
    for name, registry in said.registry.items():
        reference = Reference.parse(f"{name}/x/x")
        if reference.name != f"{name}/x/x":
            raise InvalidRequest(f"{name!r} is not a registry's name", fix="write a host, as in docker.io or host:5000")
        places(reference, registry.mirrors)
        mirrors[name] = registry.mirrors
        if registry.ca_file:
            ca_files[name] = _absolute(registry.ca_file, "ca_file")
    if said.proxy and httpx.URL(said.proxy).scheme not in {"http", "https"}:
        raise InvalidRequest("the proxy is not an HTTP proxy's URL")
    if said.parallel not in range(1, _MOST_PARALLEL + 1):
        raise InvalidRequest(f"parallel is {said.parallel}", fix=f"use 1 to {_MOST_PARALLEL}")
    return RegistrySettings(
        mirrors=mirrors,
        ca_files=ca_files,
        proxy=said.proxy,
        parallel=said.parallel,
        max_image_bytes=parse_size(said.max_image),
    )


def _absolute(text: str, key: str) -> Path:
    if not text.startswith("/"):
        raise InvalidRequest(f"{key} {text!r} is not an absolute path")
    return Path(text)
