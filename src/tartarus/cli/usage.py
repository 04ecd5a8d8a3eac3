"""`top`: what live sandboxes use, now and again."""

from __future__ import annotations

import os
import sys
import time

import click

from tartarus.cli import output
from tartarus.cli.show import print_json, table
from tartarus.model.errors import DaemonUnavailable, TartarusError, VersionMismatch
from tartarus.model.sandbox import SandboxRecord, Stats
from tartarus.model.units import format_size

_HEAD = ("ID", "TEMPLATE", "STATUS", "CPU", "MEMORY", "LIMIT", "PEAK", "PIDS", "DISK", "NAME")
Sample = tuple[SandboxRecord, Stats]


@click.command()
@click.option("--once", is_flag=True, help="Print one table and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list and end.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True, help="Seconds between looks."
)
def top(*, once: bool, as_json: bool, interval: float) -> None:
    """Show what live sandboxes use: CPU as the share of one CPU since the last look, and memory in use."""
    samples = collect()
    if as_json:
        print_json([{"id": record.id, "name": record.name, "stats": stats} for record, stats in samples])
        return
    if once or not sys.stdout.isatty():
        # CPU is a difference: it takes two looks.
        began = time.monotonic()
        time.sleep(min(interval, 0.5) if samples else 0)
        output.write(1, render(collect(), samples, time.monotonic() - began).encode())
        return
    _live(samples, interval)


def _live(samples: list[Sample], interval: float) -> None:
    try:
        output.write(1, b"\x1b[?1049h\x1b[?25l")
        began = time.monotonic()
        text = render(samples, [], 1.0)
        while True:
            rows = os.get_terminal_size(1).lines
            shown = "".join(f"{line}\x1b[K\r\n" for line in text.splitlines()[: max(1, rows - 1)])
            output.write(1, f"\x1b[H{shown}\x1b[J".encode())
            time.sleep(interval)
            newer = collect()
            text = render(newer, samples, time.monotonic() - began)
            samples, began = newer, time.monotonic()
    except KeyboardInterrupt:
        return
    finally:
        output.write(1, b"\x1b[?25h\x1b[?1049l")


def collect() -> list[Sample]:
    """One look at every live sandbox; those that end meanwhile are left out."""
    from tartarus.sdk import Sandbox

    samples = []
    for sandbox in Sandbox.list(states=["running", "paused"]):
        try:
            samples.append((sandbox.info, sandbox.stats()))
        except (DaemonUnavailable, VersionMismatch):
            raise
        except TartarusError:
            continue
    return samples


def render(samples: list[Sample], before: list[Sample], elapsed_s: float) -> str:
    """The table, with CPU from two looks that lie `elapsed_s` apart."""
    earlier = {record.id: stats.cpu_usec for record, stats in before}
    rows = []
    for record, stats in samples:
        share = (stats.cpu_usec - earlier.get(record.id, stats.cpu_usec)) / 1e4 / max(elapsed_s, 1e-3)
        limit = format_size(stats.memory_limit_bytes) if stats.memory_limit_bytes else "-"
        sizes = [format_size(stats.memory_bytes), limit, format_size(stats.memory_peak_bytes)]
        row = [record.id, record.template, record.state.value, f"{max(0.0, share):.1f}%", *sizes, str(stats.pids)]
        rows.append([*row, format_size(stats.disk_bytes), record.name or "-"])
    return table(_HEAD, rows)
