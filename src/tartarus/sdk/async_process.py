"""The async twin of `process`."""

from __future__ import annotations

import signal as signals
from collections.abc import AsyncIterator
from types import TracebackType

import anyio

from tartarus.model.errors import InvalidState, TartarusError
from tartarus.sdk.async_transport import AsyncStreamConnection
from tartarus.sdk.decoding import Collector
from tartarus.sdk.process import STREAM_NUMBERS, pieces
from tartarus.sdk.progress import Progress
from tartarus.sdk.results import CommandResult, OutputChunk


class AsyncProcess:
    """A command started with `AsyncSandbox.start`. Iterate over it for its output; use `async with` to end it.

    Output must be read (by iterating or with `wait`): a command whose output nobody reads is held back
    once a few MiB wait. One task may iterate while another writes or signals.
    """

    def __init__(self, connection: AsyncStreamConnection, progress: Progress, max_output_bytes: int) -> None:
        self._connection = connection
        self._progress = progress
        self._output = Collector(max_output_bytes)

    @classmethod
    async def opened(cls, connection: AsyncStreamConnection, progress: Progress, max_output_bytes: int) -> AsyncProcess:
        """The command behind a fresh stream, once it runs. Raises CommandNotFound, NotExecutable and the like."""
        process = cls(connection, progress, max_output_bytes)
        try:
            await connection.flush()
            while not (progress.started or progress.ended):
                await process._next()
        except BaseException:
            await connection.close()
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

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        """Its output, in the order it arrives, until its end."""
        while not self._progress.ended:
            chunk = await self._next()
            if chunk is not None:
                yield chunk

    async def _next(self) -> OutputChunk | None:
        message = await self._connection.next()
        if message is None:
            raise self._progress.cut_off()
        return self._progress.receive(*message)

    async def write(self, data: bytes | str) -> None:
        """Give it input (text as UTF-8). Waits while it does not read; what it no longer takes is dropped.

        A command that writes a lot while it reads needs another task that iterates over its output.
        """
        self._require_running()
        for part in pieces(data):
            self._connection.protocol.send_stdin(part)
            await self._connection.flush()

    async def feed(self, data: bytes | str) -> None:
        """Give it all its input, end it, and gather the output that comes meanwhile for `wait`."""
        failures: list[Exception] = []
        async with anyio.create_task_group() as group:

            async def gather() -> None:
                try:
                    async for chunk in self:
                        self._output.add(STREAM_NUMBERS[chunk.stream], chunk.data)
                except TartarusError as error:
                    failures.append(error)  # raised below: here it would come out inside an exception group
                group.cancel_scope.cancel()

            group.start_soon(gather)
            for part in pieces(data):
                self._connection.protocol.send_stdin(part)
                await self._connection.flush()
            self._connection.protocol.send_stdin_eof()
            await self._connection.flush()
            group.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def close_stdin(self) -> None:
        """End its input."""
        self._require_running()
        self._connection.protocol.send_stdin_eof()
        await self._connection.flush()

    async def signal(self, signal: int) -> None:
        """Send it a signal; nothing if it has ended."""
        if not self._progress.ended:
            self._connection.protocol.send_signal(signal)
            await self._connection.flush()

    async def kill(self) -> None:
        """End it with SIGKILL; `wait` then tells how it ended."""
        await self.signal(signals.SIGKILL)

    async def resize(self, rows: int, cols: int) -> None:
        """Tell it its terminal's new size."""
        if not self._progress.ended:
            self._connection.protocol.send_resize(rows, cols)
            await self._connection.flush()

    async def wait(self, *, check: bool = False) -> CommandResult:
        """Wait for its end; the result has the output that was not iterated over.

        Raises CommandTimedOut when its own `timeout_s` ended it, SandboxLost when its sandbox went away, and
        with `check` CommandFailed unless it exited with status 0.
        """
        async for chunk in self:
            self._output.add(STREAM_NUMBERS[chunk.stream], chunk.data)
        await self._connection.close()
        return self._progress.result(self._output, check=check)

    async def close(self) -> None:
        """Let go of it: it is killed if it still runs."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncProcess:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _require_running(self) -> None:
        if self._progress.ended:
            raise InvalidState("the command has ended", fix="write before its output ends")
