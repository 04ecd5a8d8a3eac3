"""Who is calling is the kernel's word: strangers are turned away, tenants kept apart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import sys
from typing import TYPE_CHECKING

import pytest

from tartarus.control.hangups import HangupWatcher
from tartarus.control.peers import listen
from tartarus.model.errors import DaemonUnavailable

from .test_sandboxes import create

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from .conftest import Service

pytestmark = pytest.mark.anyio
NOBODY = 65534
# One request over the socket, as another user; prints status line and body.
AS_USER = """
import os, socket, sys
uid, path, request = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.setgroups([]); os.setgid(uid); os.setuid(uid)
connection = socket.socket(socket.AF_UNIX); connection.connect(path)
try:
    head = f"{request} HTTP/1.1\\r\\nhost: t\\r\\nconnection: close\\r\\ncontent-length: 0\\r\\n\\r\\n"
    connection.sendall(head.encode())
except BrokenPipeError:
    pass
answer = b""
try:
    while piece := connection.recv(65536):
        answer += piece
except ConnectionResetError:
    pass
sys.stdout.write(answer.decode())
"""


async def as_user(service: Service, uid: int, request: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AS_USER, str(uid), str(service.settings.socket), request, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


@contextlib.contextmanager
def reachable(path: Path):
    """Open the way to the socket for everybody, so that only the peer check is left."""
    changed = []
    for place in (path, *path.parents):
        mode = stat.S_IMODE(place.stat().st_mode)
        if mode & 0o7 != 0o7 and str(place) not in {"/", "/tmp"}:
            changed.append((place, mode))
            place.chmod(mode | 0o777)
    try:
        yield
    finally:
        for place, mode in changed:
            place.chmod(mode)


async def test_the_socket_is_for_its_owner_only(service: Service) -> None:
    assert stat.S_IMODE(service.settings.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(service.settings.socket.parent.stat().st_mode) == 0o700


@pytest.mark.needs("root")
async def test_a_stranger_is_told_why_and_turned_away(service: Service, client: httpx.AsyncClient) -> None:
    with reachable(service.settings.socket):
        for _ in range(20):  # the refusal races the stranger's request: told or reset, never served
            answer = await as_user(service, NOBODY, "GET /v1/version")
            assert "200 OK" not in answer
            assert '"version"' not in answer
            if answer:
                assert answer.startswith("HTTP/1.1 403 Forbidden")
                assert '"code":"permission_refused"' in answer
                assert f"uid {NOBODY}" in answer
    assert (await client.get("/v1/version")).status_code == 200


@pytest.mark.needs("root")
async def test_another_tenants_sandbox_is_not_found(service: Service, client: httpx.AsyncClient) -> None:
    made = await create(client, {"name": "mine", "labels": {"a": "b"}})
    service.listener.allowed = frozenset({0, NOBODY})
    with reachable(service.settings.socket):
        for reference in (made["id"], made["id"][:14], "mine"):
            for request in (
                f"GET /v1/sandboxes/{reference}",
                f"DELETE /v1/sandboxes/{reference}",
                f"GET /v1/sandboxes/{reference}/logs",
                f"GET /v1/sandboxes/{reference}/stats",
                f"GET /v1/sandboxes/{reference}/wait?timeout_s=0",
                f"POST /v1/sandboxes/{reference}/pause",
                f"POST /v1/sandboxes/{reference}/contexts",
                f"GET /v1/sandboxes/{reference}/files?path=/etc/passwd",
                f"PUT /v1/sandboxes/{reference}/files?path=/tmp/x",
            ):
                answer = await as_user(service, NOBODY, request)
                assert answer.startswith("HTTP/1.1 404"), (request, answer)
                assert '"code":"sandbox_not_found"' in answer
        assert '"items":[]' in await as_user(service, NOBODY, "GET /v1/sandboxes?label=a=b")
        assert (await as_user(service, NOBODY, "POST /v1/shutdown")).startswith("HTTP/1.1 403")
    assert (await client.get("/v1/sandboxes/mine")).json()["state"] == "running"


async def test_a_listener_replaces_what_a_dead_daemon_left(tmp_path: Path) -> None:
    path = tmp_path / "run" / "t.sock"
    listen(path, frozenset({os.geteuid()})).close()
    assert path.exists()
    with listen(path, frozenset({os.geteuid()})), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


async def test_a_listener_does_not_delete_what_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    path.write_text("precious")
    with pytest.raises(DaemonUnavailable, match="in the way"):
        listen(path, frozenset())
    assert path.read_text() == "precious"


async def test_a_hangup_is_noticed_behind_unread_bytes() -> None:
    watcher = HangupWatcher()
    ours, theirs = socket.socketpair()
    gone = asyncio.Event()
    with ours, watcher.watching(ours.fileno(), gone.set):
        theirs.send(b"never read")
        await asyncio.sleep(0.01)
        assert not gone.is_set()
        theirs.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.01)
        assert not gone.is_set()  # half-closed: it may still be listening
        theirs.close()
        await gone.wait()
    watcher.close()


async def test_a_hangup_before_the_watch_is_noticed_too() -> None:
    watcher = HangupWatcher()
    ours, theirs = socket.socketpair()
    theirs.close()
    gone = asyncio.Event()
    number = ours.fileno()
    with ours, watcher.watching(number, gone.set):
        await gone.wait()
    gone.clear()
    with watcher.watching(number, gone.set):  # our own end is closed by now
        await gone.wait()
    watcher.close()


async def test_a_watch_that_is_over_says_nothing_and_the_number_can_be_used_again() -> None:
    watcher = HangupWatcher()
    called: list[str] = []
    ours, theirs = socket.socketpair()
    with watcher.watching(ours.fileno(), lambda: called.append("first")):
        pass
    with watcher.watching(ours.fileno(), lambda: called.append("second")):
        theirs.close()
        while not called:
            await asyncio.sleep(0)
    assert called == ["second"]
    ours.close()
    watcher.close()


async def test_a_client_that_stops_waiting_leaves_no_trace(
    service: Service, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    made = await create(client, {})
    _, writer = await asyncio.open_unix_connection(str(service.settings.socket))
    writer.write(f"GET /v1/sandboxes/{made['id']}/wait HTTP/1.1\r\nhost: t\r\n\r\n".encode())
    await asyncio.sleep(0.1)
    writer.transport.abort()
    await asyncio.sleep(0.1)
    assert (await client.get(f"/v1/sandboxes/{made['id']}")).json()["state"] == "running"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
