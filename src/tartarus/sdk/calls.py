"""Every operation of the API as data: what to send and how to read the answer. The two transports do the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec

from tartarus.model.errors import InvalidRequest
from tartarus.model.library import SnapshotInfo
from tartarus.model.lifecycle import (
    CheckpointRequest,
    DrainReport,
    DrainRequest,
    HibernateRequest,
    Stopped,
    StopRequest,
)
from tartarus.model.sandbox import FileInfo, SandboxRecord, SandboxSpec, Stats
from tartarus.sdk.http import Call, target
from tartarus.sdk.results import LevelReport, Page, Version

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode
# How long one question to the daemon may wait for a sandbox's end, before it is asked again.
WAIT_S = 300.0


@functools.cache
def _decoder(kind: Any) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(kind).decode


def _reads(kind: type[T]) -> Callable[[bytes], T]:
    decoder: Callable[[bytes], T] = _decoder(cast("Any", kind))
    return decoder


def _nothing(_: bytes) -> None:
    return None


def encode(value: object) -> bytes:
    """JSON for a request. Raises InvalidRequest for text that UTF-8 can't carry."""
    try:
        return _encode(value)
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "an argument, variable or path is not UTF-8 text",
            why=f"it holds the byte {ord(error.object[error.start]) & 0xFF:#04x}",
            fix="pass such data in a file or on standard input",
        ) from error


def create(spec: SandboxSpec) -> Call[SandboxRecord]:
    """Make a sandbox. Preparing a template for the first time can take minutes."""
    return Call("POST", target("sandboxes"), _reads(SandboxRecord), encode(spec), patience_s=None)


def show(sandbox: str) -> Call[SandboxRecord]:
    """One sandbox."""
    return Call("GET", target("sandboxes", sandbox), _reads(SandboxRecord))


def page(states: list[str], labels: dict[str, str], name: str, limit: int, cursor: str | None) -> Call[Page]:
    """Part of the caller's sandboxes, newest first."""
    pairs = [f"{key}={value}" for key, value in labels.items()]
    where = target("sandboxes", state=states, label=pairs, name=name, limit=limit, cursor=cursor)
    return Call("GET", where, _reads(Page))


def end(sandbox: str) -> Call[None]:
    """End a sandbox; one that has ended is fine."""
    return Call("DELETE", target("sandboxes", sandbox), _nothing)


def stop(sandbox: str, request: StopRequest) -> Call[Stopped]:
    """End a sandbox gracefully; the answer comes once it is gone."""
    return Call("POST", target("sandboxes", sandbox, "stop"), _reads(Stopped), encode(request), patience_s=None)


def checkpoint(sandbox: str, request: CheckpointRequest) -> Call[SnapshotInfo]:
    """Keep a sandbox as it is; it goes on."""
    where = target("sandboxes", sandbox, "checkpoints")
    return Call("POST", where, _reads(SnapshotInfo), encode(request), patience_s=None)


def checkpoints() -> Call[list[SnapshotInfo]]:
    """The caller's checkpoints, newest first."""
    return Call("GET", target("checkpoints"), _reads(list[SnapshotInfo]))


def resume_checkpoint(checkpoint: str) -> Call[SandboxRecord]:
    """A new sandbox from a checkpoint."""
    return Call("POST", target("checkpoints", checkpoint, "resume"), _reads(SandboxRecord), patience_s=None)


def hibernate(sandbox: str, request: HibernateRequest) -> Call[SandboxRecord]:
    """Put a sandbox to sleep; the answer comes once it sleeps."""
    where = target("sandboxes", sandbox, "hibernate")
    return Call("POST", where, _reads(SandboxRecord), encode(request), patience_s=None)


def wake(sandbox: str) -> Call[SandboxRecord]:
    """Let a hibernated sandbox go on; the answer comes once it runs."""
    return Call("POST", target("sandboxes", sandbox, "wake"), _reads(SandboxRecord), patience_s=None)


def drain(request: DrainRequest) -> Call[DrainReport]:
    """End every sandbox of the node gracefully, and take no new ones."""
    return Call("POST", target("drain"), _reads(DrainReport), encode(request), patience_s=None)


def draining() -> Call[DrainReport]:
    """Whether the node takes new sandboxes."""
    return Call("GET", target("drain"), _reads(DrainReport))


def undo_drain() -> Call[None]:
    """Take new sandboxes again."""
    return Call("DELETE", target("drain"), _nothing)


def send_signal(sandbox: str, signal: int) -> Call[None]:
    """Signal the main command."""
    return Call("POST", target("sandboxes", sandbox, "signal"), _nothing, encode({"signal": signal}))


