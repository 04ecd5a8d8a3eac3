"""Failed runs as structured records (Cocytus): what went wrong, whose fault it was, and what never ran at all."""

from __future__ import annotations

from enum import Enum

import msgspec

from tartarus.model.checks import require

MAX_TRACE_BYTES = 4096
"""How much of what a run said last is kept with its failure, in bytes."""
MAX_PAGE = 1000


class Category(str, Enum):
    """What went wrong."""

    START_FAILED = "start_failed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    SIGNAL = "signal"
    EXIT_CODE = "exit_code"
    GUEST_LOST = "guest_lost"
    RESOURCE = "resource"
    POLICY = "policy"
    NETWORK = "network"
    IMAGE = "image"
    INFRASTRUCTURE = "infrastructure"


class Fault(str, Enum):
    """Whose it is: the program's own, a limit that it reached, a policy's refusal, or this platform's."""

    PROGRAM = "program"
    LIMIT = "limit"
    POLICY = "policy"
    PLATFORM = "platform"


class Lamentation(msgspec.Struct, frozen=True, kw_only=True):
    """One failure. `timestamp`: Unix seconds.

    `stack_trace`: the last that its command wrote to its standard error, or the chain of causes of a start that failed.
    `dead_letter`: it never ran, and what was asked for is kept to be tried again; `retried_as`: the sandbox that was.
    """

    id: str
    tenant: str
    sandbox_id: str
    template: str
    timestamp: float
    category: Category
    fault: Fault
    message: str
    stack_trace: str = ""
    metadata: dict[str, str] = {}
    dead_letter: bool = False
    retried_as: str = ""


class LamentationFilter(msgspec.Struct, frozen=True):
    """What a listing is narrowed to; None means any. Times are Unix seconds."""

    sandbox_id: str | None = None
    category: Category | None = None
    since: float | None = None
    until: float | None = None
    dead_letters: bool = False
    limit: int = 100

    def __post_init__(self) -> None:
        require(1 <= self.limit <= MAX_PAGE, "limit is out of range", f"use 1 to {MAX_PAGE}")


class PurgeLamentations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Forget those older than so many seconds; all of them with 0."""

    older_than_s: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.older_than_s < 1e12, "older_than_s is out of range", "give seconds, 0 for all")


class Purged(msgspec.Struct, frozen=True):
    """How many were forgotten."""

    purged: int
