"""`stop` and `drain`: graceful ends, of single sandboxes and of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tartarus.cli.complete import sandboxes
from tartarus.cli.each import for_each
from tartarus.cli.show import print_json, print_table
from tartarus.model.errors import TartarusError

if TYPE_CHECKING:
    from tartarus.model.lifecycle import DrainReport
    from tartarus.model.sandbox import SandboxRecord

_signal = click.option(
    "-s", "--signal", default="", metavar="SIGNAL", help="What to send, as TERM or 15; the sandbox's own if not given."
)
_grace = click.option(
    "--grace", metavar="DURATION", help="How long it then has, such as 30s, or 0; the sandbox's own if not given."
)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="SANDBOX...", shell_complete=sandboxes)
@_signal
@_grace
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of what became of them.")
def stop(names: tuple[str, ...], *, signal: str, grace: str | None, quiet: bool, as_json: bool) -> int:
    """Ask sandboxes to end: a signal to everything in them, time to end, then force."""
    from tartarus.sdk import Sandbox

    stopped = []

    def act(name: str) -> None:
        done = Sandbox.connect(name).stop(signal=signal, grace=grace)
        stopped.append(done)
        if not (quiet or as_json):
            click.echo(f"Sandbox {done.sandbox.id} {how(done.sandbox)}")

    status = for_each(names, act)
    if as_json:
        print_json(stopped)
    return status


def how(record: SandboxRecord) -> str:
    """How it ended, for people."""
    status = "" if record.exit_code is None else f" (exit code: {record.exit_code})"
    return f"{record.state.value}{status}{': ' if record.message else ''}{record.message}"


@click.command()
@_signal
@_grace
@click.option("--hibernate", is_flag=True, help="Put to sleep what can be, and end only the others.")
@click.option("--undo", is_flag=True, help="Take new sandboxes again.")
@click.option("--status", "look", is_flag=True, help="Only show whether the node is drained.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def drain(*, signal: str, grace: str | None, hibernate: bool, undo: bool, look: bool, as_json: bool) -> int:
    """Take no new sandboxes, and end all there are, each as with stop. The daemon goes on."""
    from tartarus.sdk import Client

    client = Client()
    if undo:
        client.undo_drain()
    report = client.draining() if undo or look else client.drain(signal=signal, grace=grace, hibernate=hibernate)
    if as_json:
        print_json(report)
    else:
        _show(report)
    return TartarusError.exit_status if report.left and not (undo or look) else 0


def _show(report: DrainReport) -> None:
    if report.ended:
        rows = [
            [
                each.id,
                each.name or "-",
                each.state.value,
                each.reason.value if each.reason else "-",
                each.message or "-",
            ]
            for each in report.ended
        ]
        print_table(["ID", "NAME", "STATE", "REASON", "MESSAGE"], rows)
    state = "takes no new sandboxes" if report.draining else "takes new sandboxes"
    left = f"; left: {' '.join(report.left)}" if report.left else "; none is left" if report.draining else ""
    asleep = f"; hibernated: {' '.join(report.asleep)}" if report.asleep else ""
    click.echo(f"The node {state}{left}{asleep}")
