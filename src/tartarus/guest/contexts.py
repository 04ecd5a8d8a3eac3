"""Stateful code contexts, the host's end: cells go in, what they print, show and raise comes out.

A context is an ordinary process in the sandbox (`runner.py context`, or the warm runner's own), spoken to in
JSON lines. The node makes one per `open_context`. Its lines are as hostile as any guest byte: bounded,
checked, and a broken one ends the context.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

from tartarus.model.errors import GuestFailed, TartarusError
from tartarus.model.sandbox import ExitStatus

MAX_LINE = 32 * 1024 * 1024
"""Bytes of one event; the runner leaves out single forms of a value that are over 16 MiB."""
GRACE_S = 5.0
"""How long a cell may go on after it was interrupted, before its context is ended."""
_AGAIN_S = 1.0
_LAST_WORDS = 2000


class CellStdout(msgspec.Struct, frozen=True, tag="stdout", tag_field="type"):
    """Text that the cell printed."""

    text: str


class CellStderr(msgspec.Struct, frozen=True, tag="stderr", tag_field="type"):
    """Text that the cell printed to standard error."""

    text: str


class CellResult(msgspec.Struct, frozen=True, tag="result", tag_field="type"):
    """A value in its forms by MIME type (images in base 64); `is_main`: of the cell's last expression."""

    data: dict[str, Any]
    is_main: bool = False


class CellError(msgspec.Struct, frozen=True, tag="error", tag_field="type"):
    """The exception that ended the cell; `CellTimeout` when it ran longer than it may."""

    name: str
    value: str
    traceback: str


class CellDone(msgspec.Struct, frozen=True, tag="done", tag_field="type"):
    """The cell's end: always the last event. `execution_count`: how many cells the context has run."""

    execution_count: int


CellEvent = CellStdout | CellStderr | CellResult | CellError | CellDone

_decoder: msgspec.json.Decoder[CellEvent] = msgspec.json.Decoder(CellEvent)
_encode = msgspec.json.Encoder().encode


class ContextProcess(Protocol):
    """What a context needs of a GuestProcess."""

    async def started(self) -> tuple[int, bool]:
        """Wait for the start."""

    async def read(self) -> tuple[int, bytes] | None:
        """The next output."""

    async def write_stdin(self, data: bytes) -> None:
        """Send input."""

    def close_stdin(self) -> None:
        """End the input."""

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal."""

    async def wait(self) -> ExitStatus:
        """Wait for the end."""


class _Alarm:
    """Interrupts a cell at its time limit, and again: an interpreter may miss a signal that comes at its start."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_s: float, process: ContextProcess) -> None:
        self.rang = False
        self._loop = loop
        self._process = process
        self._timer = loop.call_later(limit_s, self._ring)

    def _ring(self) -> None:
        self.rang = True
        self._process.signal(signal.SIGINT)
        self._timer = self._loop.call_later(_AGAIN_S, self._ring)

    def cancel(self) -> None:
        """Let it be."""
        self._timer.cancel()


