"""Finding and starting the daemon: one for many clients, a clear word when it can't, another version refused."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

from tartarus import __version__
from tartarus.model.errors import DaemonUnavailable, PermissionRefused, VersionMismatch
from tartarus.sdk import AsyncClient, Client
from tartarus.sdk.daemon import log_tail, start_daemon, stop, try_connect
from tartarus.sdk.places import Places


@pytest.fixture
def places() -> Iterator[Places]:
    directory = tempfile.mkdtemp(prefix="tt-")
    found = Places.at(directory)
    yield found
    stop(found, 60)
    shutil.rmtree(directory)


@contextlib.contextmanager
def pretender(places: Places, answer: bytes) -> Iterator[list[bytes]]:
    """Something at the daemon's socket that gives one answer to whatever it is asked."""
    os.makedirs(os.path.dirname(places.socket))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(places.socket)
    listener.listen()
    asked: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    asked.append(connection.recv(65536))
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield asked
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(30)
    os.unlink(places.socket)


def response(body: bytes, status: str = "200 OK", version: str = __version__) -> bytes:
    head = f"HTTP/1.1 {status}\r\ntartarus-version: {version}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def in_a_loop(function: Callable[[], Awaitable[object]]) -> object:
    """Run it in a thread of its own: the async tests' plugin may keep its loop between tests."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(anyio.run, function).result()


def test_ten_clients_at_once_start_one(places):
    script = "from tartarus.sdk import Client; import sys; print(Client(sys.argv[1]).version().pid)"
    clients = [
        subprocess.Popen([sys.executable, "-c", script, places.state_dir], stdout=subprocess.PIPE) for _ in range(10)
    ]
    pids = {client.communicate(timeout=120)[0] for client in clients}
    assert [client.returncode for client in clients] == [0] * 10
    assert len(pids) == 1


def test_a_client_that_must_not_start_one(places):
    with pytest.raises(DaemonUnavailable, match="not running"):
        Client(places.state_dir, start=False).version()
    assert not os.path.exists(places.socket)


def test_a_daemon_that_was_killed_is_replaced(places):
    client = Client(places.state_dir)
    first = client.version().pid
    handle = os.pidfd_open(first)
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    assert poller.poll(30_000)
    assert client.version().pid != first
    os.close(handle)


def test_stopping(places):
    assert not stop(places, 60)
    assert start_daemon(places)
    assert not start_daemon(places)
    assert stop(places, 60)
    assert try_connect(places) is None


def test_a_state_directory_that_can_not_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DaemonUnavailable, match="can't be used"):
        Client(str(tmp_path / "file/below")).version()


def test_what_kept_it_from_starting_is_said(places):
    os.makedirs(places.socket)  # a directory where its socket should be
    with pytest.raises(DaemonUnavailable, match=r"did not start: .* (is in the way|can't listen)"):
        start_daemon(places)
    os.rmdir(places.socket)


def test_the_end_of_the_log(places):
    os.makedirs(places.state_dir, exist_ok=True)
    assert log_tail(places) == ""
    with open(places.log_file, "w", encoding="utf-8") as log:
        log.write('{"event": "one"}\n{"event": "two"}\nnot json\n{"event": "four"}\n')
    assert log_tail(places) == "two | not json | four"


def test_another_version_is_refused_and_can_be_stopped(places):
    with pretender(places, response(b'{"version": "0.0.1", "api": 1, "pid": 1, "started_at": 0}', version="0.0.1")):
        with pytest.raises(VersionMismatch, match=rf"0\.0\.1 and this client is {__version__}.*tartarus down"):
            Client(places.state_dir).templates()
        with pytest.raises(VersionMismatch):
            in_a_loop(AsyncClient(places.state_dir).templates)
        assert Client(places.state_dir, any_version=True).version().version == "0.0.1"


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", response(b"[]"), response(b"{}"), response(b"\xff\xfe"),
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n", response(b"oops", "500 Internal Server Error"),
    ],
)  # fmt: skip
def test_a_stranger_at_the_socket(places, answer):
    with pretender(places, answer):
        with pytest.raises(DaemonUnavailable):
            Client(places.state_dir).version()
        with pytest.raises(DaemonUnavailable):
            Client(places.state_dir, any_version=True).version()
        with pytest.raises(DaemonUnavailable):
            in_a_loop(AsyncClient(places.state_dir).version)


def test_a_refusal_at_the_door_keeps_its_words(places):
    problem = b'{"code": "permission_refused", "detail": "uid 7 may not use this daemon", "why": "w", "fix": "f"}'
    answer = response(problem, "403 Forbidden")
    with pretender(places, answer), pytest.raises(PermissionRefused, match="uid 7 may not"):
        Client(places.state_dir).version()
