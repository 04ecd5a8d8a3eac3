"""What runsc prints, as part of errors."""

from __future__ import annotations

import os

_MOST_BYTES = 64 * 1024
_LAST = 2000


class RunscLog:
    """A pipe for what runsc prints; as much as fits into it is kept, and a guest that fills it stops nobody else."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._said = b""

    def fileno(self) -> int:
        """The end to hand over."""
        return self._writer

    def handed_over(self) -> None:
        """Close our copy of that end; safe to repeat."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def text(self) -> str:
        """Its last words so far."""
        try:
            while self._reader >= 0 and len(self._said) < _MOST_BYTES:
                data = os.read(self._reader, _MOST_BYTES)
                if not data:
                    break
                self._said += data
        except BlockingIOError:
            pass
        return self._said.decode("utf-8", "replace")[-_LAST:].strip()

    def close(self) -> str:
        """Close both ends, and return the last words; safe to repeat."""
        said = self.text()
        self.handed_over()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1
        return said
