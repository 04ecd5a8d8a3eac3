"""`kill`, `pause`, `resume`, `hibernate` and `wake`: one or several sandboxes, by id, name or id prefix."""

from __future__ import annotations

import click

from tartarus.cli.complete import sandboxes
from tartarus.cli.each import for_each
from tartarus.model.errors import SandboxNotFound, SnapshotNotFound
from tartarus.model.signals import signal_number

_names = click.argument("names", nargs=-1, required=True, metavar="SANDBOX...", shell_complete=sandboxes)


@click.command()
@_names
@click.option(
    "-s", "--signal", "signal", metavar="SIGNAL", help="Only send the main command this signal, as TERM or 15."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
def kill(names: tuple[str, ...], *, signal: str | None, quiet: bool) -> int:
    """End sandboxes and everything in them."""
    from tartarus.sdk import Sandbox

    number = None if signal is None else signal_number(signal)

    def end(name: str) -> None:
        sandbox = Sandbox.connect(name)
        if number is not None:
            sandbox.signal(number)
        else:
            sandbox.kill()
            if not quiet:
                click.echo(f"Sandbox {sandbox.id} terminated")

    return for_each(names, end)


@click.command()
@_names
def pause(names: tuple[str, ...]) -> int:
    """Freeze every process of sandboxes."""
    from tartarus.sdk import Sandbox

    return for_each(names, lambda name: Sandbox.connect(name).pause())


@click.command()
@_names
def resume(names: tuple[str, ...]) -> int:
    """Let paused sandboxes go on; of a checkpoint, start a sandbox anew and print its id."""
    from tartarus.sdk import Sandbox

    def act(name: str) -> None:
        try:
            sandbox = Sandbox.connect(name)
        except SandboxNotFound as missing:
            try:
                click.echo(Sandbox.resume_checkpoint(name).id)
            except SnapshotNotFound as error:
                raise (error if name.startswith("snap-") else missing) from None
        else:
            sandbox.resume()

    return for_each(names, act)


@click.command()
@_names
@click.option("--after", metavar="DURATION", help="Only then, such as 10m, whatever they do then; return at once.")
def hibernate(names: tuple[str, ...], *, after: str | None) -> int:
    """Write sandboxes' memory to disk and give everything else back; whatever is asked of one wakes it."""
    from tartarus.sdk import Sandbox

    return for_each(names, lambda name: Sandbox.connect(name).hibernate(after=after))


@click.command()
@_names
def wake(names: tuple[str, ...]) -> int:
    """Let hibernated sandboxes go on."""
    from tartarus.sdk import Sandbox

    return for_each(names, lambda name: Sandbox.connect(name).wake())
