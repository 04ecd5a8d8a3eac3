"""`audit`: who did what, what was decided, and whether the log still says what it said."""

from __future__ import annotations

import itertools
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tartarus.cli import output
from tartarus.cli.show import print_json, print_table
from tartarus.model.audit import MOST_PAGE, AuditQuery
from tartarus.model.errors import InvalidRequest
from tartarus.model.units import parse_duration

if TYPE_CHECKING:
    from tartarus.model.audit import AuditVerification, Written

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON.")
_BROKEN_STATUS = 1


@click.group()
def audit() -> None:
    """Look at the audit log, verify all of it, prove one entry of it."""


def _since(text: str) -> int:
    return int((time.time() - parse_duration(text)) * 1000) if text else 0


@audit.command("list")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@click.option("--action", default="", help="This one, or all below it: sandbox, sandbox.create.")
@click.option("--sandbox", default="", metavar="ID", help="About this sandbox.")
@click.option("--tenant", default="", help="Of this tenant.")
@click.option("--decision", default="", help="allow, deny, require_review or error.")
@click.option("--since", default="", metavar="DURATION", help="Not older: 10m, 7d.")
@_JSON
def list_entries(
    limit: int, action: str, sandbox: str, tenant: str, decision: str, since: str, *, as_json: bool
) -> None:
    """List entries, the newest first."""
    from tartarus.sdk import Audit

    query = AuditQuery(
        limit=min(limit, MOST_PAGE), action=action, sandbox=sandbox, tenant=tenant, decision=decision,
        since_ms=_since(since),
    )  # fmt: skip
    found = list(itertools.islice(Audit().entries(query), limit))
    if as_json:
        print_json(found)
        return
    print_table(
        ["SEQ", "TIME", "ACTOR", "ACTION", "TARGET", "DECISION", "WHY"],
        [
            [str(one.sequence), _time(one), one.actor, one.action, one.target, one.decision, one.reason or one.summary]
            for one in found
        ],
    )


@audit.command("export")
@click.option("--since", default="", metavar="DURATION", help="Not older: 10m, 7d.")
def export(since: str) -> None:
    """Print every entry as a line of JSON, the newest first; canonical, as its hash is made of it."""
    from tartarus.sdk import Audit
    from tartarus.store.audit.entries import line_of

    for one in Audit().entries(AuditQuery(limit=MOST_PAGE, since_ms=_since(since))):
        output.write(1, line_of(one))


@audit.command("verify")
@click.option(
    "--directory", type=click.Path(path_type=Path), help="This log's directory; nothing is asked of its daemon."
)
@click.option("--key", default="", help="With --directory: the log's public key, as you kept it.")
@click.option(
    "--witness", type=click.Path(path_type=Path), help="With --directory: a file with checkpoints kept elsewhere."
)
@_JSON
def verify(directory: Path | None, key: str, witness: Path | None, *, as_json: bool) -> int:
    """Check every hash, the chain, the tree and every checkpoint; exit with 1 when something does not hold."""
    found = _offline(directory, key, witness) if directory is not None else _online(key, witness)
    if as_json:
        print_json(found)
    else:
        click.echo(f"{found.size - found.first} entries, {found.signed} of {found.size} signed by {found.key}")
        for one in found.findings:
            click.echo(f"{one.where}: {one.what}")
        if not found.findings:
            click.echo("All of it holds.")
    return _BROKEN_STATUS if found.findings else 0


@audit.command("prove")
@click.argument("sequence", type=int)
def prove(sequence: int) -> None:
    """Print a proof that entry SEQUENCE is in the log, for `audit check-proof`."""
    from tartarus.sdk import Audit

    print_json(Audit().prove(sequence))


@audit.command("check-proof")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--key", required=True, help="The log's public key: name+id+key.")
def check_proof(file: Path, key: str) -> int:
    """Check a proof by the log's public key alone: no daemon, no log. Exits with 1 when it does not hold."""
    import msgspec

    from tartarus.model.audit import AuditProof
    from tartarus.store.audit import reading

    try:
        with click.open_file(str(file), "rb") as stream:
            proof = msgspec.json.decode(stream.read(1024 * 1024), type=AuditProof)
        holds = reading.check_proof(proof, key)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{file} can't be checked", why=str(error), fix="give what audit prove printed") from None
    click.echo(
        f"Entry {proof.entry.sequence} is in the log of {proof.size} entries that was signed."
        if holds
        else "The proof does not hold."
    )
    return 0 if holds else _BROKEN_STATUS


def _online(key: str, witness: Path | None) -> AuditVerification:
    from tartarus.sdk import Audit

    if key or witness is not None:
        raise InvalidRequest("--key and --witness go with --directory", fix="give the log's directory")
    return Audit().verify()


def _offline(directory: Path, key: str, witness: Path | None) -> AuditVerification:
    from tartarus.store.audit import reading

    try:
        return reading.verify(directory, reading.witnessed(witness) if witness is not None else (), key)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{directory} can't be verified", why=str(error), fix="give the directory audit below the state directory"
        ) from None


def _time(entry: Written) -> str:
    return datetime.fromtimestamp(entry.time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
