"""Commands of a sandbox as the API streams them, and the main one, whose output is kept."""

from __future__ import annotations

from typing import Protocol

import structlog

from tartarus.model.errors import GuestFailed, NoSpace
from tartarus.model.sandbox import ExitStatus
from tartarus.node.outputlog import OutputLog

_log = structlog.get_logger("tartarus.node.sandbox")


class Process(Protocol):
    """A command in a sandbox, as the API streams it."""

    async def started(self) -> tuple[int, bool]:
        """Its pid in the sandbox, and whether the warm interpreter runs it."""
        ...

    async def read(self) -> tuple[int, bytes] | None:
        """The next (1 stdout or 2 stderr, bytes), in order; None after its end."""
        ...

    async def write_stdin(self, data: bytes) -> None:
        """Give it input; waits while it does not read."""
        ...

    def close_stdin(self) -> None:
        """End its input."""
        ...

    def signal(self, number: int, group: bool = False) -> None:
        """Send it a signal."""
        ...

    def resize(self, rows: int, cols: int) -> None:
        """Tell its terminal's new size."""
        ...

    async def wait(self) -> ExitStatus:
        """How it ended."""
        ...


class MainProcess:
    """The sandbox's own command: what is read of it is logged too."""

    def __init__(self, process: Process, log: OutputLog) -> None:
        self.process = process
        self._log = log
        self.started = process.started
        self.write_stdin = process.write_stdin
        self.close_stdin = process.close_stdin
        self.signal = process.signal
        self.resize = process.resize
        self.wait = process.wait

    async def read(self) -> tuple[int, bytes] | None:
        """The next piece of output, logged; None after its end or the sandbox's, whose record then says why."""
        try:
            piece = await self.process.read()
        except GuestFailed:
            piece = None
        if piece is None:
            self._log.end()
            return None
        try:
            self._log.append(*piece)
        except NoSpace as error:
            _log.error("log_lost", error=str(error))
        return piece
