"""What a monitor and its machine's console print: the end of it, taken at a bounded pace.

A guest writes to its console as fast as it likes. Nothing is kept but the last of it, and reading more slowly than it
writes costs the guest its own time, not the host's.
"""

from __future__ import annotations

import asyncio
import os

_KEPT = 64 * 1024
_AT_ONCE = 64 * 1024
_PAUSE_S = 0.05


class Output:
    """The reading end of a pipe; the other one is `write_end` until it was handed on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self.write_end, True)
        self._held = b""
        self._again: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._read_end, self._readable)

    def handed_on(self) -> None:
        """The monitor has the writing end."""
        os.close(self.write_end)
        self.write_end = -1

    def text(self) -> str:
        """The end of what was printed."""
        return self._held.decode("utf-8", "replace")[-4000:]

    def close(self) -> None:
        """Stop reading, after what is there already."""
        if self._read_end < 0:
            return
        self._readable()
        if self._again is not None:
            self._again.cancel()
        if self._read_end >= 0:
            self._loop.remove_reader(self._read_end)
            os.close(self._read_end)
            self._read_end = -1
        if self.write_end >= 0:
            self.handed_on()

    def _readable(self) -> None:
        try:
            piece = os.read(self._read_end, _AT_ONCE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self._loop.remove_reader(self._read_end)
        self._held = (self._held + piece)[-_KEPT:]
        if piece:
            self._again = self._loop.call_later(_PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        self._again = None
        if self._read_end >= 0:
            self._loop.add_reader(self._read_end, self._readable)
