"""The one way in which the jailed child says no, and how it prints names that it did not choose."""

from __future__ import annotations


class Refused(Exception):
    """The input is damaged or dishonest: what of it, and why that is not accepted."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what)
        self.what = what
        self.why = why


_LONGEST = 120


def shown(name: bytes) -> str:
    """A foreign name as printable ASCII, cut where it is long: terminals obey what is not printable."""
    text = repr(name[:_LONGEST])[1:]
    return text if len(name) <= _LONGEST else f"{text}…"
