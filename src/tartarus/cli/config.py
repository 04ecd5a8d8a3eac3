"""`config`: what the daemon's file says, and whether it may."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tartarus.cli.show import print_json, print_table
from tartarus.model.errors import InvalidRequest
from tartarus.model.settings import Settings


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def config(context: click.Context, *, as_json: bool) -> None:
    """Show what a daemon that starts now would be configured with, and what of that the file says."""
    if context.invoked_subcommand is not None:
        return
    from tartarus.control.configuring import read_configuration
    from tartarus.model.configuration import in_force

    bare = Settings.from_environment(os.environ, os.geteuid())
    defaults, found = in_force(bare), in_force(read_configuration(bare))
    if as_json:
        print_json({"file": str(bare.config_file), "settings": found})
        return
    rows = [
        (name, value, "" if value == defaults[name] else f"default {defaults[name]}") for name, value in found.items()
    ]
    print_table(("KEY", "VALUE", ""), rows)
    there = bare.config_file is not None and bare.config_file.exists()
    click.echo(f"\nFile: {bare.config_file}{'' if there else ' (there is none)'}")


@config.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Say whether FILE could be the daemon's configuration; its first mistake if not."""
    from tartarus.model.configuration import configured

    try:
        text = file.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"{file} can't be read", why=error.strerror or "", fix="give a file that is there"
        ) from None
    configured(Settings.at(Path("/")), text, str(file))
    click.echo(f"{file} is right")
