"""A client of the WebSocket streams, on the websockets library, for tests."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from websockets.asyncio.client import ClientConnection, unix_connect


class Ended(NamedTuple):
    """A finished conversation."""

    stdout: bytes
    stderr: bytes
    events: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.events[-1]


def connect(socket: Path, path: str) -> Any:
    return unix_connect(
        str(socket), uri=f"ws://tartarus{path}", compression=None, max_size=None, ping_interval=None, max_queue=4
    )


async def stdin(connection: ClientConnection, data: bytes) -> None:
    await connection.send(b"\0" + data)


async def stdin_end(connection: ClientConnection) -> None:
    await connection.send(b"\1")


async def signal(connection: ClientConnection, number: int) -> None:
    await connection.send(bytes([2, number]))


async def resize(connection: ClientConnection, rows: int, cols: int) -> None:
    await connection.send(b"\3" + struct.pack("<HH", rows, cols))


async def until(connection: ClientConnection, name: str) -> dict[str, Any]:
    """Read up to the event of that name, or fail with the error event."""
    while True:
        message = await connection.recv()
        assert isinstance(message, bytes)
        if message[0] == 16:
            event: dict[str, Any] = json.loads(message[1:])
            if event["event"] == name:
                return event
            assert event["event"] != "error", event


async def collect(connection: ClientConnection) -> Ended:
    """Read to the end of the conversation."""
    output = {1: bytearray(), 2: bytearray()}
    events = []
    async for message in connection:
        assert isinstance(message, bytes)
        if message[0] == 16:
            events.append(json.loads(message[1:]))
        else:
            output[message[0]] += message[1:]
    return Ended(bytes(output[1]), bytes(output[2]), events)


async def run(socket: Path, spec: dict[str, Any], **extra: Any) -> Ended:
    """One whole run without input."""
    async with connect(socket, "/v1/run") as connection:
        await connection.send(json.dumps({"spec": spec, **extra}))
        return await collect(connection)
