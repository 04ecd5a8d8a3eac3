"""`seccomp`: profiles of system calls, recorded from programs that run."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from tartarus.cli import output
from tartarus.cli.show import print_json, print_table

if TYPE_CHECKING:
    from tartarus.sdk import CommandResult

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON.")
_NAME = click.argument("name")
_TEMPLATE = click.option("--template", default="host", show_default=True, help="What to make the sandbox from.")
_COMMAND = click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_KILLED = 128 + signal.SIGSYS


@click.group()
def seccomp() -> None:
    """Profiles say which system calls programs may make: --security seccomp_profile=NAME, or in a template."""


@seccomp.command("record", context_settings=_PASSED_ON)
@click.option("--save", metavar="NAME", help="Keep the profile under this name, instead of printing it.")
@_TEMPLATE
@_COMMAND
def record(command: tuple[str, ...], template: str, save: str | None) -> int:
    """Run a command in a sandbox, see every system call of it and its children, and make a profile of them.

    The command's output goes to standard error. What it did not do this time, the profile will not let it do.
    """
    from tartarus.sdk import Seccomp

    calls, result = _recorded(command, template)
    _show(result)
    if result.exit_code != 0:
        click.echo(f"the command ended with status {result.exit_code}: the profile may lack what it did not come to",
                   err=True)  # fmt: skip
    if save is None:
        print_json({"calls": calls, "description": _described(command)})
    else:
        kept = Seccomp().put(save, calls, description=_described(command))
        click.echo(f"Profile {kept.name} allows {len(kept.calls)} system calls")
    return result.exit_code


@seccomp.command("list")
@_JSON
def list_profiles(*, as_json: bool) -> None:
    """List the built-in profiles and yours."""
    from tartarus.sdk import Seccomp

    found = Seccomp().list()
    if as_json:
        print_json(found)
        return
    rows = [[one.name, "built in" if one.builtin else "yours", str(len(one.calls)), one.description[:70]]
            for one in found]  # fmt: skip
    print_table(["NAME", "KIND", "CALLS", "FOR"], rows)


@seccomp.command("show")
@_NAME
@_JSON
def show(name: str, *, as_json: bool) -> None:
    """Print the calls that a profile allows, one a line."""
    from tartarus.sdk import Seccomp

    profile = Seccomp().get(name)
    if as_json:
        print_json(profile)
    else:
        click.echo("".join(f"{call}\n" for call in profile.calls), nl=False)


@seccomp.command("diff")
@click.argument("old")
@click.argument("new")
def diff(old: str, new: str) -> int:
    """Say which calls only one of two profiles allows. Exit status 1 when they differ."""
    from tartarus.sdk import Seccomp

    before, after = (frozenset(Seccomp().get(name).calls) for name in (old, new))
    marks = [(call, "-" if call in before else "+") for call in sorted(before ^ after)]
    click.echo("".join(f"{mark}{call}\n" for call, mark in marks), nl=False)
    return 1 if marks else 0


@seccomp.command("test", context_settings=_PASSED_ON)
@_NAME
@_TEMPLATE
@_COMMAND
def try_out(name: str, command: tuple[str, ...], template: str) -> int:
    """Run a command under a profile that kills what leaves it; say which calls the profile lacks for it."""
    from tartarus.model.security import SeccompAction, SecurityConfig
    from tartarus.sdk import Sandbox, Seccomp

    allowed = frozenset(Seccomp().get(name).calls)
    security = SecurityConfig(seccomp_profile=name, seccomp_default=SeccompAction.KILL)
    with Sandbox.create(template, isolation="container", security=security) as sandbox:
        result = sandbox.run(command)
    _show(result)
    if result.exit_code == 0:
        click.echo(f"{name} holds: the command ended well under it")
        return 0
    calls, _ = _recorded(command, template)
    lacking = sorted(set(calls) - allowed)
    how = "it was killed for a call" if result.exit_code == _KILLED else f"it ended with status {result.exit_code}"
    click.echo(f"{name} does not hold: {how}; not in the profile: {', '.join(lacking) or 'nothing that it calls'}")
    return 1


@seccomp.command("rm")
@click.argument("names", nargs=-1, required=True)
def remove(names: tuple[str, ...]) -> int:
    """Remove profiles of yours; sandboxes that have them keep them."""
    from tartarus.cli.each import for_each
    from tartarus.sdk import Seccomp

    def act(name: str) -> None:
        Seccomp().remove(name)
        click.echo(f"Profile {name} removed")

    return for_each(names, act)


def _recorded(command: Sequence[str], template: str) -> tuple[list[str], CommandResult]:
    """The calls of a command, as a warm interpreter's clone where the template has one, and as a start of its own."""
    from tartarus.sdk import Sandbox, Seccomp

    calls: set[str] = set()
    with Sandbox.create(template, isolation="container", record_calls=True) as sandbox:
        result = sandbox.run(command)
        calls |= Seccomp().recorded(sandbox.id).keys()
        warm = sandbox.info.warm
    if warm:
        with Sandbox.create(template, isolation="container", record_calls=True) as sandbox:
            sandbox.run(["env", *command])
            calls |= Seccomp().recorded(sandbox.id).keys()
    return sorted(calls), result


def _described(command: Sequence[str]) -> str:
    return f"recorded of: {output.one_line(' '.join(command))}"[:1000]


def _show(result: CommandResult) -> None:
    output.write(2, result.stdout_bytes + result.stderr_bytes)