class CodeContext:
    """One interpreter that keeps its variables between cells. Cells run one after the other.

    `interrupted_by_host`: it does not interrupt a cell at its time limit by itself.
    """

    def __init__(self, process: ContextProcess, *, interrupted_by_host: bool = False) -> None:
        self.process = process
        self.interrupted_by_host = interrupted_by_host
        self._turn = asyncio.Lock()
        self._buffer = bytearray()
        self._searched = 0
        self._last_words = bytearray()
        self._count = 0
        self._running = False
        self._failure: TartarusError | None = None
        self._abandoned: asyncio.Task[None] | None = None

    @classmethod
    def restored(
        cls, process: ContextProcess, *, count: int, running: bool, begun: bytes, last_words: bytes,
        interrupted_by_host: bool,
    ) -> CodeContext:  # fmt: skip
        """One that was saved with its guest. A cell that ran then is interrupted: nobody listens to it any more."""
        context = cls(process, interrupted_by_host=interrupted_by_host)
        context._count = count
        context._buffer += begun
        context._last_words += last_words
        if running:
            context._running = True
            context._abandoned = asyncio.get_running_loop().create_task(context._abandon_first())
        return context

    @property
    def ended(self) -> bool:
        """Whether it can run no cell any more."""
        return self._failure is not None

    @property
    def count(self) -> int:
        """How many cells were begun."""
        return self._count

    @property
    def running(self) -> bool:
        """Whether a cell runs."""
        return self._running

    @property
    def begun(self) -> bytes:
        """What has come of an event that is not whole yet."""
        return bytes(self._buffer)

    @property
    def last_words(self) -> bytes:
        """The end of what it wrote to its standard error."""
        return bytes(self._last_words)

    async def run(self, code: str, timeout_s: float | None = None) -> AsyncIterator[CellEvent]:
        """Run one cell and yield its events as they come; the last one is CellDone.

        A cell that takes longer than `timeout_s` is interrupted and ends with a CellError; so is one whose
        iterator is closed early, and the variables stay. Raises GuestFailed when the context has ended, or has
        to be ended because the cell can't be interrupted.
        """
        await self._turn.acquire()
        ended = False
        alarm: _Alarm | None = None
        try:
            if self._failure is not None:
                raise self._failure
            await self.process.started()
            self._count += 1
            self._running = True
            request = {"id": self._count, "code": code, "timeout_s": timeout_s}
            await self.process.write_stdin(_encode(request) + b"\n")
            loop = asyncio.get_running_loop()
            limit = None if timeout_s is None else loop.time() + timeout_s + GRACE_S
            if timeout_s is not None and self.interrupted_by_host:
                alarm = _Alarm(loop, timeout_s, self.process)
            while not ended:
                event = await self._next(limit)
                ended = isinstance(event, CellDone)
                self._running = not ended
                if alarm is not None and alarm.rang and isinstance(event, CellError):
                    event = CellError("CellTimeout", f"the cell ran longer than {timeout_s:g} s", event.traceback)
                yield event
        except TartarusError:
            ended = True
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
            if ended or not self._running:
                self._running = False
                self._turn.release()
            else:
                self._abandoned = asyncio.get_running_loop().create_task(self._abandon())

    async def interrupt(self) -> None:
        """Interrupt the running cell, as Ctrl-C would; nothing happens between cells."""
        if self._running and self._failure is None:
            self.process.signal(signal.SIGINT)

    async def close(self) -> None:
        """End the context: a running cell is interrupted; what is left of it after a moment is killed."""
        if self._failure is None:
            self._failure = GuestFailed("the code context was closed")
        try:
            self.process.signal(signal.SIGINT)
            self.process.close_stdin()
            # Only one may read its output: after the cell that does now.
            await asyncio.wait_for(self._turn.acquire(), GRACE_S)
            try:
                await asyncio.wait_for(self._drain(), GRACE_S)
            except TimeoutError:
                self.process.signal(signal.SIGKILL)
                await self._drain()
            finally:
                self._turn.release()
        except TimeoutError:
            self.process.signal(signal.SIGKILL)  # whoever reads that cell's events meets their end
        except TartarusError:
            pass  # its sandbox is gone, and so is it

    async def _drain(self) -> None:
        """Read and forget what is left; returns when the process is gone."""
        while await self.process.read() is not None:
            pass
        await self.process.wait()

    async def _abandon_first(self) -> None:
        await self._turn.acquire()  # nobody else knows of this context yet
        await self._abandon()

    async def _abandon(self) -> None:
        """Interrupt a cell that nobody listens to any more, and clear the way for the next."""
        try:
            self.process.signal(signal.SIGINT)
            limit = asyncio.get_running_loop().time() + GRACE_S
            while not isinstance(await self._next(limit), CellDone):
                pass
        except TartarusError:
            pass  # noted in `_failure`; the next cell will say so
        finally:
            self._running = False
            self._turn.release()

    async def _next(self, limit: float | None) -> CellEvent:
        """The next event; GuestFailed when there is none, or none in time."""
        try:
            async with asyncio.timeout_at(limit):
                line = await self._line()
        except TimeoutError:
            self.process.signal(signal.SIGKILL)
            raise self._end("the cell could not be interrupted, and its context was ended") from None
        try:
            return _decoder.decode(line)
        except msgspec.MsgspecError as error:
            self.process.signal(signal.SIGKILL)
            raise self._end("the code context broke its protocol", why=str(error)) from None

    async def _line(self) -> bytes:
        """The next line of the process's standard output."""
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if self._searched > MAX_LINE:
                self.process.signal(signal.SIGKILL)
                raise self._end("the code context broke its protocol", why=f"an event is over {MAX_LINE} bytes")
            piece = await self._read()
            if piece is None:
                raise self._end("the code context ended", why=await self._why())
            stream, data = piece
            if stream == 1:
                self._buffer += data
            else:
                self._last_words = (self._last_words + data)[-_LAST_WORDS:]
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    async def _read(self) -> tuple[int, bytes] | None:
        try:
            return await self.process.read()
        except TartarusError as error:
            self._failure = error
            raise

    async def _why(self) -> str:
        status = await self.process.wait()
        how = f"killed by signal {status.signal}" if status.signal else f"exit status {status.code}"
        words = self._last_words.decode("utf-8", "replace").strip()
        return f"{how}: {words}" if words else how

    def _end(self, what: str, *, why: str = "") -> GuestFailed:
        """Note, and return, why this context can't go on."""
        failure = GuestFailed(what, why=why, fix="open a new context; its variables are lost")
        self._failure = failure
        return failure
