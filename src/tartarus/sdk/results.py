"""What the SDK hands back: results of commands and code, output, log entries, and the errors of `check=True`."""

from __future__ import annotations

import signal as signals
from base64 import b64decode
from typing import Any, ClassVar

import msgspec

from tartarus.model.errors import TartarusError, TimeLimit
from tartarus.model.sandbox import SandboxRecord


class CommandResult(msgspec.Struct, frozen=True):
    """How a command ended and what it wrote.

    `exit_code` is what a shell shows: the command's own status, or 128 + `signal` when a signal ended it.
    `truncated`: output beyond the caller's `max_output_bytes` was dropped. `warm`: a warm interpreter ran it.
    """

    argv: tuple[str, ...]
    exit_code: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    duration_ms: float
    signal: int = 0
    user_ms: float = 0.0
    system_ms: float = 0.0
    peak_memory_bytes: int = 0
    warm: bool = False
    truncated: bool = False

    @property
    def stdout(self) -> str:
        """Standard output as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def ok(self) -> bool:
        """Whether it exited with status 0."""
        return self.exit_code == 0


class CommandFailed(TartarusError):
    """The command ran and did not exit with status 0 (only raised when asked for with check=True)."""

    code: ClassVar[str] = "command_failed"

    def __init__(self, what: str, *, why: str = "", fix: str = "", result: CommandResult | None = None) -> None:
        super().__init__(what, why=why, fix=fix)
        self.result = result

    @classmethod
    def of(cls, result: CommandResult) -> CommandFailed:
        """The error for a result that is not a success."""
        ended = f"exited with status {result.exit_code}"
        if result.signal:
            ended = f"was ended by {signal_name(result.signal)}"
        lines = result.stderr.strip().splitlines()
        return cls(f"{result.argv[0]} {ended}", why=lines[-1] if lines else "", result=result)


class CommandTimedOut(TimeLimit):
    """The command ran longer than its `timeout_s` and was killed; `result` has what it wrote before."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", result: CommandResult | None = None) -> None:
        super().__init__(what, why=why, fix=fix)
        self.result = result


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 99`` for what has no name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


class OutputChunk(msgspec.Struct, frozen=True):
    """A piece of a running command's output, in the order of arrival. `stream` is ``stdout`` or ``stderr``."""

    stream: str
    data: bytes

    @property
    def text(self) -> str:
        """The data as text; a character that is cut by the chunk's end becomes U+FFFD."""
        return self.data.decode("utf-8", "replace")


class LogEntry(msgspec.Struct, frozen=True):
    """A piece of recorded output. `time_ns`: Unix time; `stream`: ``stdout`` or ``stderr``."""

    time_ns: int
    stream: str
    data: bytes


class CellError(msgspec.Struct, frozen=True):
    """The exception that ended a code cell."""

    name: str
    value: str
    traceback: str


class CellResult(msgspec.Struct, frozen=True):
    """One displayed value: its forms by MIME type. `is_main`: it is the cell's last expression."""

    data: dict[str, Any]
    is_main: bool = False

    @property
    def text(self) -> str | None:
        """The plain text form."""
        found = self.data.get("text/plain")
        return None if found is None else str(found)

    @property
    def html(self) -> str | None:
        """The HTML form."""
        found = self.data.get("text/html")
        return None if found is None else str(found)

    @property
    def png(self) -> bytes | None:
        """The PNG image, decoded."""
        found = self.data.get("image/png")
        return None if found is None else b64decode(found)


class CodeResult(msgspec.Struct, frozen=True):
    """What a code cell did: what it printed, showed and returned, and how it failed if it did."""

    stdout: str
    stderr: str
    results: list[CellResult]
    error: CellError | None
    execution_count: int
    truncated: bool = False

    @property
    def ok(self) -> bool:
        """Whether it ran to its end."""
        return self.error is None

    @property
    def text(self) -> str | None:
        """The last expression's value as text, as the interpreter would show it."""
        return next((result.text for result in reversed(self.results) if result.is_main), None)

    @property
    def html(self) -> str | None:
        """The last expression's value as HTML, when it has that form."""
        return next((result.html for result in reversed(self.results) if result.is_main), None)

    @property
    def png(self) -> bytes | None:
        """The first image that was shown."""
        return next((image for result in self.results if (image := result.png) is not None), None)


class CodeFailed(TartarusError):
    """The code raised an exception (only raised when asked for with check=True)."""

    code: ClassVar[str] = "code_failed"

    def __init__(self, what: str, *, why: str = "", fix: str = "", result: CodeResult | None = None) -> None:
        super().__init__(what, why=why, fix=fix)
        self.result = result

    @classmethod
    def of(cls, result: CodeResult) -> CodeFailed:
        """The error for a result whose cell raised."""
        assert result.error is not None
        return cls(f"the code raised {result.error.name}", why=result.error.value, result=result)


class Page(msgspec.Struct, frozen=True):
    """Part of a listing; `next` is the cursor of the following part."""

    items: list[SandboxRecord]
    next: str | None = None


class Version(msgspec.Struct, frozen=True):
    """Which daemon answers. `started_at`: Unix seconds."""

    version: str
    api: int
    pid: int
    started_at: float


class LevelReport(msgspec.Struct, frozen=True):
    """One isolation level on the daemon's host. `proved_ms`: how long a test guest took to start and end."""

    isolation: str
    ok: bool
    detail: str = ""
    fix: str = ""
    capabilities: dict[str, Any] | None = None
    proved_ms: float | None = None
