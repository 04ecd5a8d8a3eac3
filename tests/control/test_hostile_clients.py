"""Clients that break the rules of the wire: their own stream ends, and nothing else notices."""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
from typing import TYPE_CHECKING

import pytest

from . import wire
from .test_sandboxes import create, sh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from .conftest import Service

pytestmark = pytest.mark.anyio
UPGRADE = (
    "GET {path} HTTP/1.1\r\nhost: t\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.fixture(autouse=True)
async def undisturbed(
    service: Service, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[None]:
    """Whatever the test does, the server goes on, no error is logged and no sandbox stays."""
    yield
    async with asyncio.timeout(20):
        while (await client.get("/v1/sandboxes", params={"state": "running"})).json()["items"]:
            await asyncio.sleep(0.02)
    assert (await wire.run(service.settings.socket, sh("echo fine"))).stdout == b"fine\n"
    assert [record for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}] == []


def frame(data: bytes, opcode: int = 2, *, final: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    first = final << 7 | reserved << 4 | opcode
    size = len(data)
    length = size if size < 126 else 126 if size < 65536 else 127
    extended = b"" if length < 126 else struct.pack(">H" if length == 126 else ">Q", size)
    head = bytes([first, masked << 7 | length]) + extended
    # A mask of zeros changes nothing and is a mask all the same.
    return head + (b"\0\0\0\0" if masked else b"") + data


async def raw(service: Service, path: str = "/v1/run") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(str(service.settings.socket))
    writer.write(UPGRADE.format(path=path).encode())
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def started(service: Service) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await raw(service)
    spec = {"spec": {"command": {"argv": ["cat"], "stdin": True}}}
    writer.write(frame(json.dumps(spec).encode(), 1))
    await reader.readuntil(b'"event":"started"')
    return reader, writer


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    received = b""
    try:
        async with asyncio.timeout(20):
            while piece := await reader.read(65536):
                received += piece
    except ConnectionError:
        pass
    return received


BROKEN_FRAMES = {
    "unmasked": frame(b"\0x", masked=False),
    "reserved bits": frame(b"\0x", reserved=4),
    "unknown opcode": frame(b"\0x", 3),
    "continuation of nothing": frame(b"\0x", 0),
    "a new message inside a fragmented one": frame(b"\0x", final=False) + frame(b"\0y"),
    "a fragmented ping": frame(b"", 9, final=False),
    "an oversized ping": frame(b"x" * 126, 9),
    "a message over the cap": frame(b"\0" * (6 * 1024 * 1024)),
    "a length beyond all bounds": b"\x82\xff" + b"\x7f" + b"\xff" * 7 + b"\0\0\0\0",
    "a close with half a code": frame(b"\x03", 8),
    "a close with a bad code": frame(struct.pack(">H", 999), 8),
    "text that is not UTF-8": frame(b"\xff\xfe", 1),
    "garbage": b"GET / HTTP/1.1\r\n\r\n" * 20,
}


@pytest.mark.parametrize("broken", BROKEN_FRAMES.values(), ids=BROKEN_FRAMES.keys())
async def test_a_broken_frame_ends_the_run(service: Service, broken: bytes) -> None:
    reader, writer = await started(service)
    writer.write(broken)
    writer.write(frame(struct.pack(">H", 1000), 8))
    await until_closed(reader)
    writer.close()


async def test_fragments_pings_and_goodbyes_are_understood(service: Service) -> None:
    reader, writer = await started(service)
    writer.write(frame(b"\0he", final=False) + frame(b"are you there", 9) + frame(b"llo", 0) + frame(b"\1"))
    received = await until_closed_after_goodbye(reader, writer)
    assert b"\x01hello" in received
    assert b"\x8a\x0dare you there" in received
    assert b'"code":0' in received


async def until_closed_after_goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    received = await reader.readuntil(b"\x88\x02\x03\xe8")
    writer.write(frame(struct.pack(">H", 1000), 8))
    await until_closed(reader)
    writer.close()
    return received


async def test_leaving_before_the_opening_message(service: Service) -> None:
    for farewell in (b"", frame(b"", 8), frame(struct.pack(">H", 1000), 8)):
        reader, writer = await raw(service)
        writer.write(farewell)
        writer.write_eof()
        await until_closed(reader)
        writer.close()


async def test_leaving_at_every_moment_of_a_run(service: Service) -> None:
    opening = frame(json.dumps({"spec": sh("echo out; sleep 1000")}).encode(), 1)
    for moment in range(40):
        _, writer = await raw(service)
        writer.write(opening[: len(opening) if moment % 4 else moment + 1])
        await asyncio.sleep(moment / 2000)
        writer.transport.abort()


@pytest.mark.parametrize("seed", range(6))
async def test_any_messages_at_all(service: Service, client: httpx.AsyncClient, seed: int) -> None:
    chance = random.Random(seed)
    await create(client, {"name": "box"})
    for path in ("/v1/run", "/v1/sandboxes/box/exec", "/v1/sandboxes/box/attach"):
        for _ in range(6):
            reader, writer = await raw(service, path)
            command = {"argv": ["cat"], "stdin": True}
            opening = {"spec": {"command": command}} if path == "/v1/run" else command if path.endswith("exec") else {}
            if chance.random() < 0.8:
                writer.write(frame(json.dumps(opening).encode(), 1))
            for _ in range(chance.randrange(12)):
                kind = bytes([chance.choice([0, 0, 0, 1, 2, 3, 4, 255])])
                data = kind + os.urandom(chance.choice([0, 1, 1, 4, 4, 200, 70_000]))
                writer.write(frame(data, chance.choice([1, 2, 2, 2, 2, 9, 10])))
            writer.write(frame(b"", 8))
            await until_closed(reader)
            writer.close()
    await client.delete("/v1/sandboxes/box")
