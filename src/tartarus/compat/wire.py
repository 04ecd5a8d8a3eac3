"""HTTP over an engine's local socket, with every answer bounded in time and bytes.

The standard library's client: engines speak plain HTTP/1.1 here, and a deadline can simply shut its socket down.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import stat
import threading
from collections.abc import Iterator
from typing import Any, TypeVar
from urllib.parse import urlencode

import msgspec

from tartarus.compat.engines import shown
from tartarus.model.errors import ContainerNotFound, EngineFailed, InvalidRequest

T = TypeVar("T")
Query = dict[str, str]
CALL_S = 60.0
STALL_S = 120.0
MAX_ANSWER = 16 * 1024**2
_MAX_ERROR = 64 * 1024
_PIECE = 256 * 1024


class EngineSlow(EngineFailed):
    """The engine, or what it was asked to wait for, took too long."""


class EngineRefused(EngineFailed):
    """The engine said no: what was asked was not done."""


class _Problem(msgspec.Struct):
    """Docker says `message`, Podman also `cause`."""

    message: str = ""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, stall_s: float) -> None:
        super().__init__("localhost", timeout=stall_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def check_socket(path: str, engine: str) -> str:
    """Return the path of a socket that root or we own. Raises EngineFailed and InvalidRequest."""
    if not path.startswith("/"):
        raise InvalidRequest(
            f"{shown(path)!r} is not the path of a socket", why="engines are reached on this host only",
            fix=f"give {engine}'s Unix socket, as in --socket /run/{engine}.sock",
        )  # fmt: skip
    try:
        found = os.stat(path)
    except OSError as error:
        raise EngineFailed(
            f"no {engine} at {shown(path)}", why=error.strerror or "", fix="start it, or give its socket with --socket"
        ) from None
    if not stat.S_ISSOCK(found.st_mode):
        raise EngineFailed(f"{shown(path)} is no socket")
    # Whoever listens there is told what we run and is believed about what it ran.
    if found.st_uid not in {0, os.geteuid()}:
        raise EngineFailed(f"{shown(path)} belongs to another user", why="neither root's nor yours")
    return path


class EngineSocket:
    """Calls to one engine. Not shared between threads at the same time; each call has its own connection."""

    def __init__(self, path: str, engine: str) -> None:
        self.path = check_socket(path, engine)
        self._engine = engine

    def read(
        self, method: str, path: str, kind: type[T], *, query: Query | None = None, body: Any = None,
        deadline_s: float = CALL_S,
    ) -> T:  # fmt: skip
        """An answer in JSON. Raises EngineFailed when it is another thing, too long, or too late."""
        content = self.call(method, path, query=query, body=body, deadline_s=deadline_s)
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise EngineFailed(f"{self._engine} answered with nonsense", why=shown(str(error))) from None

    def call(
        self, method: str, path: str, *, query: Query | None = None, body: Any = None, deadline_s: float = CALL_S,
        accept: tuple[int, ...] = (),
    ) -> bytes:  # fmt: skip
        """An answer's content; nothing for a status in `accept`."""
        content = bytearray()
        with self.stream(method, path, query=query, body=body, deadline_s=deadline_s, accept=accept) as pieces:
            for piece in pieces:
                content += piece
                if len(content) > MAX_ANSWER:
                    raise EngineFailed(f"{self._engine} answered too much", why=f"more than {MAX_ANSWER} bytes")
        return bytes(content)

    @contextlib.contextmanager
    def stream(
        self, method: str, path: str, *, query: Query | None = None, body: Any = None, deadline_s: float,
        stall_s: float = STALL_S, accept: tuple[int, ...] = (),
    ) -> Iterator[Iterator[bytes]]:  # fmt: skip
        """An answer's content, in pieces. After `deadline_s`, or `stall_s` without a byte, EngineFailed is raised."""
        connection = _UnixConnection(self.path, min(stall_s, deadline_s))
        late = threading.Event()
        timer = threading.Timer(deadline_s, _cut, (connection, late))
        timer.daemon = True
        timer.start()
        try:
            yield self._pieces(connection, method, path, query, body, accept)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise EngineSlow(
                    f"{self._engine} did not answer in time", why=f"{shown(path)} was given {deadline_s:g} s",
                    fix="see whether the engine hangs",
                ) from None  # fmt: skip
            raise EngineFailed(f"{self._engine} broke off", why=shown(str(error) or type(error).__name__)) from None
        finally:
            timer.cancel()
            connection.close()

    def _pieces(
        self, connection: _UnixConnection, method: str, path: str, query: Query | None, body: Any,
        accept: tuple[int, ...],
    ) -> Iterator[bytes]:  # fmt: skip
        where = path + (f"?{urlencode(query)}" if query else "")
        content = None if body is None else msgspec.json.encode(body)
        headers = {"Host": "localhost", "Accept-Encoding": "identity"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, where, body=content, headers=headers)
        with connection.getresponse() as answer:
            if answer.status in accept:
                return
            if not 200 <= answer.status < 300:
                raise self._error(answer.status, answer.read(_MAX_ERROR))
            while piece := answer.read1(_PIECE):
                yield piece
            # `read1` takes an end for the end, also when more was announced.
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)

    def _error(self, status: int, content: bytes) -> EngineFailed | ContainerNotFound:
        try:
            why = msgspec.json.decode(content, type=_Problem).message
        except (msgspec.MsgspecError, ValueError, RecursionError):
            why = content[:200].decode("utf-8", "replace")
        if status == http.client.NOT_FOUND:
            return ContainerNotFound(f"{self._engine} has no such thing", why=shown(why, 400))
        return EngineRefused(f"{self._engine} refused", why=f"{shown(why, 400)} (status {status})")


def _cut(connection: _UnixConnection, late: threading.Event) -> None:
    late.set()
    connected = connection.sock
    if connected is not None:
        with contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)


def demultiplexed(pieces: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Docker's frames (stream, three zero bytes, length as 32 bits) as they come, never a whole one held.

    Raises ValueError for what is no frame, and for one that is cut off.
    """
    head = bytearray()
    left = number = 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            if left == 0:
                wanted = 8 - len(head)
                head += rest[:wanted]
                rest = rest[wanted:]
                if len(head) == 8:
                    number, left = head[0], int.from_bytes(head[4:], "big")
                    if number > 3 or any(head[1:4]):
                        raise ValueError("what it sent is no stream of Docker's")
                    head.clear()
                continue
            part = bytes(rest[:left])
            rest = rest[len(part) :]
            left -= len(part)
            yield (2 if number == 2 else 1), part
    if left or head:
        raise ValueError("the stream is cut off")
