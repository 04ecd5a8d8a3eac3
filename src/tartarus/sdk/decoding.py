"""Streams of frames and lines put back together, without any I/O, and bounds on what a guest may fill."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from tartarus.model.errors import DaemonUnavailable, GuestFailed
from tartarus.sdk.http import Problem
from tartarus.sdk.results import CellError, CellResult, CodeResult, LogEntry

_LOG_FRAME = struct.Struct("<QBI")
_MAX_FRAME_BYTES = 64 * 1024**2
STREAMS = {1: "stdout", 2: "stderr"}


class LogDecoder:
    """Bytes of a log answer into entries."""

    def __init__(self) -> None:
        self._held = bytearray()

    def receive(self, data: bytes) -> list[LogEntry]:
        """The entries that `data` completes."""
        self._held += data
        entries = []
        position = 0
        while len(self._held) - position >= _LOG_FRAME.size:
            time_ns, stream, size = _LOG_FRAME.unpack_from(self._held, position)
            if size > _MAX_FRAME_BYTES or stream not in STREAMS:
                raise DaemonUnavailable("the daemon sent a log that makes no sense", fix="see daemon.log")
            start = position + _LOG_FRAME.size
            if len(self._held) - start < size:
                break
            entries.append(LogEntry(time_ns, STREAMS[stream], bytes(self._held[start : start + size])))
            position = start + size
        del self._held[:position]
        return entries


class LineDecoder:
    """Bytes of an NDJSON answer into objects; a line that holds a problem is raised."""

    def __init__(self) -> None:
        self._held = bytearray()

    def receive(self, data: bytes) -> list[dict[str, Any]]:
        """The objects that `data` completes."""
        self._held += data
        *lines, rest = self._held.split(b"\n") if b"\n" in data else [self._held]
        self._held = bytearray(rest)
        return [self._read(line) for line in lines if line]

    @staticmethod
    def _read(line: bytearray) -> dict[str, Any]:
        try:
            value = msgspec.json.decode(line, type=dict[str, Any])
            if value.get("type") == "problem":
                raise msgspec.convert(value.get("problem"), Problem).error()
        except msgspec.MsgspecError as error:
            raise DaemonUnavailable("the daemon sent a line that makes no sense", why=str(error)) from error
        return value


class Collector:
    """Keeps the first `limit` bytes of output and drops the rest, so that a flood can't fill the caller's memory."""

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._parts: dict[int, list[bytes]] = {1: [], 2: []}
        self.truncated = False

    def add(self, stream: int, data: bytes | memoryview) -> None:
        """Take a piece of stream 1 or 2."""
        if len(data) > self._room:
            self.truncated = True
            data = data[: self._room]
        self._room -= len(data)
        if data:
            self._parts[stream].append(bytes(data))

    def take(self, stream: int) -> bytes:
        """What was kept of a stream."""
        return b"".join(self._parts[stream])


class CellCollector:
    """The events of one code cell into its result."""

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._text: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._results: list[CellResult] = []
        self._error: CellError | None = None
        self._count = 0
        self._truncated = False

    def add(self, event: dict[str, Any]) -> None:
        """Take one event; unknown kinds are ignored."""
        kind = event.get("type")
        if kind in ("stdout", "stderr"):
            text = str(event.get("text", ""))
            self._truncated |= len(text) > self._room
            text = text[: self._room]
            self._room -= len(text)
            self._text[str(kind)].append(text)
        elif kind == "result":
            self._show(event)
        elif kind == "error":
            traceback = event.get("traceback", "")
            lines = traceback if isinstance(traceback, str) else "\n".join(map(str, traceback))
            self._error = CellError(str(event.get("name", "")), str(event.get("value", "")), lines)
        elif kind == "done":
            self._count = int(event.get("execution_count") or 0)

    def _show(self, event: dict[str, Any]) -> None:
        try:
            shown = msgspec.convert(event, CellResult)
        except msgspec.ValidationError as error:
            raise GuestFailed("the sandbox sent a result that makes no sense", why=str(error)) from error
        size = sum(len(form) if isinstance(form, str) else len(str(form)) for form in shown.data.values())
        if size > self._room:
            self._truncated = True
            return
        self._room -= size
        self._results.append(shown)

    def result(self) -> CodeResult:
        """Everything together."""
        return CodeResult(
            stdout="".join(self._text["stdout"]), stderr="".join(self._text["stderr"]), results=self._results,
            error=self._error, execution_count=self._count, truncated=self._truncated,
        )  # fmt: skip
