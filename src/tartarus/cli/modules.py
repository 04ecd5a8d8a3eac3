"""`module`: WebAssembly modules that the daemon keeps compiled. `run` sends what it lacks by itself."""

from __future__ import annotations

import time

import click

from tartarus.cli.complete import modules
from tartarus.cli.each import for_each
from tartarus.cli.show import ago, print_json, print_table
from tartarus.model.units import format_size

_SHOWN_DIGITS = 12


@click.group()
def module() -> None:
    """Keep WebAssembly modules compiled."""


@module.command("add")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
def add(files: tuple[str, ...], *, as_json: bool) -> int:
    """Compile modules ahead of their first run."""
    from tartarus.sdk import Module

    made = []

    def act(path: str) -> None:
        info = Module.add(path).info
        made.append(info)
        if not as_json:
            click.echo(f"{info.kind.capitalize()} {path} compiled (sha256: {info.digest})")

    status = for_each(files, act)
    if as_json:
        print_json(made)
    return status


@module.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Digests only.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
def list_modules(*, quiet: bool, as_json: bool) -> None:
    """List modules, the one that was used last first."""
    from tartarus.sdk import Module

    found = [kept.info for kept in Module.list()]
    if as_json:
        print_json(found)
    elif quiet:
        click.echo("".join(f"{info.digest}\n" for info in found), nl=False)
    else:
        now = time.time()
        rows = [
            [info.digest[:_SHOWN_DIGITS], info.kind, format_size(info.size_bytes), format_size(info.disk_bytes),
             "yes" if info.ready else "no", ago(max(0.0, now - info.used_at))]
            for info in found
        ]  # fmt: skip
        print_table(["SHA256", "KIND", "SIZE", "ON DISK", "READY", "USED"], rows)


@module.command("remove")
@click.argument("digests", nargs=-1, required=True, metavar="SHA256...", shell_complete=modules)
def remove(digests: tuple[str, ...]) -> int:
    """Remove modules, by their sha256 or its beginning; sandboxes that run them go on."""
    from tartarus.sdk import Module

    def act(digest: str) -> None:
        Module.remove(digest)
        click.echo(f"Module {digest} removed")

    return for_each(digests, act)
