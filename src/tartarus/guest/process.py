"""One process in a sandbox: its output with flow control, its input, its signals, its end."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque

import msgspec

from tartarus.guest.connection import Signal, Stream, fail, settle
from tartarus.guest.protocol import (
    EXIT,
    INPUT_WINDOW,
    MAX_DATA,
    U16_U16,
    U32,
    U32_U32,
    BadFrame,
    ExecFlag,
    Reader,
    ToGuest,
    ToHost,
    exec_payload,
)
from tartarus.guest.session import MOST_U32, Session
from tartarus.model.errors import (
    CommandNotFound,
    GuestFailed,
    InvalidRequest,
    InvalidState,
    NoSpace,
    NotExecutable,
    TartarusError,
)
from tartarus.model.sandbox import ExitStatus

DEFAULT_WINDOW = 1024 * 1024
MAX_WINDOW = 16 * 1024 * 1024
"""Bytes of unread output that a command may have which is saved with its guest."""
_EXHAUSTED = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC})


class GuestExec(msgspec.Struct, frozen=True):
    """A command for a guest, complete: nothing is added to `env`. `window`: bytes of unread output it may have."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str = "/"
    stdin: bool = False
    tty: bool = False
    rows: int = 24
    cols: int = 80
    warm: bool = False
    once: bool = False
    window: int = DEFAULT_WINDOW

    def encode(self) -> bytes:
        """The EXEC payload."""
        flags = ExecFlag.TTY * self.tty | ExecFlag.STDIN * self.stdin
        flags |= ExecFlag.WARM * self.warm | ExecFlag.ONCE * self.once
        return exec_payload(flags, self.rows, self.cols, self.window, self.cwd, self.argv, self.env)


def start_error(spec: GuestExec, number: int, what: str) -> TartarusError:
    """The error for a command that could not be started."""
    name = spec.argv[0]
    why = os.strerror(number & 0xFFFF)  # a guest's own word: strerror takes no larger ones
    if what == "workdir":
        return InvalidRequest(
            f"the working directory {spec.cwd!r} can't be entered",
            why=why,
            fix="make it first, or give another workdir",
        )
    if what == "interpreter":
        return NotExecutable(
            f"{name!r} can't be executed", why="the interpreter or loader it names does not exist in the sandbox"
        )
    if number in _EXHAUSTED:
        return NoSpace("the sandbox can't start another process", why=why)
    if what == "terminal":
        return GuestFailed("the sandbox can't give a terminal", why=why)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return CommandNotFound(f"command {name!r} does not exist in the sandbox")
    if number in (errno.E2BIG, errno.EINVAL):
        return InvalidRequest(f"{name!r} can't be given these arguments", why=why)
    return NotExecutable(f"{name!r} can't be executed", why=why)


