"""Doing something to several sandboxes: one that fails does not keep the others from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tartarus.cli import output
from tartarus.model.errors import DaemonUnavailable, TartarusError, VersionMismatch


def for_each(names: Iterable[str], act: Callable[[str], None]) -> int:
    """Call `act` for each name and print its errors; returns the exit status of the last that failed, or 0."""
    status = 0
    for name in names:
        try:
            act(name)
        except (DaemonUnavailable, VersionMismatch):
            raise
        except TartarusError as error:
            status = output.report(error)
    return status
