"""Secrets as they are asked for and granted. No value is ever in these: only names, and where values are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from tartarus.model.checks import require
from tartarus.model.contract import check_domain, normal
from tartarus.model.errors import InvalidRequest

SECRETS_DIRECTORY = "/run/secrets"
MAX_SECRETS = 32
"""Secrets of one sandbox."""
MAX_SECRET_BYTES = 64 * 1024
"""Bytes of one secret: keys, tokens and certificate chains, not data."""
MAX_REFERENCE = 512
Delivery = Literal["file", "env", "proxy"]
MAX_HEADER_BYTES = 8192
"""Of a value that the egress proxy adds to requests."""
_HEADER = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", re.ASCII)
_PREFIX = re.compile(r"[!-~]{0,32} ?", re.ASCII)
# What says whom a request is for, and where it ends.
_NOT_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_REFERENCE = re.compile(
    r"(?P<provider>[A-Za-z0-9][A-Za-z0-9_-]{0,63}):(?P<path>[A-Za-z0-9_.@+=/-]+)(?:#(?P<field>[A-Za-z0-9_.@-]+))?",
    re.ASCII,
)  # fmt: skip


class Reference(msgspec.Struct, frozen=True):
    """Where a value is kept: a provider of the configuration, a path that it understands, a field of what is there."""

    provider: str
    path: str
    field: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``provider:path#field``. Raises InvalidRequest for what could climb or be read in two ways."""
        found = _REFERENCE.fullmatch(text) if len(text) <= MAX_REFERENCE else None
        if found is None:
            raise InvalidRequest("that is no reference to a secret", fix="write it like vault:kv/app#token or env:NAME")
        path = found["path"]
        if any(part in {"", ".", ".."} for part in path.split("/")):
            raise InvalidRequest("a reference's path has empty, . or .. parts", fix="write the whole path, once")
        return cls(found["provider"], path, found["field"] or "")


class SecretUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A secret that a sandbox gets: by the name or the reference that its grant has.

    As a file below /run/secrets, readable by the template's user alone, or only on this request (`as`: env) in the
    environment of the sandbox's command, or (`as`: proxy) not at all: the egress proxy adds it to requests.
    `target`: the file's path, the variable's name, or the domain; the secret's own if empty.
    """

    ref: str
    as_: Delivery = msgspec.field(default="file", name="as")
    target: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.ref):
            Reference.parse(self.ref)
        if self.target and self.as_ == "env":
            require(
                _VARIABLE.fullmatch(self.target) is not None,
                "a secret's target is not a variable name",
                "use letters, digits and _",
            )
        elif self.target and self.as_ == "proxy":
            check_domain(self.target)
            require("*" not in self.target, "a secret's target is many domains", "name one")
        elif self.target:
            directory, _, name = self.target.rpartition("/")
            require(
                directory == SECRETS_DIRECTORY and _NAME.fullmatch(name) is not None,
                f"a secret's target is not a file of {SECRETS_DIRECTORY}",
                f"write it like {SECRETS_DIRECTORY}/token; only there it never touches a disk",
            )

    def by(self, grant: SecretGrant) -> SecretUse:
        """The same by its grant's name, with the target that it then has."""
        if self.as_ == "proxy":
            target = normal(self.target) or (grant.hosts[0] if len(grant.hosts) == 1 else "")
            require(bool(target), f"secret {grant.name!r} is for several domains", "say which: target=api.example.org")
        elif self.as_ == "file":
            target = self.target or f"{SECRETS_DIRECTORY}/{grant.name}"
        else:
            target = self.target or variable_of(grant.name)
        return SecretUse(ref=grant.name, as_=self.as_, target=target)


def check_secret_name(name: str) -> None:
    """Refuse what is no name."""
    require(_NAME.fullmatch(name) is not None, f"{name!r} is no secret's name", "use letters, digits, -, _ and .")


def directories_of(uses: tuple[SecretUse, ...]) -> tuple[str, ...]:
    """The directories that files of these are in."""
    return (SECRETS_DIRECTORY,) if any(use.as_ == "file" for use in uses) else ()


def variable_of(name: str) -> str:
    """The environment variable of a secret that is asked for without a target: ``db-token`` gives DB_TOKEN."""
    text = re.sub(r"[^A-Za-z0-9]", "_", name).upper()
    return text if not text[0].isdigit() else f"_{text}"


