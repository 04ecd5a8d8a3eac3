"""Quarantined sandboxes (Typhon): why, since when, what is kept of them, and what became of them."""

from __future__ import annotations

from enum import Enum

import msgspec

from tartarus.model.checks import no_nul, require
from tartarus.model.sandbox import Isolation


class QuarantineReason(str, Enum):
    """Why; the names of the user's roadmap."""

    SUSPICIOUS_BEHAVIOR = "suspicious_behavior"
    POLICY_VIOLATION = "policy_violation"
    UNTRUSTED_SOURCE = "untrusted_source"
    MANUAL_FLAG = "manual_flag"


class CaseStatus(str, Enum):
    """HELD: frozen, its processes are there. DEAD: they ended with the daemon that held them. The others are over."""

    HELD = "held"
    DEAD = "dead"
    RELEASED = "released"
    ENDED = "ended"


class Evidence(msgspec.Struct, frozen=True):
    """One kept thing: a file or directory of the case. `missing`: why it is not there. Sizes are bytes."""

    name: str
    path: str = ""
    bytes: int = 0
    sha256: str = ""
    missing: str = ""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One quarantined sandbox. Times are Unix seconds, durations milliseconds.

    `freeze_ms`: from the decision to nothing of it running; None when it could not be frozen, and was ended.
    `complete`: all evidence that its level gives was written; `trouble`: what kept it from that, or from being held.
    """

    id: str
    sandbox_id: str
    tenant: str
    name: str
    template: str
    isolation: Isolation
    reason: QuarantineReason
    detail: str
    by: str
    at: float
    status: CaseStatus
    freeze_ms: float | None = None
    network_cut: bool = False
    evidence: tuple[Evidence, ...] = ()
    complete: bool = False
    trouble: str = ""
    closed_at: float | None = None
    closed_by: str = ""


class QuarantineRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Quarantine a live sandbox. `reason` for the record, `detail` in words."""

    reason: QuarantineReason = QuarantineReason.MANUAL_FLAG
    detail: str = ""

    def __post_init__(self) -> None:
        no_nul(self.detail, "detail")
        require(len(self.detail) <= 1000, "the detail is too long", "use at most 1000 characters")


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Let a quarantined sandbox go on; `paused`: it stays frozen until it is resumed."""

    paused: bool = False
