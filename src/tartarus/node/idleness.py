"""Since when a sandbox has done nothing: no word between it and the host, and next to no processor time."""

from __future__ import annotations

BUSY_SHARE = 0.05
"""Of one CPU: more is work. A kernel of its own takes some for its clock, under emulation up to a few hundredths."""


class Idleness:
    """One sandbox's, from looks at it at any interval. Times are the monotonic clock's, in seconds."""

    def __init__(self) -> None:
        self._idle_from = -1.0
        self._looked_at = 0.0
        self._traffic = 0
        self._cpu_usec = 0

    def begin(self, now: float) -> None:
        """Count from now."""
        self._idle_from = now

    def since(self, now: float, traffic: int, cpu_usec: int) -> float:
        """Seconds of idleness, given all the bytes that ever went over its channel and its processor time so far."""
        elapsed_usec = (now - self._looked_at) * 1e6
        worked = cpu_usec - self._cpu_usec > BUSY_SHARE * elapsed_usec
        if self._idle_from < 0 or traffic != self._traffic or worked:
            self._idle_from = now
        self._looked_at, self._traffic, self._cpu_usec = now, traffic, cpu_usec
        return now - self._idle_from