def pause(sandbox: str) -> Call[SandboxRecord]:
    """Freeze a sandbox."""
    return Call("POST", target("sandboxes", sandbox, "pause"), _reads(SandboxRecord))


def resume(sandbox: str) -> Call[SandboxRecord]:
    """Let a paused sandbox go on."""
    return Call("POST", target("sandboxes", sandbox, "resume"), _reads(SandboxRecord))


def stats(sandbox: str) -> Call[Stats]:
    """What a sandbox uses now."""
    return Call("GET", target("sandboxes", sandbox, "stats"), _reads(Stats))


def wait(sandbox: str, timeout_s: float) -> Call[SandboxRecord]:
    """The record at the sandbox's end, or after `timeout_s`."""
    where = target("sandboxes", sandbox, "wait", timeout_s=timeout_s)
    return Call("GET", where, _reads(SandboxRecord), patience_s=timeout_s + 60.0)


def logs(sandbox: str, *, follow: bool) -> Call[None]:
    """The main command's output, as a stream of binary frames."""
    return Call("GET", target("sandboxes", sandbox, "logs", follow=follow), _nothing, patience_s=None)


class _Context(msgspec.Struct):
    id: str


def open_context(sandbox: str) -> Call[str]:
    """Start a code context."""
    decode = _reads(_Context)
    return Call("POST", target("sandboxes", sandbox, "contexts"), lambda body: decode(body).id)


def close_context(sandbox: str, context: str) -> Call[None]:
    """End a code context."""
    return Call("DELETE", target("sandboxes", sandbox, "contexts", context), _nothing)


def interrupt(sandbox: str, context: str) -> Call[None]:
    """Stop a context's running cell."""
    return Call("POST", target("sandboxes", sandbox, "contexts", context, "interrupt"), _nothing)


def run_code(sandbox: str, code: str, context: str | None, timeout_s: float | None) -> Call[None]:
    """Run a cell; its events come as JSON lines."""
    body: dict[str, object] = {"code": code}
    if context is not None:
        body["context"] = context
    if timeout_s is not None:
        body["timeout_s"] = timeout_s
    return Call("POST", target("sandboxes", sandbox, "code"), _nothing, encode(body), patience_s=None)


def _file(sandbox: str, path: str, *more: str, **query: Any) -> str:
    if "\0" in path or not path.startswith("/"):
        raise InvalidRequest(f"path {path!r} is not absolute" if path else "the path is empty", fix="begin it with /")
    return target("sandboxes", sandbox, "files", *more, path=path, **query)


def read_file(sandbox: str, path: str) -> Call[None]:
    """A file's bytes, as a stream."""
    return Call("GET", _file(sandbox, path), _nothing, patience_s=None)


def write_file(sandbox: str, path: str, *, mode: int | None, parents: bool) -> Call[None]:
    """Write a file from a streamed body."""
    octal = None if mode is None else f"{mode:04o}"
    return Call("PUT", _file(sandbox, path, mode=octal, parents=parents), _nothing, patience_s=None)


def stat_file(sandbox: str, path: str) -> Call[FileInfo]:
    """A file's attributes."""
    return Call("GET", _file(sandbox, path, "stat"), _reads(FileInfo))


def list_files(sandbox: str, path: str) -> Call[list[FileInfo]]:
    """A directory's entries."""
    return Call("GET", _file(sandbox, path, "list"), _reads(list[FileInfo]))


def make_directory(sandbox: str, path: str, *, parents: bool) -> Call[None]:
    """Make a directory."""
    body = encode({"path": path, "parents": parents})
    return Call("POST", target("sandboxes", sandbox, "files", "mkdir"), _nothing, body)


def move_file(sandbox: str, source: str, destination: str) -> Call[None]:
    """Rename."""
    body = encode({"source": source, "target": destination})
    return Call("POST", target("sandboxes", sandbox, "files", "move"), _nothing, body)


def remove_file(sandbox: str, path: str, *, recursive: bool) -> Call[None]:
    """Remove."""
    return Call("DELETE", _file(sandbox, path, recursive=recursive), _nothing)


def watch_files(sandbox: str, path: str, *, recursive: bool) -> Call[None]:
    """Changes, as JSON lines."""
    return Call("GET", _file(sandbox, path, "watch", recursive=recursive), _nothing, patience_s=None)


def levels() -> Call[list[LevelReport]]:
    """The isolation levels of the daemon's host; each is tried, which can take a while the first time."""
    return Call("GET", target("levels"), _reads(list[LevelReport]), patience_s=None)


def version() -> Call[Version]:
    """The daemon's version."""
    return Call("GET", target("version"), _reads(Version))


def shutdown() -> Call[None]:
    """Stop the daemon and every sandbox."""
    return Call("POST", target("shutdown"), _nothing)
