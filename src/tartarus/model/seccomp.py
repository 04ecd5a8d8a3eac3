"""Profiles: which system calls programs may make, by name; built-in ones for classes of work, and a tenant's own."""

from __future__ import annotations

import msgspec

from tartarus.model.checks import require

MAX_CALLS = 512
MAX_DESCRIPTION = 1024
_MOST_NAME = 40


class PutProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A profile to keep: the calls that it allows, in no order, and what it is for."""

    calls: tuple[str, ...]
    description: str = ""

    def __post_init__(self) -> None:
        require(len(self.calls) <= MAX_CALLS, f"{len(self.calls)} calls", f"use at most {MAX_CALLS}")
        require(len(self.description) <= MAX_DESCRIPTION, "the description is too long",
                f"use at most {MAX_DESCRIPTION} characters")  # fmt: skip
        for name in self.calls:
            simple = name.isascii() and name.replace("_", "a").isalnum() and len(name) <= _MOST_NAME
            require(simple, f"{name[:_MOST_NAME]!r} is no system call's name", "use names as in syscalls(2)")


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One profile. `builtin`: it comes with Tartarus, for a class of work. `created_at`: Unix seconds."""

    name: str
    calls: tuple[str, ...]
    description: str = ""
    builtin: bool = False
    created_at: float = 0.0


class RecordedCalls(msgspec.Struct, frozen=True):
    """What a sandbox whose calls are recorded has called until now, its agent included: how often, by name."""

    calls: dict[str, int]