def check_uses(uses: tuple[SecretUse, ...], *, has_command: bool) -> None:
    """Refuse too many, two for one target, and variables without a command that could have them."""
    require(len(uses) <= MAX_SECRETS, f"{len(uses)} secrets", f"use at most {MAX_SECRETS}")
    for use in uses:
        require(
            use.as_ != "env" or has_command,
            "a secret as an environment variable needs the command that gets it",
            "give a command, or take it as a file",
        )
    targets = [use.target for use in uses if use.target]
    require(len(set(targets)) == len(targets), "two secrets have the same target", "give each its own")


class SecretsRefreshed(msgspec.Struct, frozen=True):
    """Whose files have new values now, by the names of their grants."""

    names: tuple[str, ...]


class SecretProvider(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where values come from. `name`: what references begin with. `options` are those of its `kind`."""

    name: str
    kind: str
    options: dict[str, str] = {}


class SecretGrant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A secret that sandboxes may have, by `name`; of these tenants and templates only, where some are named.

    `deliver`: how, at most. With ``proxy``, `hosts` says to which domains it may be sent, and then it is said as
    `header`, after `prefix`.
    """

    name: str
    ref: str
    tenants: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    deliver: tuple[Delivery, ...] = ("file", "env")
    hosts: tuple[str, ...] = ()
    header: str = "Authorization"
    prefix: str = "Bearer "

    def is_for(self, use: SecretUse) -> bool:
        """Whether it may be used so, whosever it is."""
        called = use.ref in {self.name, self.ref} and use.as_ in self.deliver
        return called and (use.as_ != "proxy" or not use.target or normal(use.target) in map(normal, self.hosts))

    def holds_for(self, tenant: str, template: str) -> bool:
        """Whether a tenant's sandbox of a template may have it."""
        return (not self.tenants or tenant in self.tenants) and (not self.templates or template in self.templates)


class SecretsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The configuration's part: providers, and what of them may be asked for. What is not listed is refused."""

    providers: tuple[SecretProvider, ...] = ()
    allow: tuple[SecretGrant, ...] = ()


def wrong_with(section: SecretsSection) -> Iterable[tuple[str, str, str]]:
    """Each mistake as (place below ``secrets``, what, fix)."""
    providers: set[str] = set()
    for index, provider in enumerate(section.providers):
        place = f"providers[{index}].name"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", provider.name, re.ASCII):
            yield place, "it is no name", "use letters, digits, - and _"
        if provider.name in providers:
            yield place, f"there are two providers {provider.name!r}", "give each its own name"
        providers.add(provider.name)
    for index, grant in enumerate(section.allow):
        place = f"allow[{index}]"
        if not _NAME.fullmatch(grant.name):
            yield f"{place}.name", "it is no name", "use letters, digits, -, _ and ."
        try:
            reference = Reference.parse(grant.ref)
        except InvalidRequest as error:
            yield f"{place}.ref", error.what, error.fix
            continue
        if reference.provider not in providers:
            yield f"{place}.ref", f"there is no provider {reference.provider!r}", "list it under secrets.providers"
        if not grant.deliver:
            yield f"{place}.deliver", "it is empty", "leave it out, or name what of file, env and proxy there is"
        yield from _wrong_with_header(grant, place)
        for other in section.allow[:index]:
            if _overlap(grant, other):
                yield place, f"a sandbox could have two secrets {grant.name!r}", "give them other names or tenants"
                break


def _wrong_with_header(grant: SecretGrant, place: str) -> Iterable[tuple[str, str, str]]:
    if ("proxy" in grant.deliver) != bool(grant.hosts):
        yield f"{place}.hosts", "they go together with deliver: [proxy]", "give both: hosts it may be sent to"
    for host in grant.hosts:
        try:
            check_domain(host)
        except InvalidRequest as error:
            yield f"{place}.hosts", error.what, error.fix
        if "*" in host:
            yield f"{place}.hosts", f"{host!r} is many domains", "name each"
    if not _HEADER.fullmatch(grant.header) or grant.header.lower() in _NOT_HEADERS:
        yield f"{place}.header", "a request can't have it from us", "use one like Authorization or X-Api-Key"
    if not _PREFIX.fullmatch(grant.prefix):
        yield f"{place}.prefix", "it is no word before a token", 'use one like "Bearer ", or ""'


def _overlap(one: SecretGrant, other: SecretGrant) -> bool:
    def meet(some: tuple[str, ...], others: tuple[str, ...]) -> bool:
        return not some or not others or bool(set(some) & set(others))

    called_alike = one.name == other.name or one.ref == other.ref
    return called_alike and meet(one.tenants, other.tenants) and meet(one.templates, other.templates)
