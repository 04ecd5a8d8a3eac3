"""Sizes, CPU amounts and durations: typed, parsed once at the edge, printed one way."""

from __future__ import annotations

import re
from typing import NewType

from tartarus.model.errors import InvalidRequest

Bytes = NewType("Bytes", int)
MilliCPU = NewType("MilliCPU", int)

_SIZE_FACTORS = {
    "": 1, "B": 1,
    "K": 1024, "KiB": 1024, "KB": 1000, "k": 1024, "kB": 1000,
    "M": 1024**2, "MiB": 1024**2, "MB": 1000**2, "m": 1024**2,
    "G": 1024**3, "GiB": 1024**3, "GB": 1000**3, "g": 1024**3,
    "T": 1024**4, "TiB": 1024**4, "TB": 1000**4,
    "Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "Ti": 1024**4,
}  # fmt: skip
_TIME_FACTORS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_UNIT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$", re.ASCII)


def _split(text: str, what: str, factors: dict[str, float] | dict[str, int], example: str) -> float:
    match = _NUMBER_UNIT.match(text)
    if match is None or match.group(2) not in factors:
        raise InvalidRequest(
            f"{text!r} is not a {what}",
            fix=f"write it like {example}",
        )
    return float(match.group(1)) * factors[match.group(2)]


def parse_size(text: str | int) -> Bytes:
    """Read a size such as ``512MiB``, ``2G`` or ``1048576`` into bytes.

    ``K``/``M``/``G``/``T`` and the ``…i``/``…iB`` forms are powers of 1024; ``KB``/``MB``/…
    are powers of 1000. Raises InvalidRequest for anything else, and for zero.
    """
    value = text if isinstance(text, int) else int(_split(text, "size", _SIZE_FACTORS, "512MiB or 2GiB"))
    if not 0 < value < 2**60:
        raise InvalidRequest(f"size {text!r} is out of range", fix="use more than 0 and less than 1024 PiB")
    return Bytes(value)


def parse_cpus(text: str | float) -> MilliCPU:
    """Read CPUs such as ``2``, ``0.5`` or ``250m`` into thousandths of a CPU."""
    if isinstance(text, str) and text.strip().endswith("m"):
        amount = _split(text.strip()[:-1], "CPU count", {"": 1}, "2, 0.5 or 250m") / 1000
    elif isinstance(text, str):
        amount = _split(text, "CPU count", {"": 1}, "2, 0.5 or 250m")
    else:
        amount = float(text)
    if not 0.01 <= amount <= 1024:
        raise InvalidRequest(f"CPU count {text!r} is out of range", fix="use 0.01 to 1024")
    return MilliCPU(round(amount * 1000))


def parse_duration(text: str | float) -> float:
    """Read a duration such as ``90``, ``500ms``, ``10m`` or ``2h`` into seconds."""
    value = _split(text, "duration", _TIME_FACTORS, "30s, 10m or 2h") if isinstance(text, str) else float(text)
    if not 0.0 < value <= 366 * 86400.0:
        raise InvalidRequest(f"duration {text!r} is out of range", fix="use more than 0 and at most 366d")
    return value


def format_size(value: int) -> str:
    """Print bytes the way `parse_size` reads them back: ``512MiB``."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f}{unit}" if amount == int(amount) else f"{amount:.1f}{unit}"
        amount /= 1024
    return f"{amount:.1f}TiB"
