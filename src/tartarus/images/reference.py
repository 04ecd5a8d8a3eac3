"""Names of images, read by Docker's rules: ``python:3.11`` is ``docker.io/library/python:3.11``.

The grammar and its limits are those of the distribution project's `reference` package.
"""

from __future__ import annotations

import re

import msgspec

from tartarus.model.errors import InvalidRequest

DOCKER_HUB = "docker.io"
DEFAULT_TAG = "latest"
_MAX_TEXT = 1024
_MAX_REPOSITORY = 255
_DOMAIN_PART = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_DOMAIN = re.compile(
    rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[a-fA-F0-9:]+\])(?::(?P<port>[0-9]{{1,5}}))?", re.ASCII
)
_PATH_PART = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_HEX_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_EXAMPLES = "write it like python:3.11, ghcr.io/owner/app:1.0 or app@sha256:…"


class Reference(msgspec.Struct, frozen=True):
    """Where an image is: `registry` is a host with its port, if any; at least one of `tag` and `digest` is set.

    With a digest, the digest decides; the tag is then only a note, as in Docker.
    """

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference as people write it. Raises InvalidRequest, which says what is wrong with it."""
        if not text or len(text) > _MAX_TEXT:
            raise _invalid(text, "it is empty" if not text else f"it is longer than {_MAX_TEXT} characters")
        if "://" in text:
            raise _invalid(text, "it is a URL", fix="leave out the scheme: registry.example.com/app:1.0")
        if _HEX_ID.fullmatch(text):
            raise _invalid(text, "64 hexadecimal digits are an image's id, not its name")
        name, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise _invalid(text, "its digest is not sha256: and 64 lower-case hexadecimal digits")
        name, tag = _cut_tag(name)
        if tag is not None and not _TAG.fullmatch(tag):
            raise _invalid(text, f"{tag!r} is not a tag: letters, digits, '_', '.' and '-', at most 128")
        registry, repository = _cut_registry(name)
        _check_registry(text, registry)
        _check_repository(text, repository)
        # A host without a dot or a port is known as one by its capitals alone.
        registry = registry.lower() if _is_host(registry.lower()) else registry
        return cls(registry, repository, tag or ("" if digest else DEFAULT_TAG), digest)

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def target(self) -> str:
        """What a registry is asked for: the digest if there is one, the tag otherwise."""
        return self.digest or self.tag

    def __str__(self) -> str:
        """The canonical form, with nothing left to a default."""
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}@{self.digest}" if self.digest else f"{self.name}{tag}"


def is_digest(text: str) -> bool:
    """Whether `text` is a digest that we take: SHA-256, in lower case."""
    return _DIGEST.fullmatch(text) is not None


def _cut_tag(name: str) -> tuple[str, str | None]:
    """A colon after the last slash begins the tag; one before it belongs to a port."""
    head, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    return f"{head}{slash}{last}", tag if colon else None


def _is_host(part: str) -> bool:
    return "." in part or ":" in part or part == "localhost" or part != part.lower()


def _cut_registry(name: str) -> tuple[str, str]:
    """The first part is a registry if it looks like a host: a dot, a port, ``localhost``, or a capital letter."""
    first, slash, rest = name.partition("/")
    registry, repository = (first, rest) if slash and _is_host(first) else (DOCKER_HUB, name)
    if registry.lower() == "index.docker.io":
        registry = DOCKER_HUB
    if registry.lower() == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return registry, repository


def _check_registry(text: str, registry: str) -> None:
    match = _DOMAIN.fullmatch(registry)
    if match is None or len(registry) > _MAX_REPOSITORY or int(match.group("port") or 1) not in range(1, 65536):
        raise _invalid(text, f"{registry!r} is not a registry's host name and port")


def _check_repository(text: str, repository: str) -> None:
    if len(repository) > _MAX_REPOSITORY:
        raise _invalid(text, f"its repository name is longer than {_MAX_REPOSITORY} characters")
    if all(_PATH_PART.fullmatch(part) for part in repository.split("/")):
        return
    if all(_PATH_PART.fullmatch(part) for part in repository.lower().split("/")):
        raise _invalid(text, "repository names are in lower case", fix=f"write {repository.lower()}")
    raise _invalid(
        text, f"{repository!r} is not a repository name: lower-case letters and digits, '.', '_', '-' between them"
    )


def _invalid(text: str, why: str, fix: str = _EXAMPLES) -> InvalidRequest:
    shown = text if len(text) <= 100 else f"{text[:100]}…"
    return InvalidRequest(f"{shown!r} is not an image reference", why=why, fix=fix)
