"""A step's output on its way to people: bounded, as text, its end kept for the error message."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Final

MAX_OUTPUT_BYTES: Final = 16 * 1024**2
"""What one step may say to whoever watches; more is dropped, and a line says so."""
_KEPT_BYTES: Final = 16 * 1024
_SHOWN_LINES: Final = 20
_SHOWN_CHARS: Final = 500
# Control sequences of terminals (ECMA-48): an error message moves no cursor, and names no window.
_SEQUENCE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")


class StepOutput:
    """Call it with a stream's number and bytes, as they come."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` takes the pieces of text."""
        self._say = say
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {stream: decoder("replace") for stream in (1, 2)}
        self._tail = bytearray()
        self._said = 0

    def __call__(self, stream: int, data: bytes) -> None:
        """Take a piece."""
        self._tail += data
        del self._tail[:-_KEPT_BYTES]
        if self._said > MAX_OUTPUT_BYTES:
            return
        self._said += len(data)
        if self._said > MAX_OUTPUT_BYTES:
            self._say("\n[the rest of this step's output is not shown]\n")
            return
        text = self._decoders[2 if stream == 2 else 1].decode(data)
        if text:
            self._say(text)

    def last_lines(self) -> str:
        """The last lines, of both streams together, fit for an error message."""
        text = _SEQUENCE.sub("", self._tail.decode("utf-8", "replace"))
        # What a progress bar has overwritten was not meant to stay.
        lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
        lines = ["".join(char for char in line if char.isprintable() or char == "\t") for line in lines]
        return "\n".join([line[:_SHOWN_CHARS] for line in lines if line][-_SHOWN_LINES:])
