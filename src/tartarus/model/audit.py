"""What is said about the audit log: entries, and what a verification or a proof of one is."""

from __future__ import annotations

import msgspec

from tartarus.model.checks import require

FIRST_HASH = "0" * 64
"""What the first entry of a log names as the hash before it."""
MOST_PAGE = 1000


class AuditEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is written down. Texts are sanitised by whoever writes it; the log cuts them.

    At 1,024 characters `reason` and `summary`, at 256 the others; of `rules`, 32 are kept.

    `actor`: who, as authenticated. `action` is a dotted name (``sandbox.create``), `target` an id. `decision`:
    ``allow``, ``deny``, ``require_review``, ``error`` or nothing where nothing was decided; `rules`: the ids that led
    there. `input_digest`, `output_digest`: SHA-256 of what is not written down itself.
    """

    actor: str
    tenant: str
    action: str
    target: str = ""
    decision: str = ""
    rules: tuple[str, ...] = ()
    reason: str = ""
    input_digest: str = ""
    output_digest: str = ""
    summary: str = ""
    duration_us: int = 0
    sandbox: str = ""
    trace: str = ""


class Written(AuditEntry, frozen=True):
    """An entry in its place. `sequence` from 0, `time_ms` in milliseconds since 1970 (UTC), hashes in hexadecimal."""

    sequence: int = 0
    time_ms: int = 0
    previous: str = FIRST_HASH
    hash: str = ""


class AuditQuery(msgspec.Struct, frozen=True):
    """Which entries, the newest first: fields as they must be, `action` with all below it (``sandbox``).

    `before`: a sequence. `since_ms`: milliseconds since 1970.
    """

    before: int | None = None
    limit: int = 100
    action: str = ""
    target: str = ""
    sandbox: str = ""
    tenant: str = ""
    decision: str = ""
    since_ms: int = 0

    def __post_init__(self) -> None:
        require(1 <= self.limit <= MOST_PAGE, "limit is out of range", f"use 1 to {MOST_PAGE}")

    def matches(self, entry: Written) -> bool:
        """Whether an entry is one of them, but for the time."""
        return (
            (not self.action or entry.action == self.action or entry.action.startswith(f"{self.action}."))
            and (not self.target or entry.target == self.target)
            and (not self.sandbox or self.sandbox in {entry.sandbox, entry.target})
            and (not self.tenant or entry.tenant == self.tenant)
            and (not self.decision or entry.decision == self.decision)
        )


class AuditPage(msgspec.Struct, frozen=True):
    """Entries, the newest first. `next_before`: ask again with it for those before; None when that was all."""

    entries: tuple[Written, ...]
    next_before: int | None = None


class AuditFinding(msgspec.Struct, frozen=True):
    """One thing of the log that does not hold."""

    where: str
    what: str


class AuditVerification(msgspec.Struct, frozen=True):
    """What was looked at: entries from `first` up to before `size`; the last checkpoint covers `signed` of them.

    `key`: the public key whose signatures were found, as signed notes write it.
    """

    first: int
    size: int
    signed: int
    key: str
    findings: tuple[AuditFinding, ...] = ()


class AuditProof(msgspec.Struct, frozen=True):
    """All that a stranger needs to check an entry, beside the log's public key."""

    entry: Written
    size: int
    path: tuple[str, ...]
    checkpoint: str
