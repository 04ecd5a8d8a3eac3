"""The WebSockets: bytes both ways, signals, backpressure, and clients that leave at any moment."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from typing import TYPE_CHECKING, Any

import pytest
from websockets.exceptions import InvalidStatus

from . import wire
from .test_sandboxes import create, sh, text_of

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from .conftest import Service

pytestmark = pytest.mark.anyio


@pytest.fixture
def socket(service: Service) -> Path:
    return service.settings.socket


async def ended(client: httpx.AsyncClient, sandbox_id: str) -> dict[str, Any]:
    answer = await client.get(f"/v1/sandboxes/{sandbox_id}/wait", params={"timeout_s": "10"})
    assert answer.status_code == 200, answer.text
    record: dict[str, Any] = answer.json()
    return record


async def test_a_run_tells_its_story_in_order(socket: Path) -> None:
    done = await wire.run(socket, sh("echo out; echo err >&2; exit 3", name="job"))
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")
    assert [event["event"] for event in done.events] == ["created", "started", "exit"]
    created, started, left = done.events
    assert created["sandbox"]["name"] == "job"
    assert started["pid"] > 0
    assert started["start_ms"] > 0
    assert left["exit"]["code"] == 3
    assert (left["sandbox"]["state"], left["sandbox"]["exit_code"]) == ("failed", 3)


async def test_a_command_that_a_signal_kills(socket: Path) -> None:
    done = await wire.run(socket, sh("kill -TERM $$"))
    assert (done.last["exit"]["signal"], done.last["sandbox"]["exit_signal"]) == (15, 15)


@pytest.mark.parametrize(
    ("opening", "code"),
    [
        ({"spec": {"command": {"argv": ["/no/such/program"]}}}, "command_not_found"),
        ({"spec": {"command": {"argv": ["true"]}, "template": "nope"}}, "template_not_found"),
        ({"spec": {}}, "invalid_request"),
        ({"spec": {"command": {"argv": ["true"]}}, "kep": True}, "invalid_request"),
        ({}, "invalid_request"),
        ("{", "invalid_request"),
        (b"\0", "invalid_request"),
    ],
    ids=str,
)
async def test_a_refused_run_is_one_error_event(socket: Path, opening: Any, code: str) -> None:
    async with wire.connect(socket, "/v1/run") as connection:
        await connection.send(opening if isinstance(opening, (str, bytes)) else json.dumps(opening))
        done = await wire.collect(connection)
    assert [event["event"] for event in done.events] == ["error"]
    assert done.last["error"]["code"] == code
    assert done.last["error"]["detail"]


async def test_binary_input_comes_back_unchanged(socket: Path) -> None:
    data = bytes(range(256)) * 4096
    async with wire.connect(socket, "/v1/run") as connection:
        await connection.send(json.dumps({"spec": {"command": {"argv": ["cat"], "stdin": True}}}))
        collecting = asyncio.create_task(wire.collect(connection))
        for at in range(0, len(data), 100_000):
            await wire.stdin(connection, data[at : at + 100_000])
        await wire.stdin_end(connection)
        done = await collecting
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert done.last["exit"]["code"] == 0


async def test_large_output_is_whole(socket: Path) -> None:
    done = await wire.run(socket, {"command": {"argv": ["head", "-c", "30000000", "/dev/zero"]}})
    assert len(done.stdout) == 30_000_000
    assert done.stdout.count(0) == 30_000_000


async def test_a_client_that_does_not_read_holds_the_command_back(socket: Path, client: httpx.AsyncClient) -> None:
    async with wire.connect(socket, "/v1/run") as connection:
        await connection.send(json.dumps({"spec": sh("head -c 64000000 /dev/zero; echo done >&2", name="slow")}))
        await wire.until(connection, "started")
        await asyncio.sleep(0.5)
        assert (await client.get("/v1/sandboxes/slow")).json()["state"] == "running"
        log = await client.get("/v1/sandboxes/slow/logs")
        # Far less than it would have written by now: the buffers on the way, not the whole.
        assert len(text_of(log.content, 1)) < 16_000_000
        done = await wire.collect(connection)
    assert len(done.stdout) == 64_000_000
    assert done.stderr == b"done\n"


async def test_signals_overtake_input_that_nobody_reads(socket: Path) -> None:
    async with wire.connect(socket, "/v1/run") as connection:
        await connection.send(json.dumps({"spec": {"command": {"argv": ["sleep", "1000"], "stdin": True}}}))
        await wire.until(connection, "started")
        for _ in range(20):
            await wire.stdin(connection, b"x" * 100_000)
        await wire.signal(connection, signal.SIGINT)
        done = await wire.collect(connection)
    assert done.last["exit"]["signal"] == signal.SIGINT


async def test_a_terminal_has_the_size_that_it_is_told(socket: Path) -> None:
    script = "stty size; read line; stty size; echo got $line"
    command = {"argv": ["sh", "-c", script], "tty": True, "stdin": True, "rows": 30, "cols": 90}
    async with wire.connect(socket, "/v1/run") as connection:
        await connection.send(json.dumps({"spec": {"command": command}}))
        await wire.until(connection, "started")
        assert await connection.recv() == b"\x0130 90\r\n"
        await wire.resize(connection, 50, 132)
        await wire.stdin(connection, b"word\n")
        done = await wire.collect(connection)
    assert done.stdout.replace(b"\r\n", b"\n") == b"word\n50 132\ngot word\n"
    assert done.last["exit"]["code"] == 0


async def test_what_comes_before_the_start_is_kept(socket: Path) -> None:
    async with wire.connect(socket, "/v1/run") as connection:
        spec = sh("trap 'echo got; exit 5' USR1; cat >/dev/null; while :; do sleep 0.01; done")
        spec["command"]["stdin"] = True
        await connection.send(json.dumps({"spec": spec}))
        await wire.stdin(connection, b"early")
        await wire.stdin_end(connection)
        await wire.until(connection, "started")
        await asyncio.sleep(0.2)
        await wire.signal(connection, signal.SIGUSR1)
        done = await wire.collect(connection)
    assert done.stdout == b"got\n"
    assert done.last["exit"]["code"] == 5


@pytest.mark.parametrize("message", [b"", b"\7", b"\2", b"\2\0", b"\2\xff", b"\3\0", "text"], ids=repr)
async def test_a_message_of_no_known_kind_ends_the_run(
    socket: Path, client: httpx.AsyncClient, message: bytes | str
) -> None:
    async with wire.connect(socket, "/v1/run") as connection:
        await connection.send(json.dumps({"spec": sh("sleep 1000", name="odd")}))
        await wire.until(connection, "started")
        await connection.send(message)
        done = await wire.collect(connection)
    assert done.last["error"]["code"] == "invalid_request"
    assert (await ended(client, "odd"))["state"] == "killed"


@pytest.mark.parametrize("politely", [True, False])
async def test_a_run_ends_with_its_client(socket: Path, client: httpx.AsyncClient, politely: bool) -> None:
    connection = await wire.connect(socket, "/v1/run")
    await connection.send(json.dumps({"spec": sh("sleep 1000", name="left")}))
    await wire.until(connection, "started")
    if politely:
        await connection.close()
    else:
        connection.transport.abort()
    record = await ended(client, "left")
    assert (record["state"], record["reason"]) == ("killed", "user_request")


async def test_a_client_that_leaves_behind_unread_input_is_noticed(socket: Path, client: httpx.AsyncClient) -> None:
    """The end of its stream lies behind more input than anybody will read."""
    connection = await wire.connect(socket, "/v1/run")
    spec = {"command": {"argv": ["sleep", "1000"], "stdin": True}, "name": "left"}
    await connection.send(json.dumps({"spec": spec}))
    await wire.until(connection, "started")

    async def flood() -> None:
        while True:
            await wire.stdin(connection, b"x" * 500_000)

    flooding = asyncio.create_task(flood())
    await asyncio.sleep(0.5)
    flooding.cancel()
    connection.transport.abort()
    assert (await ended(client, "left"))["state"] == "killed"


async def test_a_client_that_leaves_with_unread_output_is_noticed(socket: Path, client: httpx.AsyncClient) -> None:
    connection = await wire.connect(socket, "/v1/run")
    await connection.send(json.dumps({"spec": sh("cat /dev/zero", name="left")}))
    await wire.until(connection, "started")
    await asyncio.sleep(0.2)
    connection.transport.abort()
    assert (await ended(client, "left"))["state"] == "killed"


async def test_a_kept_run_outlives_its_client_and_keeps_its_output(socket: Path, client: httpx.AsyncClient) -> None:
    connection = await wire.connect(socket, "/v1/run")
    spec = sh("echo before; sleep 0.3; echo after", name="kept")
    await connection.send(json.dumps({"spec": spec, "keep": True}))
    await wire.until(connection, "started")
    connection.transport.abort()
    assert (await ended(client, "kept"))["state"] == "succeeded"
    log = await client.get("/v1/sandboxes/kept/logs")
    assert text_of(log.content, 1) == b"before\nafter\n"


async def test_many_clients_at_once(socket: Path) -> None:
    done = await asyncio.gather(*(wire.run(socket, sh(f"echo {number}; exit {number}")) for number in range(20)))
    assert [one.stdout for one in done] == [f"{number}\n".encode() for number in range(20)]
    assert [one.last["exit"]["code"] for one in done] == list(range(20))


async def test_exec_runs_beside_the_main_command(socket: Path, client: httpx.AsyncClient) -> None:
    await create(client, {"name": "box"})
    async with wire.connect(socket, "/v1/sandboxes/box/exec") as connection:
        await connection.send(
            json.dumps({"argv": ["sh", "-c", "cat; echo $X >&2; exit 4"], "stdin": True, "env": {"X": "y"}})
        )
        await wire.stdin(connection, b"in")
        await wire.stdin_end(connection)
        done = await wire.collect(connection)
    assert [event["event"] for event in done.events] == ["started", "exit"]
    assert (done.stdout, done.stderr, done.last["exit"]["code"]) == (b"in", b"y\n", 4)
    assert (await client.get("/v1/sandboxes/box")).json()["state"] == "running"


@pytest.mark.parametrize(
    ("name", "spec", "code"),
    [
        ("box", {"argv": ["/no/such/program"]}, "command_not_found"),
        ("box", {"argv": []}, "invalid_request"),
        ("box", {"argv": ["true"], "work_dir": "/"}, "invalid_request"),
        ("none", {"argv": ["true"]}, "sandbox_not_found"),
        ("gone", {"argv": ["true"]}, "invalid_state"),
    ],
)
async def test_a_refused_exec_is_one_error_event(
    socket: Path, client: httpx.AsyncClient, name: str, spec: dict[str, Any], code: str
) -> None:
    await create(client, {"name": "box"})
    await create(client, {"name": "gone"})
    await client.delete("/v1/sandboxes/gone")
    async with wire.connect(socket, f"/v1/sandboxes/{name}/exec") as connection:
        await connection.send(json.dumps(spec))
        done = await wire.collect(connection)
    assert [event["event"] for event in done.events] == ["error"]
    assert done.last["error"]["code"] == code


async def test_attaching_shows_what_comes_from_now_on(socket: Path, client: httpx.AsyncClient) -> None:
    await create(client, sh("echo early; while [ ! -e /tmp/go ]; do sleep 0.02; done; echo late; exit 6", name="box"))
    while b"early" not in text_of((await client.get("/v1/sandboxes/box/logs")).content, 1):
        await asyncio.sleep(0.01)
    async with wire.connect(socket, "/v1/sandboxes/box/attach") as connection:
        await connection.send("{}")
        await wire.until(connection, "started")
        async with wire.connect(socket, "/v1/sandboxes/box/exec") as other:
            await other.send(json.dumps({"argv": ["touch", "/tmp/go"]}))
            await wire.collect(other)
        done = await wire.collect(connection)
    assert done.stdout == b"late\n"
    assert done.last["exit"]["code"] == 6
    assert done.last["sandbox"]["state"] == "failed"


async def test_attaching_needs_a_main_command(socket: Path, client: httpx.AsyncClient) -> None:
    await create(client, {"name": "box"})
    async with wire.connect(socket, "/v1/sandboxes/box/attach") as connection:
        await connection.send("{}")
        done = await wire.collect(connection)
    assert done.last["error"]["code"] == "invalid_state"


async def test_a_sandbox_that_is_ended_ends_its_streams(socket: Path, client: httpx.AsyncClient) -> None:
    async with (
        wire.connect(socket, "/v1/run") as running,
        wire.connect(socket, "/v1/sandboxes/box/exec") as executing,
    ):
        await running.send(json.dumps({"spec": sh("sleep 1000", name="box")}))
        await wire.until(running, "started")
        await executing.send(json.dumps({"argv": ["sleep", "1000"]}))
        await wire.until(executing, "started")
        await client.delete("/v1/sandboxes/box")
        run, execution = await asyncio.gather(wire.collect(running), wire.collect(executing))
    assert run.last["sandbox"]["state"] == "killed"
    assert execution.last.get("error", {}).get("code") == "sandbox_lost" or execution.last["exit"]["signal"] == 9


async def test_no_such_stream(socket: Path) -> None:
    with pytest.raises(InvalidStatus):
        await wire.connect(socket, "/v1/nothing")
