"""How the command line shows things: tables, JSON, times, and amounts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from tartarus.cli import output


def print_json(value: object) -> None:
    """One JSON document: indented for people, on one line for programs."""
    data = msgspec.json.encode(value)
    if sys.stdout.isatty():
        data = msgspec.json.format(data, indent=2)
    output.write(1, data + b"\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, three spaces apart, as in the roadmap's example."""
    cells = [list(head), *[[output.one_line(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines) + "\n"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output."""
    output.write(1, table(head, rows).encode())


def ago(seconds: float) -> str:
    """How long ago: ``5 seconds ago``, ``2 minutes ago``, ``3 hours ago``."""
    seconds = max(0.0, seconds)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            amount = int(seconds // size)
            return f"{amount} {unit}{'s' if amount != 1 else ''} ago"
    amount = int(seconds)
    return f"{amount} second{'s' if amount != 1 else ''} ago"


def duration(seconds: float) -> str:
    """A length of time: ``0.3s``, ``42s``, ``2m13s``, ``5h02m``, ``3d04h``."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02d}m"
    return f"{whole // 86400}d{whole // 3600 % 24:02d}h"
