"""`fork`: live copies of a sandbox."""

from __future__ import annotations

import click
import msgspec

from tartarus.cli import output
from tartarus.cli.complete import sandboxes
from tartarus.cli.show import print_json


@click.command()
@click.argument("sandbox", shell_complete=sandboxes)
@click.option("-n", "--count", default=1, show_default=True, metavar="N", help="How many copies.")
@click.option("--name", default="", metavar="NAME", help="Call them NAME-1, NAME-2 and so on; else by SANDBOX's name.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of each. May be repeated.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fork(sandbox: str, count: int, name: str, labels: tuple[str, ...], *, quiet: bool, as_json: bool) -> int:
    """Make live copies of a sandbox, memory included at the gvisor and microvm levels; it goes on.

    A container's copies have its files, and nothing runs in them. Exit status 125 if a copy could not be made; the
    others live all the same.
    """
    from tartarus.sdk import Sandbox
    from tartarus.sdk.shorthand import labels as read_labels

    forks = Sandbox.connect(sandbox).fork(count, name=name, labels=read_labels(labels))
    if as_json:
        print_json(
            {
                "kind": forks.kind.value, "paused_ms": forks.paused_ms, "note": forks.note,
                "sandboxes": [msgspec.to_builtins(copy.info) for copy in forks],
                "errors": [
                    {"code": error.code, "what": error.what, "why": error.why, "fix": error.fix}
                    for error in forks.errors
                ],
            }
        )  # fmt: skip
    else:
        for copy in forks:
            click.echo(copy.id if quiet or not copy.info.name else f"{copy.id}  {copy.info.name}")
        if not quiet:
            click.echo(f"{len(forks)} copies of {forks.kind.value}; {sandbox} stood still for {forks.paused_ms:.0f} ms")
            if forks.note:
                click.echo(forks.note)
    status = 0
    for error in forks.errors:
        status = output.report(error)
    return status
