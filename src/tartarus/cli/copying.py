"""`cp`: between this host and a sandbox."""

from __future__ import annotations

import os
import time
from types import TracebackType

import click

from tartarus.cli import output
from tartarus.model.errors import InvalidRequest
from tartarus.model.units import format_size
from tartarus.sdk.copying import Observer

_FORM = "as in: tartarus cp file sbx-…:/work/ or tartarus cp sbx-…:/work/file ."


@click.command()
@click.argument("source")
@click.argument("target")
def cp(source: str, target: str) -> None:
    """Copy files and directories into or out of a sandbox: SANDBOX:PATH on one side, a local path on the other.

    `-` is standard input as source and standard output as target. A local path with a colon needs a / or ./
    in front. Paths in a sandbox are absolute, or relative to its working directory's root /.
    """
    from tartarus.sdk import Sandbox, copying

    here, there = place(source), place(target)
    if (here is None) == (there is None):
        raise InvalidRequest("one side must be in a sandbox and the other on this host", fix=_FORM)
    with Progress() as progress:
        if there is not None:
            files = Sandbox.connect(there[0]).files
            if source == "-":
                with open(0, "rb", buffering=0, closefd=False) as stdin:
                    copying.send_stream(files, stdin, there[1], progress)
            else:
                copying.copy_in(files, source, there[1], progress)
        elif here is not None:
            files = Sandbox.connect(here[0]).files
            if target == "-":
                for part in copying.receive_stream(files, here[1], progress):
                    output.write(1, part)
            else:
                copying.copy_out(files, here[1], target, progress)


def place(text: str) -> tuple[str, str] | None:
    """The sandbox and path of ``sandbox:path``, or None for a local path."""
    name, colon, path = text.partition(":")
    if not colon or text.startswith(("/", ".", "-")) or "/" in name:
        return None
    if not name:
        raise InvalidRequest(f"{text!r} names no sandbox", fix=_FORM)
    return name, "/" + path.lstrip("/")


class Progress(Observer):
    """Says what is skipped, and on a terminal how far it is, once it takes longer than a second."""

    def __init__(self) -> None:
        self._shown = os.isatty(2)
        self._size = 0
        self._next = time.monotonic() + 1
        self._drawn = False

    def skipped(self, path: str, why: str) -> None:
        """See Observer."""
        self._wipe()
        output.say(output.one_line(f"tartarus: skipped {path}: {why}"))

    def moved(self, size: int) -> None:
        """See Observer."""
        self._size += size
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.2
            self._drawn = True
            output.write(2, f"\r{format_size(self._size)} copied\x1b[K".encode())

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wipe()

    def _wipe(self) -> None:
        if self._drawn:
            self._drawn = False
            output.write(2, b"\r\x1b[K")
