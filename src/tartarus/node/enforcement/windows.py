"""Rules over many violations: so many of a kind within so long a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tartarus.model.enforcement import ViolationKind
from tartarus.policy.documents import WindowRule

_MOST_KEPT = 4096


class Windows:
    """One sandbox's. What is older than the longest window is forgotten."""

    def __init__(self, rules: Iterable[WindowRule]) -> None:
        self._rules = tuple(rules)
        self._seen: dict[ViolationKind, deque[tuple[float, int]]] = {}

    def add(self, kind: ViolationKind, count: int, now: float) -> WindowRule | None:
        """`count` more of a kind at `now` (seconds of any steady clock); the rule that is broken by it, if one is."""
        rules = [rule for rule in self._rules if rule.violation is kind]
        if not rules:
            return None
        seen = self._seen.setdefault(kind, deque(maxlen=_MOST_KEPT))
        seen.append((now, count))
        longest_s = max(rule.within_s for rule in rules)
        while seen[0][0] < now - longest_s:
            seen.popleft()
        for rule in rules:
            if sum(number for at, number in seen if at >= now - rule.within_s) >= rule.count:
                return rule
        return None
