"""The gate: built-in rules, then a token, then the rules of files, then an extension. Whatever breaks in it denies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import structlog

from tartarus.policy.acts import STRENGTH, Act, Decision, Effect, Matched
from tartarus.policy.rules import RuleSet, Verdict
from tartarus.policy.tokens import Token, TokenLedger

_log = structlog.get_logger("tartarus.policy")
MOST_BUILT_IN = 10


class Extension(Protocol):
    """A user's own code that judges. It has its own time limit."""

    def judge(self, act: Act) -> Verdict:
        """What it says; raises whatever it raises."""
        ...

    def restart(self) -> None:
        """Begin anew after a failure."""
        ...


class Gate:
    """Decides. `replace_rules` puts other rules in force, all at once; built-in ones stay."""

    def __init__(
        self, built_in: RuleSet, rules: RuleSet, *, tokens: TokenLedger | None = None,
        extension: Extension | None = None, now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._built_in = built_in
        self._rules = rules
        self._tokens = tokens
        self._extension = extension
        self._now = now

    def replace_rules(self, rules: RuleSet) -> None:
        """From the next decision on."""
        self._rules = rules

    def decide(self, act: Act, token: Token | None = None) -> Decision:
        """What holds for an act. Never raises: what goes wrong is a denial that says so in `error`."""
        now = self._now()  # one moment for all of the evaluation
        rules = self._rules
        digest = f"{self._built_in.digest[:16]}+{rules.digest[:16]}"
        try:
            return self._decide(act, token, rules, digest, now)
        except Exception as error:  # noqa: BLE001 - a gate that breaks stays shut, and says that it broke
            _log.exception("gate_broken", action=act.action)
            return Decision(Effect.DENY, "default", (), digest, error=f"{type(error).__name__}: {error}")

    def _decide(self, act: Act, token: Token | None, rules: RuleSet, digest: str, now: float) -> Decision:
        votes = [("built-in", self._built_in.judge(act))]
        if votes[0][1].effect in (None, Effect.ALLOW) and token is not None and self._tokens is not None:
            redeemed = self._tokens.redeem(token, act, now)
            if redeemed:
                said = Matched(token.id, Effect.ALLOW, "a capability token", "token", 0)
                return Decision(Effect.ALLOW, "token", (*votes[0][1].matched, said), digest)
        if votes[0][1].effect is not Effect.DENY:
            votes.append(("rules", rules.judge(act)))
            if votes[1][1].effect is not Effect.DENY and self._extension is not None:
                votes.append(("extension", self._ask(self._extension, act)))
        return _strictest(votes, digest)

    def _ask(self, extension: Extension, act: Act) -> Verdict:
        try:
            return extension.judge(act)
        except Exception:
            _log.exception("extension_failed", action=act.action)
            extension.restart()
            raise


def _strictest(votes: list[tuple[str, Verdict]], digest: str) -> Decision:
    matched = tuple(rule for _, verdict in votes for rule in verdict.matched)
    heard = [(verdict.effect, phase) for phase, verdict in votes if verdict.effect is not None]
    if not heard:
        return Decision(Effect.DENY, "default", matched, digest)
    effect, phase = max(heard, key=lambda vote: STRENGTH[vote[0]])
    return Decision(effect, phase, matched, digest)
