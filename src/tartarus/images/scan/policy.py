"""Which findings keep a template from being used."""

from __future__ import annotations

import datetime as dt
from typing import Literal

import msgspec

from tartarus.images.scan.findings import Finding, ScanReport, rank

Level = Literal["low", "medium", "high", "critical"]


class Ignore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vulnerability that somebody looked at and lets pass: by id or alias, with a reason, until the end of a day."""

    id: str
    reason: str
    until: dt.date | None = None


class ScanPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What blocks: findings at `block_at` or worse; None lets everything pass.

    With `fix_only` only those that an update would mend; with `block_unknown` also those that nobody rated. With
    `require_complete` a report with gaps blocks, with `max_database_age_days` one from an older database.
    """

    block_at: Level | None = None
    fix_only: bool = False
    block_unknown: bool = False
    ignore: tuple[Ignore, ...] = ()
    require_complete: bool = False
    max_database_age_days: int | None = None

    @property
    def can_block(self) -> bool:
        """Whether any report at all could be blocked: if so, a template that can't be scanned has to be."""
        asks = self.block_unknown or self.require_complete
        return asks or self.block_at is not None or self.max_database_age_days is not None


class Verdict(msgspec.Struct, frozen=True):
    """Whether the template is blocked, the reasons in words, and what was ignored or no longer is."""

    blocked: bool
    reasons: tuple[str, ...] = ()
    blocking: tuple[Finding, ...] = ()
    ignored: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def judge(report: ScanReport, policy: ScanPolicy, today: dt.date) -> Verdict:
    """What `policy` says of `report` on the day `today`."""
    reasons: list[str] = []
    notes: list[str] = []
    live: dict[str, Ignore] = {}
    for each in policy.ignore:
        if each.until is None or each.until >= today:
            live[each.id] = each
        else:
            notes.append(f"{each.id} was ignored until {each.until}: {each.reason}")
    blocking: list[Finding] = []
    ignored: list[Finding] = []
    for found in report.findings:
        if not _counts(found, policy):
            continue
        if live.keys() & {found.id, *found.aliases}:
            ignored.append(found)
        else:
            blocking.append(found)
            reasons.append(_reason(found))
    if policy.require_complete and (report.gaps or report.checked < report.packages):
        gaps = "; ".join(report.gaps[:3])
        reasons.append(
            f"only {report.checked} of {report.packages} packages could be checked" + (f": {gaps}" if gaps else "")
        )
    if policy.max_database_age_days is not None:
        reasons += _age(report.database_date, policy.max_database_age_days, today)
    return Verdict(bool(reasons), tuple(reasons), tuple(blocking), tuple(ignored), tuple(notes))


def _counts(found: Finding, policy: ScanPolicy) -> bool:
    if policy.fix_only and not found.fixed_in:
        return False
    if found.severity == "unknown":
        return policy.block_unknown
    return policy.block_at is not None and rank(found.severity) >= rank(policy.block_at)


def _reason(found: Finding) -> str:
    mend = f"fixed in {', '.join(found.fixed_in[:3])}" if found.fixed_in else "no fix is known"
    doubt = "" if found.certain else ", its version can't be compared"
    return f"{found.id} ({found.severity}) in {found.package} {found.version}: {mend}{doubt}"


def _age(day: str, limit: int, today: dt.date) -> list[str]:
    try:
        age = (today - dt.date.fromisoformat(day)).days
    except ValueError:
        return ["the vulnerability database does not say how old it is"]
    return [f"the vulnerability database is {age} days old, at most {limit} are allowed"] if age > limit else []
