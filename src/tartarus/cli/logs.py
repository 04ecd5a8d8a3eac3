"""`logs`: what a sandbox's main command wrote, with its two streams kept apart."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import click

from tartarus.cli import output
from tartarus.cli.complete import sandboxes

if TYPE_CHECKING:
    from tartarus.sdk import LogEntry


@click.command()
@click.argument("sandbox", shell_complete=sandboxes)
@click.option("-f", "--follow", is_flag=True, help="Also what still comes, until the command ends.")
@click.option("-t", "--timestamps", is_flag=True, help="Begin each line with the time (UTC) it was written.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a piece of output: time, stream, text or base64."
)
def logs(sandbox: str, *, follow: bool, timestamps: bool, as_json: bool) -> None:
    """Show what the command of a sandbox wrote: its stdout to stdout, its stderr to stderr."""
    from tartarus.sdk import Sandbox

    shown = Stamped() if timestamps else None
    for entry in Sandbox.connect(sandbox).logs(follow=follow):
        if as_json:
            output.write(1, json_line(entry))
        elif shown is not None:
            shown.write(entry)
        else:
            output.write(1 if entry.stream == "stdout" else 2, entry.data)


class Stamped:
    """Writes entries with the time at the beginning of each line, whatever pieces the lines come in."""

    def __init__(self) -> None:
        self._inside = {1: False, 2: False}

    def write(self, entry: LogEntry) -> None:
        """Write one entry."""
        fd = 1 if entry.stream == "stdout" else 2
        output.write(fd, self.stamp(fd, entry))

    def stamp(self, fd: int, entry: LogEntry) -> bytes:
        """The entry's bytes with a stamp before each line that begins in it."""
        stamp = f"[{utc(entry.time_ns)}] ".encode()
        parts = []
        for line in _lines(entry.data):
            parts.append(line if self._inside[fd] else stamp + line)
            self._inside[fd] = not line.endswith(b"\n")
        return b"".join(parts)


def _lines(data: bytes) -> list[bytes]:
    """Lines that end in a newline only: a carriage return redraws the line it is in."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def utc(time_ns: int) -> str:
    """A time as in ``2025-01-15T10:30:00Z``."""
    moment = dt.datetime.fromtimestamp(time_ns // 1_000_000_000, dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def json_line(entry: LogEntry) -> bytes:
    """One entry as a line of JSON."""
    import base64

    import msgspec

    line: dict[str, object] = {"time_ns": entry.time_ns, "time": utc(entry.time_ns), "stream": entry.stream}
    try:
        line["text"] = entry.data.decode()
    except UnicodeDecodeError:
        line["base64"] = base64.b64encode(entry.data).decode()
    return msgspec.json.encode(line) + b"\n"
