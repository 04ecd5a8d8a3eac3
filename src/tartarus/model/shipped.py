"""The definitions of templates that come with Tartarus to be built: each a Dockerfile and a YAML, as a user's own."""

from __future__ import annotations

from pathlib import Path

_PLACE = Path(__file__).parents[1] / "images" / "templates"
NAMES = ("base", "code-interpreter-v1", "julia-sci", "node", "python-ds", "pytorch-ml", "r-analytics")


def place_of(name: str) -> Path | None:
    """The build context of the shipped definition `name`, or None if there is none of that name."""
    return _PLACE / name if name in NAMES else None
