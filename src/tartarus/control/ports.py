"""What the control layer needs from the node, as protocols: the node's own classes fit without knowing them."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from tartarus.control.fury_ports import Furies
from tartarus.control.rule_ports import Profiles
from tartarus.model.contract import Contract, NetworkState
from tartarus.model.forking import ForkRequest, ForkResult
from tartarus.model.library import (
    SnapshotInfo,
)
from tartarus.model.lifecycle import CheckpointRequest, DrainReport, DrainRequest, Stopped, StopRequest
from tartarus.model.sandbox import ExecSpec, ExitStatus, FileEvent, FileInfo, Reason, SandboxRecord, SandboxSpec, Stats


class Process(Protocol):
    """A running command. Its output must be read: it is held back once too much lies unread."""

    async def started(self) -> tuple[int, bool]:
        """Its pid inside the sandbox, and whether the warm runner runs it; raises what kept it from starting."""

    async def read(self) -> tuple[int, bytes] | None:
        """The next output as (1 stdout | 2 stderr, data); None after the end."""

    async def write_stdin(self, data: bytes) -> None:
        """Returns when the process' input has room for more."""

    def close_stdin(self) -> None:
        """End of input."""

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal, to its whole process group if asked."""

    def resize(self, rows: int, cols: int) -> None:
        """Change its terminal's size."""

    async def wait(self) -> ExitStatus:
        """How it ended, once it has."""


class LogEntry(Protocol):
    """One piece of recorded output."""

    @property
    def time_ns(self) -> int:
        """When it came: Unix time."""

    @property
    def stream(self) -> int:
        """1 stdout, 2 stderr."""

    @property
    def data(self) -> bytes:
        """The bytes."""


class OutputLog(Protocol):
    """The main command's recorded output."""

    def read(self, *, follow: bool = False) -> AsyncIterator[LogEntry]:
        """What was recorded, and with `follow` what still comes until the command ends."""


class Watch(Protocol):
    """Changes of a path, as they come."""

    async def ready(self) -> None:
        """Returns once every change will be seen; raises FileFailed."""

    def __aiter__(self) -> AsyncIterator[FileEvent]: ...

    async def aclose(self) -> None:
        """Stop watching."""


class Files(Protocol):
    """The sandbox's files, through its guest. Failures are FileFailed."""

    async def stat(self, path: str) -> FileInfo:
        """A file's attributes; a symbolic link's own."""

    async def list(self, path: str) -> list[FileInfo]:
        """A directory's entries."""

    def read(self, path: str, offset: int = 0, limit: int | None = None) -> AsyncIterator[bytes]:
        """A file's bytes."""

    async def write(
        self, path: str, data: AsyncIterable[bytes] | bytes, *, mode: int | None = None, parents: bool = False
    ) -> int:
        """Write a file (all of it appears at once, or nothing) and return its size in bytes."""

    async def mkdir(self, path: str, *, parents: bool = False) -> None:
        """Make a directory."""

    async def move(self, source: str, target: str) -> None:
        """Rename."""

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove."""

    def watch(self, path: str, *, recursive: bool = False) -> Watch:
        """Changes from now on."""


class CodeContext(Protocol):
    """A stateful interpreter inside the sandbox."""

    def run(self, code: str, timeout_s: float | None = None) -> AsyncIterator[Any]:
        """Run one cell; its events in order, each a struct that JSON can carry."""

    async def interrupt(self) -> None:
        """Stop the running cell, as Ctrl-C would."""


class PortStream(Protocol):
    """A connection to a port of a sandbox's loopback."""

    async def read(self) -> bytes:
        """The next bytes; none once the sandbox's side has ended."""

    async def write(self, data: bytes) -> None:
        """Returns when all are on their way."""


