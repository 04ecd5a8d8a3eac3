"""`doctor`: what this host can give, found out by trying, and how to get what it can't."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from tartarus.cli import output
from tartarus.cli.show import print_json
from tartarus.model.errors import TartarusError

if TYPE_CHECKING:
    from tartarus.node.doctor import Check
    from tartarus.sdk import LevelReport

_MARKS = {True: ("ok", "32"), False: ("fail", "31"), None: ("note", "33")}


class Findings(NamedTuple):
    """Everything found: the host's parts, the levels that were tried, and what kept the daemon from trying."""

    healthy: bool
    checks: list[Check]
    levels: list[LevelReport]
    daemon_error: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--security", is_flag=True, help="How hardened the host is instead, as advice; nothing is started.")
def doctor(*, as_json: bool, security: bool) -> int:
    """Find out what this host can give: each part is tried, then a small guest at each isolation level.

    Exit status 1 when something that every level needs is missing, or no level works.
    """
    found = hardened() if security else examine()
    if as_json:
        print_json(found._asdict())
    else:
        output.write(1, render(found, colours=sys.stdout.isatty()).encode())
    return 0 if found.healthy else 1


def hardened() -> Findings:
    """What the host's settings would let an escaped sandbox, or another user, do."""
    from tartarus.node.doctor import check_kernel, check_landlock
    from tartarus.node.hosthardening import examine_security
    from tartarus.runtimes.confine import landlock

    checks = [check_kernel(platform.release()), check_landlock(landlock.abi()), *examine_security()]
    return Findings(True, checks, [])


def examine() -> Findings:
    """Try everything; starts the daemon for the levels."""
    from tartarus.compat.checks import engine_checks
    from tartarus.node.doctor import EVERY_LEVEL, examine
    from tartarus.sdk import Client

    client = Client()
    # First, since it forks: no thread and no connection may be there yet.
    checks = examine(Path(client.places.state_dir))
    try:
        levels, daemon_error = client.levels(), ""
    except TartarusError as error:
        levels, daemon_error = [], str(error)
    checks += engine_checks()
    lacking = any(check.ok is False and set(EVERY_LEVEL) <= set(check.needed_for) for check in checks)
    return Findings(not lacking and any(level.ok for level in levels), checks, levels, daemon_error)


def render(found: Findings, *, colours: bool) -> str:
    """The findings as lines: a mark, what, the detail, and below it what to do."""
    lines = []
    for check in found.checks:
        needed = f" (for {', '.join(check.needed_for)})" if check.ok is False and check.needed_for else ""
        lines += _entry(check.ok, check.name, check.detail + needed, check.fix, colours=colours)
    if found.daemon_error:
        lines += _entry(False, "daemon", found.daemon_error, "", colours=colours)
    for level in found.levels:
        took = f", a guest started and ended in {level.proved_ms:.0f} ms" if level.proved_ms is not None else ""
        lines += _entry(level.ok, f"level {level.isolation}", level.detail + took, level.fix, colours=colours)
    return "".join(f"{line}\n" for line in lines)


def _entry(ok: bool | None, name: str, detail: str, fix: str, *, colours: bool) -> list[str]:
    word, colour = _MARKS[ok]
    mark = f"\x1b[{colour}m{word:<4}\x1b[0m" if colours else f"{word:<4}"
    lines = [f"{mark}  {name:<28} {output.one_line(detail)}"]
    return [*lines, f"      → {output.one_line(fix)}"] if fix and ok is not True else lines
