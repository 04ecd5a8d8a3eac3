"""`lamentations`: what failed and why, and what never ran."""

from __future__ import annotations

import time

import click

from tartarus.cli import output
from tartarus.cli.show import ago, print_json, print_table
from tartarus.model.lamentations import Category
from tartarus.model.units import parse_duration

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON.")


@click.group()
def lamentations() -> None:
    """Show what failed and why, and try again what never ran (Cocytus)."""


@lamentations.command("list")
@click.option("--sandbox", metavar="ID", help="Of this sandbox.")
@click.option("--category", type=click.Choice([one.value for one in Category]), help="Of this kind.")
@click.option("--since", metavar="AGE", help="Not older than this, as in 30m or 7d.")
@click.option("--dead-letters", is_flag=True, help="What never ran, and was not tried again.")
@click.option("--limit", type=int, default=100, show_default=True, help="At most so many.")
@_JSON
def list_lamentations(
    *, sandbox: str | None, category: str | None, since: str | None, dead_letters: bool, limit: int, as_json: bool
) -> None:
    """List failed runs, newest first."""
    from tartarus.sdk import Lamentations

    now = time.time()
    found = Lamentations().list(
        sandbox=sandbox, category=category, since=None if since is None else now - parse_duration(since),
        dead_letters=dead_letters, limit=limit,
    )  # fmt: skip
    if as_json:
        print_json(found)
        return
    rows = [
        [
            one.id, one.sandbox_id or "-", one.template, one.category.value, one.fault.value,
            "yes" if one.dead_letter and not one.retried_as else "-", ago(now - one.timestamp), one.message[:80],
        ]
        for one in found
    ]  # fmt: skip
    print_table(["ID", "SANDBOX", "TEMPLATE", "CATEGORY", "FAULT", "DEAD LETTER", "WHEN", "MESSAGE"], rows)


@lamentations.command("show")
@click.argument("lamentation_id", metavar="ID")
@_JSON
def show(lamentation_id: str, *, as_json: bool) -> None:
    """Show one failed run, with the last that it said."""
    from tartarus.sdk import Lamentations

    found = Lamentations().get(lamentation_id)
    if as_json:
        print_json(found)
        return
    facts = {
        "sandbox": found.sandbox_id, "template": found.template, "category": found.category.value,
        "fault": found.fault.value, **found.metadata, "retried as": found.retried_as,
    }  # fmt: skip
    lines = [found.message, "", *(f"{name:<10} {value}" for name, value in facts.items() if value)]
    text = "\n".join(output.one_line(line) for line in lines) + "\n"
    if found.stack_trace:
        text += "\n" + "\n".join(_indented(line) for line in found.stack_trace.splitlines()) + "\n"
    output.write(1, text.encode())


@lamentations.command("retry")
@click.argument("lamentation_id", metavar="ID")
def retry(lamentation_id: str) -> None:
    """Try again what never ran; prints the new sandbox's id."""
    from tartarus.sdk import Lamentations

    click.echo(Lamentations().retry(lamentation_id).id)


@lamentations.command("purge")
@click.option("--older-than", metavar="AGE", help="Keep those that are younger, as in 7d; all go without it.")
def purge(older_than: str | None) -> None:
    """Forget failed runs."""
    from tartarus.sdk import Lamentations

    age_s = 0.0 if older_than is None else parse_duration(older_than)
    click.echo(f"{Lamentations().purge(older_than_s=age_s)} forgotten")


def _indented(line: str) -> str:
    text = line.lstrip(" ")
    return " " * (len(line) - len(text)) + output.one_line(text)
