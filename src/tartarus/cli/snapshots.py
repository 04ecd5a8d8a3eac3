"""`snapshot`: what a sandbox has changed in its files, kept to go on from."""

from __future__ import annotations

import time

import click

from tartarus.cli.complete import sandboxes, snapshots
from tartarus.cli.each import for_each
from tartarus.cli.show import ago, print_json, print_table
from tartarus.model.units import format_size

_NAMES = click.argument("names", nargs=-1, required=True, metavar="SNAPSHOT...", shell_complete=snapshots)


@click.group()
def snapshot() -> None:
    """Keep what sandboxes have changed in their files."""


@snapshot.command("create")
@click.argument("sandbox", shell_complete=sandboxes)
@click.option("--name", default="", metavar="NAME", help="A name to find it by.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label. May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def create(sandbox: str, name: str, labels: tuple[str, ...], *, as_json: bool) -> None:
    """Take a snapshot of a live sandbox, which goes on; run --snapshot makes sandboxes from it."""
    from tartarus.sdk import Sandbox
    from tartarus.sdk.shorthand import labels as read_labels

    taken = Sandbox.connect(sandbox).snapshot(name=name, labels=read_labels(labels)).info
    if as_json:
        print_json(taken)
    else:
        click.echo(f"Snapshot '{taken.name or taken.id}' created (ID: {taken.id}, {format_size(taken.size_bytes)})")


@snapshot.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
def list_snapshots(*, quiet: bool, as_json: bool) -> None:
    """List snapshots, newest first."""
    from tartarus.sdk import Snapshot

    found = [taken.info for taken in Snapshot.list()]
    if as_json:
        print_json(found)
    elif quiet:
        click.echo("".join(f"{info.id}\n" for info in found), nl=False)
    else:
        now = time.time()
        rows = [
            [info.id, info.name or "-", info.template, info.sandbox, format_size(info.size_bytes),
             ago(now - info.created_at)]
            for info in found
        ]  # fmt: skip
        print_table(["ID", "NAME", "TEMPLATE", "SANDBOX", "SIZE", "CREATED"], rows)


@snapshot.command("inspect")
@_NAMES
def inspect(names: tuple[str, ...]) -> int:
    """Show all that is known of snapshots, as a JSON list."""
    from tartarus.sdk import Snapshot

    found = []
    status = for_each(names, lambda name: found.append(Snapshot.get(name).info))
    print_json(found)
    return status


@snapshot.command("delete")
@_NAMES
def delete(names: tuple[str, ...]) -> int:
    """Delete snapshots; sandboxes made from them go on."""
    from tartarus.sdk import Snapshot

    def act(name: str) -> None:
        Snapshot.delete(name)
        click.echo(f"Snapshot {name} deleted")

    return for_each(names, act)
