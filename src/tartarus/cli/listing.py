"""`ps` and `inspect`: which sandboxes there are, and all that is known of one."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import click
import msgspec

from tartarus.cli.complete import sandboxes
from tartarus.cli.show import ago, duration, print_json, print_table
from tartarus.model.errors import InvalidState
from tartarus.model.sandbox import Network
from tartarus.model.states import State

if TYPE_CHECKING:
    from tartarus.model.sandbox import SandboxRecord


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Ended sandboxes too.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only those with this label.")
@click.option(
    "--state", "states", multiple=True, type=click.Choice([state.value for state in State]), metavar="STATE",
    help="Only those in this state. May be repeated.",
)  # fmt: skip
@click.option("--wide", is_flag=True, help="Name and isolation too.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of records.")
def ps(
    *, everything: bool, labels: tuple[str, ...], states: tuple[str, ...], wide: bool, quiet: bool, as_json: bool
) -> None:
    """List sandboxes: the live ones, newest first."""
    from tartarus.sdk import Sandbox
    from tartarus.sdk.shorthand import labels as read_labels

    wanted = list(states) or (list(State) if everything else None)
    records = [sandbox.info for sandbox in Sandbox.list(states=wanted, labels=read_labels(labels))]
    if as_json:
        print_json(records)
    elif quiet:
        click.echo("".join(f"{record.id}\n" for record in records), nl=False)
    else:
        now = time.time()
        head = ["ID", "TEMPLATE", "STATUS", "STARTED", "DURATION"] + (["NAME", "ISOLATION"] if wide else [])
        print_table(head, [_row(record, now, wide=wide) for record in records])


def _row(record: SandboxRecord, now: float, *, wide: bool) -> list[str]:
    began = record.started_at if record.started_at is not None else record.created_at
    ended = record.ended_at if record.ended_at is not None else now
    row = [record.id, record.template, record.state.value, ago(now - began), duration(ended - began)]
    return [*row, record.name or "-", record.isolation.value] if wide else row


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="SANDBOX...", shell_complete=sandboxes)
def inspect(names: tuple[str, ...]) -> int:
    """Show all that is known of sandboxes, by id, name or id prefix, as a JSON list."""
    from tartarus.cli.each import for_each
    from tartarus.sdk import Sandbox

    found: list[dict[str, object]] = []

    def look(name: str) -> None:
        sandbox = Sandbox.connect(name)
        shown: dict[str, object] = msgspec.to_builtins(sandbox.info)
        spec = sandbox.info.spec
        if sandbox.info.ended_at is None and (spec.network is not Network.NONE or spec.publish):
            # One that ends between the two looks has no network any more.
            with contextlib.suppress(InvalidState):
                shown["network"] = msgspec.to_builtins(sandbox.network())
        found.append(shown)

    status = for_each(names, look)
    print_json(found)
    return status
