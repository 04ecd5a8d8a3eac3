"""Alternating runs, medians, and the table."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

Timed = Callable[[], Awaitable[float]]


class Row:
    """One contender's figures in one bench; `values` in `unit`."""

    def __init__(self, bench: str, contender: str, unit: str, values: list[float], note: str = "") -> None:
        self.bench = bench
        self.contender = contender
        self.unit = unit
        self.values = sorted(values)
        self.note = note

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def p99(self) -> float:
        """The value that 99 of 100 do not pass."""
        return self.values[min(len(self.values) - 1, int(len(self.values) * 0.99))]

    def as_json(self) -> dict[str, Any]:
        """For the committed result file."""
        return {
            "bench": self.bench, "contender": self.contender, "unit": self.unit, "runs": len(self.values),
            "median": round(self.median, 3), "p99": round(self.p99, 3), "note": self.note,
        }  # fmt: skip


async def alternate(bench: str, contenders: dict[str, Timed], runs: int, slow_runs: int = 5) -> list[Row]:
    """Run the contenders in turn; each callable returns its own milliseconds. Slow ones run fewer times."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for name, timed in contenders.items():
        await timed()  # once unmeasured: caches, imports, pools
        values[name].append(await timed())
    for turn in range(runs):
        for name, timed in contenders.items():
            if turn < slow_runs or values[name][0] < 100:
                values[name].append(await timed())
    return [Row(bench, name, "ms", times) for name, times in values.items()]


async def wall_ms(work: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds that a coroutine function takes."""
    began = time.perf_counter()
    await work()
    return (time.perf_counter() - began) * 1e3


def machine() -> dict[str, Any]:
    """What this was measured on, without naming the machine."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = next(
        line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    import os

    return {
        "cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(int(memory) / 1024**2, 1),
        "kernel": platform.release(), "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """Rows as text, each bench's first contender (ours) being what the ratio compares with."""
    lines = [f"{'bench':34} {'contender':26} {'median':>10} {'p99':>10}  {'vs ours':>8}  note"]
    ours: dict[str, Row] = {}
    for row in rows:
        first = ours.setdefault(row.bench, row)
        ratio = (
            "" if first is row or not first.median or row.unit != first.unit else f"{row.median / first.median:.2f}x"
        )
        lines.append(
            f"{row.bench:34} {row.contender:26} {row.median:>7.2f} {row.unit:<3}{row.p99:>9.2f}  {ratio:>8}  {row.note}"
        )
    return "\n".join(lines)
