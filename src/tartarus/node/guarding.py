"""What a sandbox tells whoever enforces its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Guard(Protocol):
    """One sandbox's."""

    kills_at_deadline: bool
    """Whether its time limit ends it, so that a grace ahead of it makes sense."""

    def past_deadline(self) -> bool:
        """Its time limit has passed; whether that was answered otherwise than by its end."""
        ...

    def stands_still(self) -> None:
        """It is about to be saved: its counters may not be there any more afterwards."""
        ...

    def has_another_guest(self) -> None:
        """It was woken up, or saved in a way that may have taken another guest."""
        ...


class Tally:
    """Counts by name, for whoever listens later."""

    def __init__(self) -> None:
        self._early: list[str] = []
        self._listener: Callable[[str], None] | None = None

    def add(self, name: str) -> None:
        """One more."""
        if self._listener is None:
            self._early.append(name)
        else:
            self._listener(name)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Tell each that was, and each that comes."""
        self._listener, early = listener, self._early
        self._early = []
        for name in early:
            listener(name)
