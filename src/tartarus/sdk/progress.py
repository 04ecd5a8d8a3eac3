"""One process stream's story, without any I/O: from the daemon's messages to output, pid, exit and errors."""

from __future__ import annotations

import time

import msgspec

from tartarus.model.errors import SandboxLost, TartarusError, TimeLimit
from tartarus.model.sandbox import ExitStatus, SandboxRecord
from tartarus.model.states import State
from tartarus.sdk.decoding import STREAMS, Collector
from tartarus.sdk.http import Problem, problem_error
from tartarus.sdk.results import CommandFailed, CommandResult, CommandTimedOut, OutputChunk
from tartarus.sdk.streams import EVENT, Refused
from tartarus.sdk.websocket import broken

_SIGKILL = 9


class _Event(msgspec.Struct):
    event: str
    pid: int = 0
    warm: bool = False
    exit: ExitStatus | None = None
    sandbox: SandboxRecord | None = None
    error: Problem | None = None


_decode = msgspec.json.Decoder(_Event).decode


def opening_error(refused: Refused) -> TartarusError:
    """The error behind a refused handshake."""
    return problem_error(refused.status, refused.body)


class Progress:
    """What is known of a command while it runs."""

    def __init__(self, argv: tuple[str, ...], timeout_s: float | None) -> None:
        self._argv = argv
        self._timeout_s = timeout_s
        self._asked = self._began = time.monotonic()
        self._ended = self._asked
        self.started = False
        self.ended = False
        self.pid = 0
        self.warm = False
        self.exit: ExitStatus | None = None
        self.record: SandboxRecord | None = None

    def receive(self, kind: int, payload: memoryview) -> OutputChunk | None:
        """Take one message; returns output, notes events, raises what the daemon reports as an error."""
        if kind in STREAMS:
            return OutputChunk(STREAMS[kind], bytes(payload))
        if kind != EVENT:
            return None
        try:
            event = _decode(payload)
        except msgspec.MsgspecError as error:
            raise broken(str(error)) from error
        if event.event == "started":
            self.started, self.pid, self.warm = True, event.pid, event.warm
            self._began = time.monotonic()
        elif event.event == "exit":
            self.ended, self.exit, self.record = True, event.exit, event.sandbox
            self._ended = time.monotonic()
        elif event.event == "error" and event.error is not None:
            self.ended = True
            raise event.error.error()
        return None

    def cut_off(self) -> TartarusError:
        """The error for a stream that closed before it said how the command ended."""
        self.ended = True
        return SandboxLost("the daemon went away while the command ran", fix="see its log, daemon.log")

    def _end_with_sandbox(self) -> ExitStatus:
        """How a command ended that its sandbox took down."""
        state = None if self.record is None else self.record.state
        if state is State.KILLED:
            return ExitStatus(code=0, signal=_SIGKILL)
        why = "" if self.record is None else self.record.message
        if state is State.TIMED_OUT:
            raise TimeLimit("the sandbox reached its time limit", why=why)
        raise SandboxLost("the sandbox went away before the command ended", why=why)

    def result(self, output: Collector, *, check: bool) -> CommandResult:
        """The result after the end, with the output that was collected.

        Raises CommandTimedOut when its own time limit ended it, TimeLimit or SandboxLost when it went down
        with its sandbox, and with `check` CommandFailed unless it exited with 0.
        """
        status = self.exit
        if status is None:
            status = self._end_with_sandbox()
        result = CommandResult(
            argv=self._argv, exit_code=status.shell_status, stdout_bytes=output.take(1), stderr_bytes=output.take(2),
            duration_ms=(self._ended - self._began) * 1e3, signal=status.signal, user_ms=status.user_ms,
            system_ms=status.system_ms, peak_memory_bytes=status.peak_memory_bytes, warm=self.warm,
            truncated=output.truncated,
        )  # fmt: skip
        # The node kills at the limit and says no more than "signal 9"; the clock tells such a kill from others. The
        # node's began to run after we had asked, and before it told us of the start.
        over = self._timeout_s is not None and self._ended - self._asked >= self._timeout_s
        if over and status.signal == _SIGKILL:
            what = f"{self._argv[0]} ran longer than {self._timeout_s:g} s and was killed"
            raise CommandTimedOut(what, result=result)
        if check and not result.ok:
            raise CommandFailed.of(result)
        return result
