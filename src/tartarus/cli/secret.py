"""`secret`: a vault of our own, encrypted with age, and the renewal of what live sandboxes were given.

Values come from standard input or a hidden prompt, never from the command line, which everybody on the host can read.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tartarus.cli import output
from tartarus.cli.show import ago, print_json, print_table
from tartarus.model.errors import InvalidRequest
from tartarus.model.secrets import MAX_SECRET_BYTES
from tartarus.model.settings import Settings

if TYPE_CHECKING:
    from tartarus.secrets.vault import Key, Vault

_VAULT = click.option(
    "--vault",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The vault; secrets.age beside config.yaml if not given.",
)
_IDENTITY = click.option(
    "--identity", type=click.Path(path_type=Path), metavar="FILE",
    help="Its age identity, 0600; the vault's name with .key if not given.",
)  # fmt: skip
_PASSPHRASE = click.option("--passphrase", is_flag=True, help="It has a passphrase instead, which is asked for.")
_PASSPHRASE_FILE = click.option(
    "--passphrase-file", type=click.Path(path_type=Path), metavar="FILE", help="A file (0600) with its passphrase."
)


@click.group()
def secret() -> None:
    """Keep secrets in a vault that age encrypts, and renew those of live sandboxes."""


@secret.command("create")
@_VAULT
@_IDENTITY
@_PASSPHRASE
@_PASSPHRASE_FILE
def create(vault: Path | None, identity: Path | None, passphrase_file: Path | None, *, passphrase: bool) -> None:
    """Make an empty vault, and a new age identity to open it with unless it gets a passphrase."""
    opened, place = _opened(vault, identity, passphrase_file, passphrase=passphrase, new=True)
    opened.create()
    click.echo(f"Vault {place} made")


@secret.command("set")
@click.argument("name")
@_VAULT
@_IDENTITY
@_PASSPHRASE
@_PASSPHRASE_FILE
def set_value(
    name: str, vault: Path | None, identity: Path | None, passphrase_file: Path | None, *, passphrase: bool
) -> None:
    """Keep a value, read from standard input as it is (a terminal is asked for it), over an older one."""
    opened, _ = _opened(vault, identity, passphrase_file, passphrase=passphrase)
    if sys.stdin.isatty():
        value = str(click.prompt("Value", hide_input=True, confirmation_prompt=True)).encode()
    else:
        value = sys.stdin.buffer.read(MAX_SECRET_BYTES + 1)
    click.echo(f"Secret {name!r} is kept (revision {opened.set(name, value)})")


@secret.command("get")
@click.argument("name")
@_VAULT
@_IDENTITY
@_PASSPHRASE
@_PASSPHRASE_FILE
def get(
    name: str, vault: Path | None, identity: Path | None, passphrase_file: Path | None, *, passphrase: bool
) -> None:
    """Print a value, and nothing besides."""
    opened, _ = _opened(vault, identity, passphrase_file, passphrase=passphrase)
    output.write(1, opened.get(name))


@secret.command("list")
@_VAULT
@_IDENTITY
@_PASSPHRASE
@_PASSPHRASE_FILE
@click.option("--json", "as_json", is_flag=True, help="JSON.")
def list_names(
    vault: Path | None, identity: Path | None, passphrase_file: Path | None, *, passphrase: bool, as_json: bool
) -> None:
    """List names, without values."""
    opened, _ = _opened(vault, identity, passphrase_file, passphrase=passphrase)
    found = opened.names()
    if as_json:
        print_json([
            {"name": name, "revision": entry.revision, "changed_at": entry.changed_at} for name, entry in found.items()
        ])  # fmt: skip
        return
    now = time.time()
    rows = [[name, str(entry.revision), ago(now - entry.changed_at)] for name, entry in found.items()]
    print_table(["NAME", "REVISION", "CHANGED"], rows)


@secret.command("rm")
@click.argument("name")
@_VAULT
@_IDENTITY
@_PASSPHRASE
@_PASSPHRASE_FILE
def remove(
    name: str, vault: Path | None, identity: Path | None, passphrase_file: Path | None, *, passphrase: bool
) -> None:
    """Forget a value."""
    opened, _ = _opened(vault, identity, passphrase_file, passphrase=passphrase)
    opened.remove(name)
    click.echo(f"Secret {name!r} is gone")


@secret.command("rotate")
@_VAULT
@_IDENTITY
@_PASSPHRASE
@_PASSPHRASE_FILE
def rotate(vault: Path | None, identity: Path | None, passphrase_file: Path | None, *, passphrase: bool) -> None:
    """Encrypt the vault with a new identity, or a new passphrase (asked for); the old one opens it no more."""
    renewal = ""
    if passphrase or passphrase_file is not None:
        renewal = str(click.prompt("New passphrase", hide_input=True, confirmation_prompt=True, err=True))
    opened, place = _opened(vault, identity, passphrase_file, passphrase=passphrase, renewal=renewal)
    opened.rotate()
    click.echo(f"Vault {place} has a new key")


@secret.command("refresh")
@click.argument("sandbox")
def refresh(sandbox: str) -> None:
    """Replace the secret files of a running sandbox by what their providers say now."""
    from tartarus.sdk import Secrets

    names = Secrets().refresh(sandbox).names
    click.echo(f"Renewed: {', '.join(names)}" if names else "This sandbox has no secrets as files")


def _opened(
    vault: Path | None, identity: Path | None, passphrase_file: Path | None, *, passphrase: bool, new: bool = False,
    renewal: str = "",
) -> tuple[Vault, Path]:  # fmt: skip
    from tartarus.secrets.vault import IdentityKey, PassphraseKey, Vault

    settings = Settings.from_environment(os.environ, os.geteuid())
    assert settings.config_file is not None
    place = (vault or settings.config_file.with_name("secrets.age")).absolute()
    if sum((identity is not None, passphrase, passphrase_file is not None)) > 1:
        raise InvalidRequest("several keys are given", fix="give --identity, --passphrase or --passphrase-file")
    key: Key
    if passphrase_file is not None:
        key = PassphraseKey.in_file(passphrase_file.absolute(), renewal)
    elif passphrase:
        key = PassphraseKey(
            str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=new, err=True)), renewal
        )
    else:
        key = IdentityKey(identity.absolute() if identity is not None else place.with_suffix(".key"))
    return Vault(place, key), place