class ProcessState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command of a quiet session, for a new channel. `unread`: output that nobody has read yet.

    `pid` is 0 while it has not started. `consumed`: bytes read and not yet granted again.
    """

    stream: int
    name: str
    window: int
    allowed: int
    sendable: int
    pid: int = 0
    warm: bool = False
    stdin: bool = False
    tty: bool = False
    input_ended: bool = True
    consumed: int = 0
    unread: tuple[tuple[int, bytes], ...] = ()

    def __post_init__(self) -> None:
        unread = sum(len(data) for _, data in self.unread)
        numbers = (self.stream, self.window, self.allowed, self.sendable, self.pid, self.consumed)
        if (
            not all(0 <= number <= MOST_U32 for number in numbers)
            or self.sendable > INPUT_WINDOW
            or self.window > MAX_WINDOW
        ):
            raise ValueError("a command's numbers are out of range")
        if self.allowed + self.consumed + unread != self.window or any(kind not in (1, 2) for kind, _ in self.unread):
            raise ValueError("a command's unread output does not fit its window")


class GuestProcess(Stream):
    """Returned by `GuestChannel.exec` at once; the command may not have started yet."""

    __slots__ = (
        "_allowed",
        "_consumed",
        "_exit",
        "_input_ended",
        "_more",
        "_output",
        "_room",
        "_sendable",
        "_started",
        "session",
        "spec",
    )

    def __init__(self, connection: Session, spec: GuestExec) -> None:
        super().__init__(connection)
        self.session = connection
        self.spec = spec
        loop = connection.loop
        self._started: asyncio.Future[tuple[int, bool]] = loop.create_future()
        self._exit: asyncio.Future[ExitStatus] = loop.create_future()
        self._output: deque[tuple[int, bytes]] = deque()
        self._more = Signal(loop)
        self._allowed = spec.window
        self._consumed = 0
        self._sendable = INPUT_WINDOW
        self._room = Signal(loop)
        self._input_ended = not (spec.stdin or spec.tty)

    @classmethod
    def restored(cls, connection: Session, state: ProcessState) -> GuestProcess:
        """The command that was saved as `state`, on a channel that resumes its session. Raises ValueError."""
        spec = GuestExec(argv=(state.name,), stdin=state.stdin, tty=state.tty, window=state.window)
        process = cls(connection, spec)
        process._allowed = state.allowed
        process._sendable = state.sendable
        process._consumed = state.consumed
        process._input_ended = state.input_ended
        process._output.extend(state.unread)
        if state.pid:
            settle(process._started, (state.pid, state.warm))
        connection.restore_stream(process, state.stream)
        if process.opened_by != ToGuest.EXEC:
            raise ValueError(f"stream {state.stream} is no command")
        return process

    def state(self) -> ProcessState:
        """What a new channel must know to go on with it. Raises InvalidState unless its session is quiet."""
        if self._exit.done() or not self.session.is_quiet:
            raise InvalidState("this command ended, or its session is not at a stand")
        pid, warm = self._started.result() if self._started.done() else (0, False)
        ended = self._input_ended and not self.session.is_held(ToGuest.STDIN_EOF, self.id)
        return ProcessState(
            stream=self.id, name=self.spec.argv[0], window=self.spec.window, allowed=self._allowed,
            sendable=self._sendable, pid=pid, warm=warm, stdin=self.spec.stdin, tty=self.spec.tty,
            input_ended=ended, consumed=self._consumed, unread=tuple(self._output),
        )  # fmt: skip

    def allowances(self) -> tuple[int, int]:
        """Where its flow control stands."""
        return self._allowed, self._sendable

    async def started(self) -> tuple[int, bool]:
        """(pid in the sandbox, whether the warm runner runs it). Raises what kept it from starting.

        CommandNotFound, NotExecutable, InvalidRequest (working directory, arguments), NoSpace, GuestFailed.
        """
        return await asyncio.shield(self._started)

    async def read(self) -> tuple[int, bytes] | None:
        """The next output as (1 stdout or 2 stderr, data), in the order it came; None after the end.

        One reader at a time. What is read is granted to the process again; what is not is held back
        there, so that unread output costs at most `spec.window` bytes here.
        """
        # What the host holds of a quiet session is saved with it, so nobody takes from that meanwhile.
        while not self._output or self.session.is_quiet:
            if self.session.stopped_reading is not None:
                raise self.session.stopped_reading
            if self.session.is_quiet:
                await self.session.flowing()
                continue
            if self._exit.done():
                error = self._exit.exception()
                if error is not None:
                    raise error
                return None
            await self._more.wait()
        piece = self._output.popleft()
        self._consumed += len(piece[1])
        if self._consumed * 4 >= self.spec.window and not self._exit.done():
            self._allowed += self._consumed
            self.connection.send(ToGuest.CREDIT, self.id, U32.pack(self._consumed))
            self._consumed = 0
        return piece

    async def write_stdin(self, data: bytes) -> None:
        """Send input; returns when all of it is on its way. Input for a process that is gone is dropped."""
        view = memoryview(data)
        while view and not self._exit.done():
            if self._input_ended:
                raise InvalidRequest(
                    "this command takes no more input", fix="start it with stdin, and write before closing"
                )
            if not self._sendable:
                await self._room.wait()
                continue
            if self.session.is_quiet:
                await self.session.flowing(asked=True)
                continue
            piece = view[: min(self._sendable, MAX_DATA)]
            self._sendable -= len(piece)
            self.connection.send(ToGuest.STDIN, self.id, piece)
            view = view[len(piece) :]

    def close_stdin(self) -> None:
        """End of input: the process reads end of file once it has read the rest."""
        if not self._input_ended:
            self._input_ended = True
            if not self._exit.done():
                self.connection.send(ToGuest.STDIN_EOF, self.id)

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the process, or to its whole process group. A process that ended gets none."""
        if not self._exit.done():
            self.connection.send(ToGuest.SIGNAL, self.id, U32_U32.pack(number, group))

    def resize(self, rows: int, cols: int) -> None:
        """Tell its terminal's new size."""
        if self.spec.tty and not self._exit.done():
            self.connection.send(ToGuest.RESIZE, self.id, U16_U16.pack(rows, cols))

    async def wait(self) -> ExitStatus:
        """How it ended. Does not read its output, which must be read for it to get that far."""
        return await asyncio.shield(self._exit)

    def on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        """Take one piece from the guest."""
        if kind in (ToHost.STDOUT, ToHost.STDERR):
            self._on_output(kind - ToHost.STDOUT + 1, payload)
        elif kind == ToHost.STARTED:
            pid, warm = U32_U32.unpack(payload)
            settle(self._started, (pid, bool(warm)))
        elif kind == ToHost.EXIT:
            self._on_exit(payload)
        elif kind == ToHost.STDIN_CREDIT:
            self._sendable += U32.unpack(payload)[0]
            if self._sendable > INPUT_WINDOW:
                raise BadFrame("the guest grants more input than its window")
            self._room.wake()
        elif kind == ToHost.ERROR:
            self._on_error(payload)
        else:
            super().on_frame(kind, flags, payload)

    def on_stopped_reading(self) -> None:
        """Whoever waits for output looks again."""
        self._more.wake()

    def on_lost(self, error: TartarusError) -> None:
        """The guest is gone."""
        fail(self._started, error)
        self._end(error)

    def _on_output(self, stream: int, payload: bytes) -> None:
        self._allowed -= len(payload)
        if self._allowed < 0 or not self._started.done():
            raise BadFrame("output beyond what was granted, or before the start")
        if payload:
            self.session.output_bytes += len(payload)
            if self.session.on_output is not None:
                self.session.on_output(len(payload))
            self._output.append((stream, payload))
            self._more.wake()

    def _on_exit(self, payload: bytes) -> None:
        reader = Reader(payload)
        code, signal, user_us, system_us, peak = reader.take(EXIT)
        kills = 0 if reader.at_end else reader.take(U32)[0]
        reader.done()
        if not self._started.done() or code > 255 or signal > 64 or (code and signal):
            raise BadFrame("an exit that can't be")
        self.connection.memory_kills += kills
        status = ExitStatus(code, signal, user_us / 1000, system_us / 1000, peak)
        self.connection.forget(self)
        settle(self._exit, status)
        self._more.wake()
        self._room.wake()

    def _on_error(self, payload: bytes) -> None:
        reader = Reader(payload)
        (number,) = reader.take(U32)
        error = start_error(self.spec, number, reader.text())
        reader.done()
        if self._started.done():
            raise BadFrame("a start that failed after it succeeded")
        self.connection.forget(self)
        fail(self._started, error)
        self._end(error)

    def _end(self, error: TartarusError) -> None:
        fail(self._exit, error)
        self._more.wake()
        self._room.wake()
