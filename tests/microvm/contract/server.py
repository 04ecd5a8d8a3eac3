"""A monitor's API on a real Unix socket: documented requests only, in an order that the monitor takes.

What it does not do is run a machine. It can be told to misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import h11

from .documents import Breach, Document

Misbehaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Answer(NamedTuple):
    """What a request is answered with."""

    status: int
    body: Any = None


class Refused(Exception):
    """What a monitor does not do now."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class ContractServer(ABC):
    """Listens below a home. `breaches`: what was asked against the document; a test must end with none."""

    document: Document
    api_socket = "api.sock"

    def __init__(self, home: Path) -> None:
        self.home = home
        self.breaches: list[str] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.misbehaves: Misbehaviour | None = None
        self.misbehaves_at = ""
        self._servers: list[asyncio.Server] = []
        self._busy: set[asyncio.Task[None]] = set()

    async def start(self, uid: int) -> None:
        """Listen, as that user's."""
        await self.listen(self.api_socket, self._serve, uid)

    async def listen(self, name: str, serve: Misbehaviour, uid: int) -> None:
        """A socket in the home; its path may be longer than an address holds."""
        directory = os.open(self.home, os.O_PATH)
        try:
            self._servers.append(
                await asyncio.start_unix_server(self._held(serve), f"/proc/self/fd/{directory}/{name}")
            )
        finally:
            os.close(directory)
        os.chown(self.home / name, uid, uid)

    async def close(self) -> None:
        """Stop."""
        for server in self._servers:
            server.close()
        for task in list(self._busy):
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    @abstractmethod
    def handle(self, method: str, path: str, body: Any) -> Answer:
        """What the monitor does about a documented request."""

    @abstractmethod
    def words(self, why: str) -> Any:
        """An error's body, as this monitor writes it."""

    def file(self, name: str) -> Path:
        """A file that a request names, as the monitor would find it."""
        return self.home / name

    def _held(self, serve: Misbehaviour) -> Misbehaviour:
        async def held(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._busy.add(task)
            try:
                with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                    await serve(reader, writer)
            finally:
                self._busy.discard(task)
                writer.close()

        return held

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            asked, content = await self._next(connection, reader)
            if asked is None:
                return
            method, path = asked.method.decode(), asked.target.decode()
            if self.misbehaves is not None and path.endswith(self.misbehaves_at):
                await self.misbehaves(reader, writer)
                return
            answer = self._answer(method, path, content)
            body = b"" if answer.body is None else json.dumps(answer.body).encode()
            headers = [("Server", "contract"), ("Connection", "keep-alive")]
            if answer.status != 204:
                headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            writer.write(connection.send(h11.Response(status_code=answer.status, headers=headers)) or b"")
            if body:
                writer.write(connection.send(h11.Data(data=body)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            connection.start_next_cycle()

    async def _next(self, connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request | None, bytes]:
        asked, content = None, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Request):
                asked = event
            elif isinstance(event, h11.Data):
                content += event.data
            elif isinstance(event, h11.EndOfMessage):
                return asked, content
            else:
                return None, b""

    def _answer(self, method: str, path: str, content: bytes) -> Answer:
        try:
            body = json.loads(content) if content else None
            operation = self.document.check(method, path, body)
            self.requests.append((method, path, body))
            answer = self.handle(method, path, body)
            if answer.status not in operation.statuses:
                raise Breach(f"the server answers {method} {path} with {answer.status}")
        except (Breach, ValueError) as error:
            self.breaches.append(str(error))
            return Answer(400, self.words(str(error)))
        except Refused as error:
            return Answer(error.status, self.words(str(error)))
        return answer
