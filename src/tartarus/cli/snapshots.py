"""`snapshot`: a sandbox's files, or its memory too, kept to go on from."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from tartarus.cli.complete import sandboxes, snapshots
from tartarus.cli.each import for_each
from tartarus.cli.show import ago, print_json, print_table
from tartarus.model.units import format_size

if TYPE_CHECKING:
    from tartarus.model.library import SnapshotInfo

_NAME = click.option("--name", default="", metavar="NAME", help="A name to find it by.")
_LABELS = click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label. May be repeated.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_NAMES = click.argument("names", nargs=-1, required=True, metavar="SNAPSHOT...", shell_complete=snapshots)


@click.group()
def snapshot() -> None:
    """Keep what sandboxes have changed in their files, or all of them as they run."""


@snapshot.command("create")
@click.argument("sandbox", shell_complete=sandboxes)
@click.argument("called", default="", metavar="[NAME]")
@_NAME
@_LABELS
@click.option("--memory", is_flag=True, help="Its memory and what runs in it too, not its files alone.")
@_JSON
def create(sandbox: str, called: str, name: str, labels: tuple[str, ...], *, memory: bool, as_json: bool) -> None:
    """Take a snapshot of a live sandbox, which goes on; run --snapshot makes sandboxes from it."""
    from tartarus.model.errors import InvalidRequest
    from tartarus.sdk import Sandbox
    from tartarus.sdk.shorthand import labels as read_labels

    if name and called:
        raise InvalidRequest("two names given", fix="leave out --name")
    _say_made(Sandbox.connect(sandbox).snapshot(name=name or called, labels=read_labels(labels), memory=memory).info,
              as_json=as_json)  # fmt: skip


@snapshot.command("export")
@click.argument("name", metavar="SNAPSHOT", shell_complete=snapshots)
@click.argument("path", metavar="FILE", type=click.Path(dir_okay=False))
def export(name: str, path: str) -> None:
    """Write a snapshot of memory to a file, sealed with this host's key; it holds what was in memory, secrets too."""
    from tartarus.sdk import Snapshot

    Snapshot.get(name).export(path)
    click.echo(f"Snapshot {name} exported to {path}")


@snapshot.command("import")
@click.argument("path", metavar="FILE", type=click.Path(dir_okay=False, allow_dash=True))
@_NAME
@_LABELS
@_JSON
def bring(path: str, name: str, labels: tuple[str, ...], *, as_json: bool) -> None:
    """Take in a snapshot that was exported here, or on a host whose key is trusted here."""
    from tartarus.sdk import Snapshot
    from tartarus.sdk.shorthand import labels as read_labels

    _say_made(Snapshot.load(path, name=name, labels=read_labels(labels)).info, as_json=as_json)


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
            [info.id, info.name or "-", info.kind.value, info.template, info.sandbox, format_size(info.size_bytes),
             ago(now - info.created_at)]
            for info in found
        ]  # fmt: skip
        print_table(["ID", "NAME", "KIND", "TEMPLATE", "SANDBOX", "SIZE", "CREATED"], rows)


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


def _say_made(taken: SnapshotInfo, *, as_json: bool) -> None:
    if as_json:
        print_json(taken)
        return
    still = "" if not taken.isolation or taken.paused_ms is None else f", stood still for {taken.paused_ms:.0f} ms"
    click.echo(f"Snapshot '{taken.name or taken.id}' created (ID: {taken.id}, {format_size(taken.size_bytes)}{still})")
