"""The sandbox's files over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import TYPE_CHECKING

import httpx
import pytest
import structlog

from .test_requests import problem
from .test_sandboxes import create, sh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .conftest import Service

pytestmark = pytest.mark.anyio


@pytest.fixture
async def files(client: httpx.AsyncClient) -> str:
    made = await create(client, {})
    return f"/v1/sandboxes/{made['id']}/files"


async def test_bytes_go_in_and_come_back_unchanged(client: httpx.AsyncClient, files: str) -> None:
    data = os.urandom(3_000_001)
    where = {"path": "/tmp/a b/é.bin", "parents": "1", "mode": "640"}
    assert (await client.put(files, params=where, content=data)).status_code == 204
    answer = await client.get(files, params={"path": "/tmp/a b/é.bin"})
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.content == data
    info = (await client.get(f"{files}/stat", params={"path": "/tmp/a b/é.bin"})).json()
    assert (info["kind"], info["size"], info["mode"]) == ("file", len(data), 0o640)


async def test_an_empty_file_is_a_file(client: httpx.AsyncClient, files: str) -> None:
    assert (await client.put(files, params={"path": "/tmp/empty"}, content=b"")).status_code == 204
    answer = await client.get(files, params={"path": "/tmp/empty"})
    assert (answer.status_code, answer.content) == (200, b"")


async def test_directories_are_made_listed_moved_and_removed(client: httpx.AsyncClient, files: str) -> None:
    assert (await client.post(f"{files}/mkdir", json={"path": "/tmp/d/e", "parents": True})).status_code == 204
    await client.put(files, params={"path": "/tmp/d/f"}, content=b"x")
    listed = (await client.get(f"{files}/list", params={"path": "/tmp/d"})).json()
    assert [(entry["path"], entry["kind"]) for entry in listed] == [("/tmp/d/e", "dir"), ("/tmp/d/f", "file")]
    assert (await client.post(f"{files}/move", json={"source": "/tmp/d/f", "target": "/tmp/g"})).status_code == 204
    assert (await client.get(files, params={"path": "/tmp/g"})).content == b"x"
    problem(await client.delete(files, params={"path": "/tmp/d"}), 422, "file_failed")
    assert (await client.delete(files, params={"path": "/tmp/d", "recursive": "true"})).status_code == 204
    problem(await client.get(f"{files}/list", params={"path": "/tmp/d"}), 422, "file_failed")


async def test_failures_name_the_path_and_the_reason(client: httpx.AsyncClient, files: str) -> None:
    found = problem(await client.get(files, params={"path": "/tmp/none"}), 422, "file_failed")
    assert "/tmp/none" in found["detail"]
    assert found["why"] == "No such file or directory"
    problem(await client.put(files, params={"path": "/no/such/dir/file"}, content=b"x"), 422, "file_failed")
    problem(await client.get(files, params={"path": "/tmp"}), 422, "file_failed")
    problem(await client.post(f"{files}/mkdir", json={"path": "/tmp"}), 422, "file_failed")
    problem(await client.get(f"{files}/watch", params={"path": "/none"}), 422, "file_failed")


async def test_an_upload_that_is_cut_off_leaves_nothing(
    client: httpx.AsyncClient, service: Service, files: str
) -> None:
    _, writer = await asyncio.open_unix_connection(str(service.settings.socket))
    writer.write(f"PUT {files}?path=/tmp/cut HTTP/1.1\r\nhost: t\r\ncontent-length: 1000000\r\n\r\n".encode())
    writer.write(b"x" * 500_000)
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.transport.abort()
    await asyncio.sleep(0.1)
    listed = (await client.get(f"{files}/list", params={"path": "/tmp"})).json()
    assert [entry["path"] for entry in listed] == []


async def test_a_download_that_is_cut_off_disturbs_nobody(
    client: httpx.AsyncClient, service: Service, files: str
) -> None:
    await client.put(files, params={"path": "/tmp/big"}, content=b"x" * 20_000_000)
    for _ in range(3):
        reader, writer = await asyncio.open_unix_connection(str(service.settings.socket))
        writer.write(f"GET {files}?path=/tmp/big HTTP/1.1\r\nhost: t\r\n\r\n".encode())
        await reader.read(1000)
        writer.transport.abort()
    assert len((await client.get(files, params={"path": "/tmp/big"})).content) == 20_000_000


async def test_changes_are_seen_as_they_happen(client: httpx.AsyncClient, files: str) -> None:
    await client.post(f"{files}/mkdir", json={"path": "/tmp/w"})
    async with client.stream("GET", f"{files}/watch", params={"path": "/tmp/w"}) as answer:
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        lines = answer.aiter_lines()
        await client.put(files, params={"path": "/tmp/w/new"}, content=b"1")
        seen = await first(lines, "/tmp/w/new")
    assert seen["kind"] in {"create", "write", "rename"}


async def first(lines: AsyncIterator[str], path: str) -> dict[str, str]:
    async for line in lines:
        event: dict[str, str] = json.loads(line)
        if event["path"] == path:
            return event
    raise AssertionError(f"the watch ended without {path}")


async def test_a_watch_ends_with_its_sandbox(client: httpx.AsyncClient) -> None:
    made = await create(client, sh("sleep 1000", name="box"))
    async with client.stream("GET", "/v1/sandboxes/box/files/watch", params={"path": "/tmp"}) as answer:
        await client.delete(f"/v1/sandboxes/{made['id']}")
        lines = [json.loads(line) async for line in answer.aiter_lines()]
    assert all(line.get("type") == "problem" for line in lines)


async def test_a_file_that_is_cut_off_is_no_whole_file(
    client: httpx.AsyncClient, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sandbox is killed midway: the client sees a broken answer, the log has one line, the daemon goes on."""
    made = await create(client, {})
    files = f"/v1/sandboxes/{made['id']}/files"
    answer = await client.post(f"/v1/sandboxes/{made['id']}/files/mkdir", json={"path": "/tmp/d"})
    assert answer.status_code == 204
    await client.put(files, params={"path": "/tmp/d/large"}, content=bytes(64 * 1024 * 1024))
    with structlog.testing.capture_logs() as said:
        async with client.stream("GET", files, params={"path": "/tmp/d/large"}) as answer:
            assert answer.status_code == 200
            parts = answer.aiter_raw()
            await anext(parts)
            assert (await client.delete(f"/v1/sandboxes/{made['id']}")).status_code == 204
            with pytest.raises(httpx.TransportError):
                [part async for part in parts]
    (line,) = [line for line in said if line["log_level"] != "info"]
    assert (line["event"], line["log_level"]) == ("answer_cut_off", "warning")
    assert "exc_info" not in line
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert (await client.get("/readyz")).status_code == 200
