"""`template`: what sandboxes are made from."""

from __future__ import annotations

import click

from tartarus.cli.show import print_json, print_table
from tartarus.model.units import format_size


@click.group()
def template() -> None:
    """Show what sandboxes are made from."""


@template.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
def list_templates(*, as_json: bool) -> None:
    """List templates."""
    from tartarus.sdk import Client

    found = Client().templates()
    if as_json:
        print_json(found)
        return
    rows = [
        [item.id, item.base, format_size(item.resources.memory_bytes), f"{item.resources.cpu_milli / 1000:g}",
         "yes" if item.warm_up else "no", item.description or "-"]
        for item in found
    ]  # fmt: skip
    print_table(["TEMPLATE", "BASE", "MEMORY", "CPUS", "WARM", "DESCRIPTION"], rows)
