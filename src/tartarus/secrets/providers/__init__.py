"""Where values are kept: one module for each kind, and whatever installed packages add."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Protocol

from tartarus.model.errors import InvalidRequest
from tartarus.model.secrets import Reference, SecretProvider

ENTRY_POINTS = "tartarus.secrets"
"""The group of entry points whose functions make a provider of their options; the entry's name is the kind."""


class Provider(Protocol):
    """One place that keeps values. A plugin's is believed as little: its answer has a deadline and a cap."""

    def fetch(self, reference: Reference) -> bytes | bytearray:
        """The value, in a thread of its own. Raises SecretUnavailable; of anything else only the kind is told."""
        ...


Maker = Callable[[dict[str, str]], Provider]


def make(settings: SecretProvider) -> Provider:
    """The provider of a configuration. Raises InvalidRequest for an unknown kind or a wrong option."""
    try:
        return _maker(settings.kind)(dict(settings.options))
    except InvalidRequest as error:
        raise InvalidRequest(
            f"secrets provider {settings.name!r}: {error.what}", why=error.why, fix=error.fix
        ) from None


def _maker(kind: str) -> Maker:
    if kind == "env-file":
        from tartarus.secrets.providers.envfile import EnvFile

        return EnvFile.made
    if kind == "age":
        from tartarus.secrets.providers.age import AgeVault

        return AgeVault
    if kind == "vault":
        from tartarus.secrets.providers.hashicorp import HashicorpVault

        return HashicorpVault
    if kind in {"aws-secrets-manager", "aws-kms"}:
        from tartarus.secrets.providers import aws

        return aws.SecretsManager if kind == "aws-secrets-manager" else aws.KmsFile
    for entry in entry_points(group=ENTRY_POINTS, name=kind):
        maker: Maker = entry.load()
        return maker
    raise InvalidRequest(f"there is no kind {kind!r}", fix=f"use one of: {', '.join(KINDS)}, or install its plugin")


KINDS = ("env-file", "age", "vault", "aws-secrets-manager", "aws-kms")


def take(options: dict[str, str], *names: str, optional: tuple[str, ...] = ()) -> list[str]:
    """The options of these names, "" for an optional one that is left out. Raises InvalidRequest for any other."""
    for name in options:
        if name not in {*names, *optional}:
            raise InvalidRequest(f"unknown option {name!r}", fix=f"known: {', '.join((*names, *optional))}")
    for name in names:
        if not options.get(name):
            raise InvalidRequest(f"the option {name!r} is missing", fix="give it under options")
    return [options.get(name, "") for name in (*names, *optional)]
