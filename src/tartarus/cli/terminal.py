"""The caller's terminal: raw while a command inside has it, and as it was before on every way out."""

from __future__ import annotations

import os
import signal
import termios
import tty
from types import TracebackType


def size() -> tuple[int, int]:
    """Rows and columns of the terminal behind the standard streams; 24 and 80 when there is none."""
    for fd in (1, 0, 2):
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if rows > 0 and columns > 0:
            return min(rows, 0xFFFF), min(columns, 0xFFFF)
    return 24, 80


class RawTerminal:
    """A context manager that makes `fd` raw when told to `begin`, and restores it at the end.

    Suspending (SIGTSTP from outside: in raw mode Ctrl-Z goes to the command inside) and continuing restore
    and re-enter raw mode around the stop.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[object] | None = None
        self._previous: dict[int, object] = {}

    def begin(self) -> None:
        """Enter raw mode."""
        if self._saved is None:
            self._saved = termios.tcgetattr(self._fd)
            self._previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
            tty.setraw(self._fd, termios.TCSADRAIN)

    def __enter__(self) -> RawTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None:
            self._restore()
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._saved = None

    def _restore(self) -> None:
        try:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]
        except termios.error:
            return  # the terminal is gone: nothing is left to restore

    def _suspend(self, _number: int, _frame: object) -> None:
        self._restore()
        os.kill(os.getpid(), signal.SIGSTOP)
        tty.setraw(self._fd, termios.TCSADRAIN)
