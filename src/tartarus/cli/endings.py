"""`stop` and `drain`: graceful ends, of single sandboxes and of all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from tartarus.cli.complete import sandboxes
from tartarus.cli.each import for_each
from tartarus.cli.show import ago, print_json, print_table
from tartarus.model.errors import TartarusError
from tartarus.model.snapshots import SnapshotKind
from tartarus.model.units import format_size

if TYPE_CHECKING:
    from tartarus.model.library import SnapshotInfo
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
@click.option(
    "--checkpoint",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[NAME]",
    help="Keep it first, under that name if one is given; resume starts it anew from there. Write it last.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of what became of them.")
def stop(
    names: tuple[str, ...], *, signal: str, grace: str | None, checkpoint: str | None, quiet: bool, as_json: bool
) -> int:
    """Ask sandboxes to end: a signal to everything in them, time to end, then force."""
    from tartarus.sdk import Sandbox

    stopped = []
    kept: bool | str = False if checkpoint is None else checkpoint or True

    def act(name: str) -> None:
        done = Sandbox.connect(name).stop(signal=signal, grace=grace, checkpoint=kept)
        stopped.append(done)
        if not (quiet or as_json):
            click.echo(f"Sandbox {done.sandbox.id} {how(done.sandbox)}")
            if done.checkpoint is not None:
                click.echo(kept_as(done.checkpoint))

    status = for_each(names, act)
    if as_json:
        print_json(stopped)
    return status


def kept_as(info: SnapshotInfo) -> str:
    """A checkpoint that was taken, for people."""
    what = "its memory" if info.kind is SnapshotKind.MEMORY else "its files; its command would start anew"
    return f"Checkpoint '{info.name or info.id}' has {what} (ID: {info.id}, {format_size(info.size_bytes)})"


@click.command()
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
def checkpoints(*, quiet: bool, as_json: bool) -> None:
    """List checkpoints, newest first; resume starts a sandbox anew from one, and snapshot delete deletes it."""
    from tartarus.sdk import Client

    found = Client().checkpoints()
    if as_json:
        print_json(found)
    elif quiet:
        click.echo("".join(f"{info.id}\n" for info in found), nl=False)
    else:
        now = time.time()
        rows = [
            [info.id, info.name or "-", info.sandbox, info.kind.value, format_size(info.size_bytes),
             ago(now - info.created_at)]
            for info in found
        ]  # fmt: skip
        print_table(["ID", "NAME", "SANDBOX", "KIND", "SIZE", "CREATED"], rows)


def how(record: SandboxRecord) -> str:
    """How it ended, for people."""
    status = "" if record.exit_code is None else f" (exit code: {record.exit_code})"
    return f"{record.state.value}{status}{': ' if record.message else ''}{record.message}"


@click.command()
@_signal
@_grace
@click.option("--hibernate", is_flag=True, help="Put to sleep what can be, and end only the others.")
@click.option("--checkpoint", is_flag=True, help="Keep each first; resume starts them anew.")
@click.option("--undo", is_flag=True, help="Take new sandboxes again.")
@click.option("--status", "look", is_flag=True, help="Only show whether the node is drained.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def drain(
    *, signal: str, grace: str | None, hibernate: bool, checkpoint: bool, undo: bool, look: bool, as_json: bool
) -> int:
    """Take no new sandboxes, and end all there are, each as with stop. The daemon goes on."""
    from tartarus.sdk import Client

    client = Client()
    if undo:
        client.undo_drain()
    report = (
        client.draining()
        if undo or look
        else client.drain(signal=signal, grace=grace, hibernate=hibernate, checkpoint=checkpoint)
    )
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
                each.checkpoint or "-",
            ]
            for each in report.ended
        ]
        print_table(["ID", "NAME", "STATE", "REASON", "MESSAGE", "CHECKPOINT"], rows)
    state = "takes no new sandboxes" if report.draining else "takes new sandboxes"
    left = f"; left: {' '.join(report.left)}" if report.left else "; none is left" if report.draining else ""
    asleep = f"; hibernated: {' '.join(report.asleep)}" if report.asleep else ""
    click.echo(f"The node {state}{left}{asleep}")
