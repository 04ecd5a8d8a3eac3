"""What is said over the API about policies. The documents themselves are `tartarus.policy`'s."""

from __future__ import annotations

import msgspec

from tartarus.model.checks import require
from tartarus.model.ids import check_name

MAX_TEXT = 256 * 1024


class PolicyVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a policy: its YAML as its author wrote it, `digest` the SHA-256 of that.

    `version` counts from 1 for each policy. `deleted`: from this version on it is not in force. Times are Unix seconds.
    """

    id: str
    version: int
    text: str
    digest: str
    author: str
    comment: str = ""
    created_at: float
    deleted: bool = False


class PutPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new version of a policy. `expected`: the version that its author changed; refused when another came between."""

    text: str
    comment: str = ""
    expected: int | None = None

    def __post_init__(self) -> None:
        require(len(self.text) <= MAX_TEXT, "the policy is too long", f"use at most {MAX_TEXT} characters")
        require(len(self.comment) <= 1000, "the comment is too long", "use at most 1000 characters")


class Rollback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Make an earlier version the newest one again."""

    version: int
    comment: str = ""


class DryRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Try a policy against the requests of the last `hours`, without putting it in force."""

    text: str
    hours: float = 24.0

    def __post_init__(self) -> None:
        require(len(self.text) <= MAX_TEXT, "the policy is too long", f"use at most {MAX_TEXT} characters")
        require(0 < self.hours <= 24 * 366, "hours are out of range", "use more than 0 and at most a year")


class ChangedVerdict(msgspec.Struct, frozen=True):
    """A request whose verdict would be another: of a sandbox that was made, by its id."""

    sandbox: str
    tenant: str
    template: str
    before: str
    after: str
    reasons: tuple[str, ...]


class DryRunReport(msgspec.Struct, frozen=True):
    """How a policy would have judged. What was live at once is not counted, since it is not known any more."""

    requests: int
    rejected_before: int
    rejected_after: int
    changed: tuple[ChangedVerdict, ...]


def check_policy_id(text: str) -> str:
    """An id as policies have it, which is a name. Raises InvalidRequest."""
    check_name(text)
    return text
