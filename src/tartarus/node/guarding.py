"""What a sandbox tells whoever enforces its limits."""

from __future__ import annotations

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
