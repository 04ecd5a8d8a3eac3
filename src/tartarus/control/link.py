"""One WebSocket that carries one process: the client's stdin, signals and sizes down, output and events up.

Binary messages both ways; the first byte is the kind (after the opening JSON text message):

  client: 0 stdin, 1 end of stdin, 2 signal (u8), 3 resize (u16 rows, u16 columns, little endian)
  server: 1 stdout, 2 stderr, 16 event (JSON)

Backpressure: output is read from the process only as fast as the client takes it, and the client's
messages only until `STDIN_AHEAD_BYTES` of its input wait for the process; signals overtake waiting input.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio
import msgspec
from uvicorn.protocols.utils import ClientDisconnected

from tartarus.control.decode import decode
from tartarus.control.problems import as_tartarus_error, problem_of
from tartarus.model.errors import InvalidRequest, TartarusError

if TYPE_CHECKING:
    from types import TracebackType

    from litestar.types.asgi_types import WebSocketSendEvent

    from tartarus.control.api import ApiSocket
    from tartarus.control.ports import OutputLog, Process

T = TypeVar("T")
STDIN, STDIN_END, SIGNAL, RESIZE = 0, 1, 2, 3
EVENT = b"\x10"
_OUTPUT = {1: b"\x01", 2: b"\x02"}
_SIZE = struct.Struct("<HH")
STDIN_AHEAD_BYTES = 4 * 1024 * 1024
_encode = msgspec.json.Encoder().encode


class Link:
    """An async context manager around the whole conversation; `gone` tells whether the client left.

    What is raised inside becomes the closing ``error`` event.
    """

    def __init__(self, socket: ApiSocket) -> None:
        self._socket = socket
        self._send = socket.send
        self.gone = False
        self.violation: InvalidRequest | None = None
        self._scope: anyio.CancelScope | None = None
        self._process: Process | None = None
        self._early: list[tuple[int, bytes]] = []
        self._stdin: deque[bytes | None] = deque()
        self._stdin_bytes = 0
        self._stdin_changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, kind: type[T]) -> T:
        """Accept the connection and read its opening message."""
        await self._socket.accept()
        message: Any = await self._socket.receive()
        if message["type"] != "websocket.receive":
            self._client_left()
            raise InvalidRequest("the client left before it said what to do")
        text = message.get("text")
        if text is None:
            raise InvalidRequest("the first message is not text", fix="begin with the JSON request in a text message")
        request = decode(kind, text)
        self._tasks.append(asyncio.create_task(self._listen()))
        return request

    async def __aenter__(self) -> Link:
        self._watching = self._socket.api.hangups.watching(self._socket.peer.fd, self._client_left)
        self._watching.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._watching.__exit__(None, None, None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if isinstance(error, Exception):
            await self.event("error", error=problem_of(as_tartarus_error(error)))
        if not self.gone:
            with contextlib.suppress(ClientDisconnected):
                await self._socket.close(1000)
        return isinstance(error, Exception)

    async def carry(self, process: Process) -> None:
        """Move bytes until the process has ended and all its output is sent, or the client is gone."""
        with self._while_connected():
            self._attach(process)
            while (chunk := await process.read()) is not None:
                await self._output(*chunk)

    async def show(self, log: OutputLog, since_ns: int) -> None:
        """Send what a log receives from `since_ns` (Unix time) to its end, or until the client is gone."""
        with self._while_connected():
            async for entry in log.read(follow=True):
                if entry.time_ns >= since_ns:
                    await self._output(entry.stream, entry.data)

    async def event(self, name: str, **fields: Any) -> None:
        """Tell the client what happened; nothing if it is gone."""
        if self.gone:
            return
        body = _encode({"event": name, **fields})
        try:
            await self._send_parts(EVENT, body)
        except ClientDisconnected:
            self._client_left()

    @contextlib.contextmanager
    def _while_connected(self) -> Iterator[None]:
        """Cancels what is inside when the client leaves or breaks the protocol (which is raised)."""
        with anyio.CancelScope() as self._scope:
            if self.gone or self.violation is not None:
                self._scope.cancel()
            try:
                yield
            except ClientDisconnected:
                self.gone = True
        self._scope = None
        if self.violation is not None:
            raise self.violation

    async def _output(self, stream: int, data: bytes) -> None:
        await self._send_parts(_OUTPUT[stream], data)

    async def _send_parts(self, *parts: bytes) -> None:
        # Beyond ASGI, and understood by our own server: the kind and the data need not be joined here.
        await self._send(cast("WebSocketSendEvent", {"type": "websocket.send", "parts": parts}))

    def _client_left(self) -> None:
        self.gone = True
        if self._scope is not None:
            self._scope.cancel()

    def _attach(self, process: Process) -> None:
        self._process = process
        self._tasks.append(asyncio.create_task(self._feed(process)))
        for kind, data in self._early:
            self._control(kind, data)
        self._early.clear()

    async def _listen(self) -> None:
        """Take the client's messages; never waits for the process except when too much input is waiting."""
        try:
            while True:
                message: Any = await self._socket.receive()
                if message["type"] != "websocket.receive":
                    return self._client_left()
                data: bytes = message.get("bytes") or b""
                kind = data[0] if data else -1
                if kind == STDIN:
                    self._stdin_bytes += len(data) - 1
                    self._stdin.append(data[1:])
                    self._stdin_changed.set()
                    while self._stdin_bytes > STDIN_AHEAD_BYTES:
                        self._stdin_changed.clear()
                        await self._stdin_changed.wait()
                elif kind == STDIN_END:
                    self._stdin.append(None)
                    self._stdin_changed.set()
                else:
                    self._control(kind, data)
        except InvalidRequest as error:
            self.violation = error
            if self._scope is not None:
                self._scope.cancel()

    def _control(self, kind: int, data: bytes) -> None:
        size = {SIGNAL: 2, RESIZE: 1 + _SIZE.size}.get(kind)
        if size != len(data) or (kind == SIGNAL and not 1 <= data[1] <= 64):
            raise InvalidRequest(f"not a message of this protocol: kind {kind}, {len(data)} bytes")
        if self._process is None:
            self._early.append((kind, data))
            if len(self._early) > 64:
                raise InvalidRequest("too many messages before the process started")
        elif kind == SIGNAL:
            self._process.signal(data[1])
        else:
            self._process.resize(*_SIZE.unpack_from(data, 1))

    async def _feed(self, process: Process) -> None:
        """Pass the client's input to the process, as fast as it takes it."""
        while True:
            while not self._stdin:
                self._stdin_changed.clear()
                await self._stdin_changed.wait()
            data = self._stdin.popleft()
            if data is None:
                process.close_stdin()
                continue
            # When it has ended or takes no input, what is left goes nowhere, as in a broken pipe.
            with contextlib.suppress(TartarusError):
                await process.write_stdin(data)
            self._stdin_bytes -= len(data)
            self._stdin_changed.set()
