"""`up`, `down` and `version`: the daemon itself. Other commands start it when they need it."""

from __future__ import annotations

import time

import click

from tartarus import __version__
from tartarus.cli.show import duration, print_json
from tartarus.model.errors import DaemonUnavailable

_STOP_S = 60.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The daemon's version, process and places, as JSON.")
def up(*, as_json: bool) -> None:
    """Start the daemon, unless it runs."""
    from tartarus.sdk import Client
    from tartarus.sdk.daemon import try_connect

    client = Client()
    connection = try_connect(client.places)
    was_up = connection is not None
    if connection is not None:
        connection.close()
    version = client.version()
    if as_json:
        print_json(
            {"version": version.version, "pid": version.pid, "started_at": version.started_at, "was_up": was_up,
             "socket": client.places.socket, "state_dir": client.places.state_dir}
        )  # fmt: skip
    else:
        running = f"running for {duration(time.time() - version.started_at)}" if was_up else "started"
        click.echo(f"Daemon {version.version} {running} (pid {version.pid}, socket {client.places.socket})")


@click.command()
def down() -> None:
    """Stop the daemon; sandboxes that live end as killed. Fine when it does not run."""
    from tartarus.sdk import Client
    from tartarus.sdk.daemon import stop

    stopped = stop(Client().places, _STOP_S)
    click.echo("Daemon stopped" if stopped else "The daemon is not running")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON; the daemon's is null when it does not run.")
def version(*, as_json: bool) -> None:
    """Show the versions of this client and of the daemon, if it runs."""
    from tartarus.sdk import Client

    try:
        daemon = Client(start=False, any_version=True).version().version
    except DaemonUnavailable:
        daemon = None
    if as_json:
        print_json({"client": __version__, "daemon": daemon})
    else:
        click.echo(f"tartarus {__version__}\ndaemon {daemon or 'not running'}")
