"""What is judged (`Act`) and what the judgement is (`Decision`)."""

from __future__ import annotations

from enum import Enum

import msgspec

FACTS = ("caller_tag", "host", "mode", "state", "tenant", "template", "isolation", "network", "user", "role", "tool")
"""The plain fields of an act that rules can name, beside `action`, `path` and `argv`."""


class Effect(str, Enum):
    """What a rule says, and what is decided. Strength grows downwards."""

    ALLOW = "allow"
    REQUIRE_REVIEW = "require_review"
    DENY = "deny"


STRENGTH = {Effect.ALLOW: 0, Effect.REQUIRE_REVIEW: 1, Effect.DENY: 2}


class Act(msgspec.Struct, frozen=True):
    """Something that somebody wants to do.

    `paths`: every path it touches (both ends of a move), as `canonical` gives them. `argv`: a command's words, with
    `executable` the file that the first one leads to. `facts`: values of `FACTS`. `amounts`: numbers that constraints
    bound (``file_size`` in bytes, ``duration`` in seconds, …). `sandbox`: whose channel it arrived on.
    """

    action: str
    paths: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    executable: str = ""
    facts: dict[str, str] = {}
    amounts: dict[str, float] = {}
    sandbox: str = ""


class Matched(msgspec.Struct, frozen=True):
    """A rule that took part in a decision, and the path it matched on. `line` is 0 where no file says it."""

    id: str
    effect: Effect
    reason: str
    source: str
    line: int
    path: str = ""


class Decision(msgspec.Struct, frozen=True):
    """What holds for an act.

    `phase`: what decided (``built-in``, ``token``, ``rules``, ``extension``, or ``default`` when nothing matched).
    `error`: why nothing could be decided, which is a denial too, and not the same as one. `rules`: digest of the rule
    sets that were asked.
    """

    effect: Effect
    phase: str
    matched: tuple[Matched, ...] = ()
    rules: str = ""
    error: str = ""

    @property
    def allowed(self) -> bool:
        """Whether it may happen without asking anybody."""
        return self.effect is Effect.ALLOW

    @property
    def reasons(self) -> tuple[str, ...]:
        """In words, from the rules that decided."""
        if self.error:
            return (f"the gate could not decide: {self.error}",)
        said = tuple(f"{rule.id}: {rule.reason}" if rule.reason else rule.id for rule in self.matched
                     if rule.effect is self.effect)  # fmt: skip
        return said or (() if self.allowed else ("no rule allows it",))
