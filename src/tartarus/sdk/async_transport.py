"""The async transport: the twin of `transport`."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from tartarus.model.errors import DaemonUnavailable
from tartarus.sdk import daemon
from tartarus.sdk.async_socket import AsyncSocket
from tartarus.sdk.http import Call, Exchange
from tartarus.sdk.places import Places
from tartarus.sdk.progress import opening_error
from tartarus.sdk.streams import Refused, StreamProtocol

T = TypeVar("T")
_CHUNK = 256 * 1024


class AsyncTransport:
    """Talks to one daemon, from any number of tasks."""

    def __init__(self, places: Places, *, start: bool = True, any_version: bool = False) -> None:
        self.places = places
        self._start = start
        self._any_version = any_version

    async def connect(self) -> AsyncSocket:
        """A connection to the daemon, started if need be."""
        try:
            return await AsyncSocket.connect(self.places.socket)
        except OSError:
            # Not there, or not ours: the blocking way starts it, or knows what is wrong.
            await anyio.to_thread.run_sync(self._reach)
        try:
            return await AsyncSocket.connect(self.places.socket)
        except OSError as error:
            raise DaemonUnavailable(f"can't connect to {self.places.socket}", why=str(error)) from error

    def _reach(self) -> None:
        daemon.connect(self.places, start=self._start).close()

    async def call(self, call: Call[T], body: AsyncIterable[bytes] | None = None) -> T:
        """Make a call; `body` is sent as it is produced."""
        async with self.stream(call, body) as answer:
            return call.read(b"".join([part async for part in answer]))

    @contextlib.asynccontextmanager
    async def stream(
        self, call: Call[Any], body: AsyncIterable[bytes] | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Make a call and read its answer's body as it comes; a refusal is raised at once. Leaving hangs up."""
        async with await self.connect() as connection:
            exchange = Exchange(any_version=self._any_version)
            # A daemon that refuses a body hangs up before it has read all: its answer says why.
            with contextlib.suppress(OSError):
                await connection.send(exchange.request(call, streamed=body is not None))
                if body is not None:
                    async for part in body:
                        if part:
                            await connection.send(exchange.body_part(part))
                    await connection.send(exchange.body_end())
            first: list[bytes] = []
            while not exchange.accepted:
                first += exchange.receive(await _receive(connection, call))
            async with contextlib.aclosing(_body(first, connection, exchange, call)) as answer:
                yield answer

    async def open(self, path: str, opening: bytes) -> AsyncStreamConnection:
        """Open a process stream."""
        return AsyncStreamConnection(await self.connect(), StreamProtocol(path, opening))


async def _body(
    first: list[bytes], connection: AsyncSocket, exchange: Exchange, call: Call[Any]
) -> AsyncGenerator[bytes, None]:
    for part in first:
        yield part
    while not exchange.done:
        for part in exchange.receive(await _receive(connection, call)):
            yield part


async def _receive(connection: AsyncSocket, call: Call[Any]) -> bytes:
    try:
        with anyio.fail_after(call.patience_s):
            return await connection.receive(_CHUNK)
    except TimeoutError as error:
        raise DaemonUnavailable(
            f"the daemon did not answer within {call.patience_s:g} s", fix="see its log, daemon.log"
        ) from error


class AsyncStreamConnection:
    """A process stream. One task may receive while another sends."""

    def __init__(self, connection: AsyncSocket, protocol: StreamProtocol) -> None:
        self._socket = connection
        self._protocol = protocol
        self._received: deque[tuple[int, memoryview]] = deque()
        self._receiving = anyio.Lock()
        self._sending = anyio.Lock()

    @property
    def protocol(self) -> StreamProtocol:
        """What queues messages; `flush` sends them."""
        return self._protocol

    async def next(self) -> tuple[int, memoryview] | None:
        """The next message, or None after the goodbye."""
        while True:
            async with self._receiving:
                if self._received:
                    return self._received.popleft()
                if self._protocol.closed:
                    return None
                await self._take()
            # Whoever is sending now takes our answers along; to wait for it would be to stop reading.
            if not self._sending.locked():
                await self.flush()

    async def flush(self) -> None:
        """Send what is queued."""
        async with self._sending:
            with contextlib.suppress(OSError):  # it hung up: what it said last is still to be read
                while data := self._protocol.outgoing():
                    await self._socket.send(data)

    async def close(self) -> None:
        """Hang up; idempotent."""
        self._socket.close()

    async def _take(self) -> None:
        data = await self._socket.receive(_CHUNK)
        try:
            self._received.extend(self._protocol.receive(data))
        except Refused as refused:
            raise opening_error(refused) from None
