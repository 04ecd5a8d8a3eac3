"""Time limits of the client's own waits."""

from __future__ import annotations

import time


class Deadline:
    """A moment to give up at, `timeout_s` from now; never without one."""

    def __init__(self, timeout_s: float | None) -> None:
        self._end = None if timeout_s is None else time.monotonic() + timeout_s
        self._asked = False

    def left_s(self, most_s: float) -> float:
        """Seconds left, at most `most_s`; negative once over, but never on the first question."""
        first, self._asked = not self._asked, True
        if self._end is None:
            return most_s
        left_s = self._end - time.monotonic()
        return max(0.0, min(left_s, most_s)) if first else min(left_s, most_s)
