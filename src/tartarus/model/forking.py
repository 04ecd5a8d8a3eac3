"""Copies of a live sandbox: what is asked for, and what came of each."""

from __future__ import annotations

import msgspec

from tartarus.model.checks import check_labels, require
from tartarus.model.errors import TartarusError, from_code
from tartarus.model.ids import check_name
from tartarus.model.sandbox import SandboxRecord
from tartarus.model.snapshots import SnapshotKind

MAX_FORKS = 64
"""Copies that one request may ask for; each is a sandbox with limits of its own."""
_MAX_NAME = 63 - len("-9999")


class ForkRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` copies. They are called `name` (the source's, if it has one) with ``-1``, ``-2``… after it."""

    count: int = 1
    name: str = ""
    labels: dict[str, str] = {}

    def __post_init__(self) -> None:
        require(1 <= self.count <= MAX_FORKS, f"{self.count} copies", f"ask for 1 to {MAX_FORKS}")
        if self.name:
            check_name(self.name)
            require(len(self.name) <= _MAX_NAME, "the name is too long for a number after it", "use a shorter one")
        check_labels(self.labels)


class ForkError(msgspec.Struct, frozen=True):
    """Why one copy was not made, as `TartarusError` has it."""

    code: str
    what: str
    why: str = ""
    fix: str = ""

    @classmethod
    def of(cls, error: TartarusError) -> ForkError:
        """As it crosses the wire."""
        return cls(error.code, error.what, error.why, error.fix)

    def to_error(self) -> TartarusError:
        """As it was raised."""
        return from_code(self.code, self.what, why=self.why, fix=self.fix)


class ForkChild(msgspec.Struct, frozen=True):
    """One copy: a live sandbox, or why there is none. The others live all the same."""

    sandbox: SandboxRecord | None = None
    error: ForkError | None = None


class ForkResult(msgspec.Struct, frozen=True):
    """What came of it. `paused_ms`: how long the source stood still, in milliseconds.

    `kind` is `files` where the level can't copy memory: the copies then have the source's files and nothing runs in
    them; `note` says so.
    """

    source: str
    kind: SnapshotKind
    paused_ms: float
    children: tuple[ForkChild, ...]
    note: str = ""
