"""Where a registry is on the network, and which hosts may be spoken to how."""

from __future__ import annotations

import ipaddress
import re

import httpx
import msgspec

from tartarus.images.reference import DOCKER_HUB, Reference
from tartarus.model.errors import InvalidRequest, RegistryFailed

_HUB_HOST = "registry-1.docker.io"
_MIRROR = re.compile(
    r"(?P<host>(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?)(?P<path>(?:/[a-z0-9][a-z0-9._-]*)*)/?"
)


class Place(msgspec.Struct, frozen=True):
    """One host that may have the repository: the registry itself or a mirror. `registry` is for finding a login."""

    registry: str
    host: str
    repository: str

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine."""
        return is_loopback(httpx.URL(f"https://{self.host}"))


def places(reference: Reference, mirrors: tuple[str, ...]) -> list[Place]:
    """Whom to ask, in order: the mirrors, then the registry."""
    found = [_mirror(mirror, reference.repository) for mirror in mirrors]
    return [*found, origin(reference)]


def origin(reference: Reference) -> Place:
    """The registry itself."""
    host = _HUB_HOST if reference.registry == DOCKER_HUB else reference.registry
    return Place(reference.registry, host, reference.repository)


def _mirror(text: str, repository: str) -> Place:
    match = _MIRROR.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text[:100]!r} is not a mirror's place", fix="write it like mirror.example.com/prefix")
    host = match.group("host").lower()
    return Place(host, host, f"{match.group('path').strip('/')}/{repository}".lstrip("/"))


def is_loopback(url: httpx.URL) -> bool:
    """Whether the URL's host is this machine by its spelling; no name is looked up."""
    host = url.host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_followed(base: httpx.URL, target: httpx.URL, what: str) -> None:
    """Refuse to go where a registry sends us, unless it is HTTPS elsewhere, or on loopback from loopback.

    A registry on the network must not make us talk to services of this host, nor in the clear to anyone.
    """
    if target.scheme not in {"http", "https"} or not target.host or target.userinfo:
        raise RegistryFailed(f"the registry gives an unusable address as {what}")
    if is_loopback(target) and not is_loopback(base):
        raise RegistryFailed(f"the registry points to this host itself as {what}", why=f"{target.host} is loopback")
    if target.scheme == "http" and not is_loopback(target):
        raise RegistryFailed(
            f"the registry wants plain HTTP for {what}", why=f"{target.host} could be anyone without TLS"
        )


def same_origin(one: httpx.URL, other: httpx.URL) -> bool:
    """Whether both URLs speak to the same server: scheme, host and port."""
    return (one.scheme, one.host, _port(one)) == (other.scheme, other.host, _port(other))


def _port(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)
