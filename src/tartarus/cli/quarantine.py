"""`quarantine`: sandboxes that are frozen, cut off, and kept as evidence."""

from __future__ import annotations

import time

import click

from tartarus.cli import output
from tartarus.cli.complete import sandboxes
from tartarus.cli.show import ago, print_json, print_table
from tartarus.model.quarantine import Case, QuarantineReason
from tartarus.model.units import format_size

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON.")
_CASE = click.argument("name", metavar="CASE")


@click.group()
def quarantine() -> None:
    """Hold sandboxes that broke the rules, and look at what they left (Typhon). CASE: its id, or its sandbox's."""


@quarantine.command("add")
@click.argument("sandbox", shell_complete=sandboxes)
@click.option("--reason", type=click.Choice([one.value for one in QuarantineReason]), default="manual_flag")
@click.option("--detail", default="", metavar="TEXT", help="In words, for the record.")
@_JSON
def add(sandbox: str, reason: str, detail: str, *, as_json: bool) -> None:
    """Freeze a live sandbox, cut it off, and keep its evidence; prints the case's id."""
    from tartarus.sdk import Quarantine

    case = Quarantine().take(sandbox, reason=reason, detail=detail)
    if as_json:
        print_json(case)
    else:
        click.echo(case.id)


@quarantine.command("list")
@_JSON
def list_cases(*, as_json: bool) -> None:
    """List the cases, newest first."""
    from tartarus.sdk import Quarantine

    found = Quarantine().list()
    if as_json:
        print_json(found)
        return
    now = time.time()
    rows = [
        [one.id, one.sandbox_id, one.tenant, one.status.value, one.reason.value, _evidence(one), ago(now - one.at),
         one.detail[:60]]
        for one in found
    ]  # fmt: skip
    print_table(["CASE", "SANDBOX", "TENANT", "STATUS", "REASON", "EVIDENCE", "SINCE", "WHY"], rows)


@quarantine.command("show")
@_CASE
@_JSON
def show(name: str, *, as_json: bool) -> None:
    """Show one case, and what is kept of it."""
    from tartarus.sdk import Quarantine

    case = Quarantine().get(name)
    if as_json:
        print_json(case)
        return
    frozen = "no" if case.freeze_ms is None else f"in {case.freeze_ms:g} ms"
    facts = {
        "case": case.id, "sandbox": case.sandbox_id, "name": case.name, "tenant": case.tenant,
        "template": case.template, "isolation": case.isolation.value, "status": case.status.value,
        "reason": case.reason.value, "why": case.detail, "by": case.by, "frozen": frozen,
        "network cut": "yes" if case.network_cut else "no", "evidence": _evidence(case), "trouble": case.trouble,
        "closed by": case.closed_by,
    }  # fmt: skip
    lines = [f"{name:<12} {output.one_line(value)}" for name, value in facts.items() if value]
    output.write(1, ("\n".join(lines) + "\n").encode())
    if case.evidence:
        output.write(1, b"\n")
        rows = [
            [one.name, one.path or "-", format_size(one.bytes), one.sha256[:12], one.missing] for one in case.evidence
        ]
        print_table(["EVIDENCE", "FILE", "SIZE", "SHA256", "MISSING"], rows)


@quarantine.command("release")
@_CASE
@click.option("--paused", is_flag=True, help="Leave it frozen until it is resumed.")
def release(name: str, *, paused: bool) -> None:
    """Let a sandbox go on; its evidence stays."""
    from tartarus.sdk import Quarantine

    record = Quarantine().release(name, paused=paused)
    click.echo(f"Sandbox {record.id} is {record.state.value}")


@quarantine.command("destroy")
@_CASE
@click.option("--keep-evidence", is_flag=True, help="End it, but keep what it left.")
def destroy(name: str, *, keep_evidence: bool) -> None:
    """End a sandbox, and remove its evidence."""
    from tartarus.sdk import Quarantine

    Quarantine().destroy(name, keep_evidence=keep_evidence)
    click.echo(f"{name} is destroyed" + (", its evidence is kept" if keep_evidence else ""))


@quarantine.command("examine", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_CASE
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def examine(name: str, command: tuple[str, ...]) -> int | None:
    """Make a sandbox that sees the evidence, read-only, at /evidence, and has no network; prints its id.

    With COMMAND: run that in it, and end it.
    """
    from tartarus.sdk import Quarantine, Sandbox

    record = Quarantine().examine(name)
    if not command:
        click.echo(record.id)
        return None
    examiner = Sandbox.connect(record.id)
    try:
        result = examiner.run(command)
    finally:
        examiner.kill()
    output.write(1, result.stdout_bytes)
    output.write(2, result.stderr_bytes)
    return result.exit_code


def _evidence(case: Case) -> str:
    if not case.complete:
        return "none yet" if not case.trouble else "not kept"
    return format_size(sum(one.bytes for one in case.evidence))