class Sandbox(Protocol):
    """One live sandbox."""

    @property
    def record(self) -> SandboxRecord:
        """What is known of it now."""

    @property
    def main(self) -> Process | None:
        """The command it was made for, if any."""

    @property
    def files(self) -> Files:
        """Its files."""

    @property
    def log(self) -> OutputLog:
        """The main command's output so far."""

    def detach(self) -> None:
        """Nobody will read the main command's output (any more): keep it in the log."""

    async def exec(self, spec: ExecSpec) -> Process:
        """Run one more command."""

    async def kill(self, *, signal: int | None = None, reason: Reason = Reason.USER_REQUEST) -> None:
        """End it, or with `signal` only signal its main command."""

    async def pause(self) -> None:
        """Freeze it."""

    async def resume(self) -> None:
        """Let it go on."""

    def connection(self, port: int) -> AbstractAsyncContextManager[PortStream]:
        """A connection to one of its ports, as long as the context lasts."""

    def refuse_if_quarantined(self) -> None:
        """Raise Quarantined while it is held."""

    async def stats(self) -> Stats:
        """Use now."""

    async def wait(self) -> SandboxRecord:
        """The final record, once it is gone."""

    async def open_context(self) -> str:
        """Start a code context."""

    def context(self, context_id: str) -> CodeContext:
        """A context by its id."""

    async def close_context(self, context_id: str) -> None:
        """End a context."""


class Terminator(Protocol):
    """Graceful ends."""

    async def stop(self, sandbox: Any, request: StopRequest) -> Stopped:
        """One sandbox's; returns once it is gone."""

    async def drain(self, request: DrainRequest) -> DrainReport:
        """All of them, and no new ones from now on."""

    def report(self) -> DrainReport:
        """Whether new ones are taken, and which there are."""

    def undo(self) -> None:
        """Take new ones again."""


class Sleeper(Protocol):
    """Hibernation."""

    async def sleep(self, sandbox: Any) -> SandboxRecord:
        """Put it to sleep; returns once nothing of it is left in memory."""

    async def wake(self, sandbox: Any) -> SandboxRecord:
        """Let it go on, unless it is awake."""

    def schedule_sleep(self, sandbox: Any, after_s: float) -> None:
        """Put it to sleep later."""


class Secrecy(Protocol):
    """Secrets of live sandboxes."""

    async def refresh(self, sandbox: Any) -> tuple[str, ...]:
        """Replace one's files by what their providers say now; the names of what was replaced."""


class Checkpoints(Protocol):
    """Sandboxes as they were, to start anew from there."""

    async def take(self, sandbox: Any, request: CheckpointRequest) -> SnapshotInfo:
        """Keep one as it is; it goes on."""

    async def list(self, tenant: str) -> builtins.list[SnapshotInfo]:
        """The tenant's, newest first."""

    async def resume(self, tenant: str, name: str) -> Sandbox:
        """A new sandbox from one."""


class Contracts(Protocol):
    """Sandboxes' networks."""

    async def state(self, sandbox: Any) -> NetworkState:
        """The contract in force, and what was counted."""

    async def swear(self, sandbox: Any, contract: Contract) -> NetworkState:
        """Another contract, from one moment on."""


class Node(Protocol):
    """The daemon of one host, as the API sees it."""

    @property
    def contracts(self) -> Contracts:
        """Networks."""

    @property
    def furies(self) -> Furies:
        """Failures and broken limits."""

    @property
    def checkpoints(self) -> Checkpoints:
        """Checkpoints."""

    @property
    def profiles(self) -> Profiles:
        """System call profiles."""

    @property
    def secrecy(self) -> Secrecy:
        """Secrets."""

    @property
    def sleeper(self) -> Sleeper:
        """Hibernation."""

    @property
    def terminator(self) -> Terminator:
        """Graceful ends."""

    async def start(self) -> None:
        """Before anything else."""

    async def stop(self, reason: Reason) -> None:
        """End every sandbox gracefully."""

    async def create(self, tenant: str, spec: SandboxSpec) -> Sandbox:
        """Make a sandbox; nothing is left when it raises."""

    def live(self, tenant: str, id_or_name: str) -> Sandbox:
        """A live sandbox of the tenant."""

    def log(self, record: SandboxRecord) -> OutputLog:
        """The output of a sandbox, live or ended."""

    async def fork(self, tenant: str, id_or_name: str, request: ForkRequest) -> ForkResult:
        """Live copies of a live sandbox; none is left when this raises."""

    async def levels(self) -> list[Any]:
        """What this host can give."""
