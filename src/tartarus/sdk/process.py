"""A running command: its output as it comes, its input, signals, and its end."""

from __future__ import annotations

import signal as signals
from collections.abc import Iterator
from types import TracebackType

from tartarus.model.errors import InvalidState
from tartarus.sdk.decoding import Collector
from tartarus.sdk.progress import Progress
from tartarus.sdk.results import CommandResult, OutputChunk
from tartarus.sdk.transport import StreamConnection

STREAM_NUMBERS = {"stdout": 1, "stderr": 2}
PIECE_BYTES = 256 * 1024


class Process:
    """A command started with `Sandbox.start`. Iterate over it for its output; use `with` to end it with the block.

    Output must be read (by iterating or with `wait`): a command whose output nobody reads is held back
    once a few MiB wait. One thread may iterate while another writes, signals or closes.
    """

    def __init__(self, connection: StreamConnection, progress: Progress, max_output_bytes: int) -> None:
        self._connection = connection
        self._progress = progress
        self._output = Collector(max_output_bytes)

    @classmethod
    def opened(cls, connection: StreamConnection, progress: Progress, max_output_bytes: int) -> Process:
        """The command behind a fresh stream, once it runs. Raises CommandNotFound, NotExecutable and the like."""
        process = cls(connection, progress, max_output_bytes)
        try:
            connection.flush()
            while not (progress.started or progress.ended):
                process._next()
        except BaseException:
            connection.close()
            raise
        return process

    @property
    def pid(self) -> int:
        """Its process id inside the sandbox."""
        return self._progress.pid

    @property
    def warm(self) -> bool:
        """Whether the template's warm interpreter runs it."""
        return self._progress.warm

    @property
    def exit_code(self) -> int | None:
        """Its status as a shell shows it (128 + n for signal n), or None while it runs."""
        return None if self._progress.exit is None else self._progress.exit.shell_status

    def __iter__(self) -> Iterator[OutputChunk]:
        """Its output, in the order it arrives, until its end."""
        while not self._progress.ended:
            chunk = self._next()
            if chunk is not None:
                yield chunk

    def _next(self) -> OutputChunk | None:
        message = self._connection.next()
        if message is None:
            raise self._progress.cut_off()
        return self._progress.receive(*message)

    def write(self, data: bytes | str) -> None:
        """Give it input (text as UTF-8). Waits while it does not read; what it no longer takes is dropped.

        A command that writes a lot while it reads needs another thread that iterates over its output.
        """
        self._require_running()
        for part in pieces(data):
            self._connection.protocol.send_stdin(part)
            self._connection.flush()

    def feed(self, data: bytes | str) -> None:
        """Give it all its input, end it, and gather the output that comes meanwhile for `wait`."""
        for part in pieces(data):
            self._connection.protocol.send_stdin(part)
            self._connection.flush(self._gather)
            if self._progress.ended:
                return
        self._connection.protocol.send_stdin_eof()
        self._connection.flush(self._gather)

    def _gather(self, kind: int, payload: memoryview) -> None:
        chunk = self._progress.receive(kind, payload)
        if chunk is not None:
            self._output.add(STREAM_NUMBERS[chunk.stream], chunk.data)

    def close_stdin(self) -> None:
        """End its input."""
        self._require_running()
        self._connection.protocol.send_stdin_eof()
        self._connection.flush()

    def signal(self, signal: int) -> None:
        """Send it a signal; nothing if it has ended."""
        if not self._progress.ended:
            self._connection.protocol.send_signal(signal)
            self._connection.flush()

    def kill(self) -> None:
        """End it with SIGKILL; `wait` then tells how it ended."""
        self.signal(signals.SIGKILL)

    def resize(self, rows: int, cols: int) -> None:
        """Tell it its terminal's new size."""
        if not self._progress.ended:
            self._connection.protocol.send_resize(rows, cols)
            self._connection.flush()

    def wait(self, *, check: bool = False) -> CommandResult:
        """Wait for its end; the result has the output that was not iterated over.

        Raises CommandTimedOut when its own `timeout_s` ended it, SandboxLost when its sandbox went away, and
        with `check` CommandFailed unless it exited with status 0.
        """
        for chunk in self:
            self._output.add(STREAM_NUMBERS[chunk.stream], chunk.data)
        self._connection.close()
        return self._progress.result(self._output, check=check)

    def close(self) -> None:
        """Let go of it: it is killed if it still runs."""
        self._connection.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_running(self) -> None:
        if self._progress.ended:
            raise InvalidState("the command has ended", fix="write before its output ends")


def pieces(data: bytes | str) -> Iterator[memoryview]:
    """Input in messages of a size that keeps signals and output flowing between them."""
    view = memoryview(data.encode() if isinstance(data, str) else data)
    for start in range(0, len(view), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]
