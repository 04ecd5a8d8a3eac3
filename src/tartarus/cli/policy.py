"""`policy`: what sandboxes of this host may ask for, with every version that it ever had."""

from __future__ import annotations

import time
from pathlib import Path

import click

from tartarus.cli import output
from tartarus.cli.show import ago, print_json, print_table
from tartarus.model.errors import InvalidRequest

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON.")
_FILE = click.argument("file", type=click.Path(path_type=Path, allow_dash=True))


@click.group()
def policy() -> None:
    """Say what sandboxes of this host may ask for, and get where they ask for nothing."""


@policy.command("put")
@_FILE
@click.option("--comment", default="", metavar="TEXT", help="Why, for its history.")
@click.option("--expected", type=int, metavar="VERSION", help="Refuse when another version came between.")
@_JSON
def put(file: Path, comment: str, expected: int | None, *, as_json: bool) -> None:
    """Put FILE's policy in force, as a new version of the policy whose id it has."""
    from tartarus.policy.documents import read_policy
    from tartarus.sdk import Policies

    text = _text(file)
    made = Policies().put(read_policy(text, str(file)).id, text, comment=comment, expected=expected)
    if as_json:
        print_json(made)
    else:
        click.echo(f"Policy '{made.id}' is in force (version {made.version})")


@policy.command("list")
@_JSON
def list_policies(*, as_json: bool) -> None:
    """List the policies in force."""
    from tartarus.sdk import Policies

    found = Policies().list()
    if as_json:
        print_json(found)
        return
    now = time.time()
    rows = [[one.id, str(one.version), one.author, ago(now - one.created_at), one.comment] for one in found]
    print_table(["ID", "VERSION", "AUTHOR", "CHANGED", "COMMENT"], rows)


@policy.command("show")
@click.argument("name")
@click.option("--version", type=int, metavar="N", help="This version; the newest if not given.")
@_JSON
def show(name: str, version: int | None, *, as_json: bool) -> None:
    """Print a policy as its author wrote it."""
    from tartarus.sdk import Policies

    found = Policies().get(name, version)
    if as_json:
        print_json(found)
    else:
        output.write(1, found.text.encode())


@policy.command("history")
@click.argument("name")
@_JSON
def history(name: str, *, as_json: bool) -> None:
    """List every version of a policy, the newest first."""
    from tartarus.sdk import Policies

    found = Policies().history(name)
    if as_json:
        print_json(found)
        return
    now = time.time()
    rows = [
        [
            str(one.version),
            one.author,
            ago(now - one.created_at),
            one.digest[:12],
            "deleted" if one.deleted else one.comment,
        ]
        for one in found
    ]
    print_table(["VERSION", "AUTHOR", "CHANGED", "SHA256", "COMMENT"], rows)


@policy.command("diff")
@click.argument("name")
@click.argument("old", type=int)
@click.argument("new", type=int, required=False)
def diff(name: str, old: int, new: int | None) -> None:
    """Show what changed from version OLD to version NEW, or to the newest."""
    from tartarus.sdk import Policies

    output.write(1, Policies().diff(name, old, new).encode())


@policy.command("rollback")
@click.argument("name")
@click.argument("version", type=int)
@click.option("--comment", default="", metavar="TEXT", help="Why, for its history.")
def rollback(name: str, version: int, comment: str) -> None:
    """Put version VERSION in force again, as a new one."""
    from tartarus.sdk import Policies

    made = Policies().rollback(name, version, comment=comment)
    click.echo(f"Policy '{made.id}' is in force as it was in version {version} (version {made.version})")


@policy.command("delete")
@click.argument("name")
def delete(name: str) -> None:
    """Take a policy out of force; its history stays."""
    from tartarus.sdk import Policies

    made = Policies().delete(name)
    click.echo(f"Policy '{made.id}' is not in force any more (version {made.version})")


@policy.command("check")
@_FILE
def check(file: Path) -> None:
    """Say whether FILE is a policy; its first mistake if not. Asks no daemon."""
    from tartarus.policy.documents import read_policy

    click.echo(f"{file} is right: policy '{read_policy(_text(file), str(file)).id}'")


@policy.command("dry-run")
@_FILE
@click.option("--hours", type=float, default=24.0, show_default=True, help="How far to look back.")
@_JSON
def dry_run(file: Path, hours: float, *, as_json: bool) -> None:
    """Judge recent requests by FILE's policy, without putting it in force: what would have been another verdict?"""
    from tartarus.sdk import Policies

    found = Policies().dry_run(_text(file), hours=hours)
    if as_json:
        print_json(found)
        return
    click.echo(
        f"{found.requests} requests: {found.rejected_after} would be rejected; "
        f"{found.rejected_before} are by what is in force"
    )
    if found.changed:
        rows = [
            [one.sandbox, one.template, f"{one.before} -> {one.after}", "; ".join(one.reasons)] for one in found.changed
        ]
        print_table(["SANDBOX", "TEMPLATE", "VERDICT", "WHY"], rows)


def _text(file: Path) -> str:
    try:
        with click.open_file(str(file), "r", encoding="utf-8") as stream:
            return str(stream.read(1024 * 1024))
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"{file} can't be read", why=str(error), fix="give a text file that is there") from None
