"""The daemon as a process: one per directory, ready when its starter returns, gone when told."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tartarus.control.instance import read_pid
from tartarus.model.settings import Settings

from .conftest import state_directory

if TYPE_CHECKING:
    from collections.abc import Iterator


def start(settings: Settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(settings), capture_output=True, text=True, check=False)


def command(settings: Settings) -> list[str]:
    where = ["--state-dir", str(settings.state_dir), "--socket", str(settings.socket)]
    return [sys.executable, "-m", "tartarus.control.daemon", *where]


def pid_of(settings: Settings) -> int:
    pid = read_pid(settings.pid_file)
    assert pid is not None
    return pid


def wait_until_gone(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        with os.fdopen(descriptor):
            assert select.select([descriptor], [], [], 30)[0], f"process {pid} is still there"


def client(settings: Settings) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(settings.socket)), base_url="http://t", timeout=60)


def log_of(settings: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in settings.log_file.read_text().splitlines()]


@pytest.fixture
def settings() -> Iterator[Settings]:
    with state_directory() as home:
        settings = Settings.at(home)
        yield settings
        pid = read_pid(settings.pid_file)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            wait_until_gone(pid)


def test_it_serves_when_its_starter_returns_and_stops_when_told(settings: Settings) -> None:
    done = start(settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = pid_of(settings)
    with client(settings) as api:
        answer = api.get("/v1/version")
        assert answer.json()["pid"] == pid
        assert answer.headers["tartarus-version"] == answer.json()["version"]
        made = api.post("/v1/sandboxes", json={"command": {"argv": ["sleep", "1000"]}}).json()
    assert os.getsid(pid) == os.getpgid(pid) != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(pid)
    assert not settings.socket.exists()
    assert not settings.pid_file.exists()
    assert [entry["event"] for entry in log_of(settings) if entry["logger"] == "tartarus.daemon"] == [
        "serving", "stopping", "stopped",
    ]  # fmt: skip
    with contextlib.closing(sqlite3.connect(settings.database)) as database:
        assert database.execute("SELECT id, state, reason FROM sandboxes").fetchall() == [
            (made["id"], "killed", "node_drain")
        ]


def test_what_it_keeps_is_private(settings: Settings) -> None:
    start(settings)
    for file in (settings.database, settings.log_file, settings.socket, settings.lock_file):
        assert file.stat().st_mode & 0o077 == 0, file


def test_ten_starts_at_once_give_one_daemon(settings: Settings) -> None:
    starters = [subprocess.Popen(command(settings), stderr=subprocess.PIPE, text=True) for _ in range(10)]
    for starter in starters:
        _, said = starter.communicate()
        assert starter.returncode == 0, said
    with client(settings) as api:
        assert api.get("/v1/version").json()["pid"] == pid_of(settings)
    assert sum(entry["event"] == "serving" for entry in log_of(settings)) == 1


def test_a_successor_takes_over_from_one_that_is_stopping(settings: Settings) -> None:
    start(settings)
    first = pid_of(settings)
    with client(settings) as api:
        assert api.post("/v1/shutdown").status_code == 202
    assert start(settings).returncode == 0
    wait_until_gone(first)
    with client(settings) as api:
        assert api.get("/v1/version").json()["pid"] not in (None, first)


def test_after_a_killed_daemon_the_next_one_tells_what_was_lost(settings: Settings) -> None:
    start(settings)
    first = pid_of(settings)
    with client(settings) as api:
        made = api.post("/v1/sandboxes", json={"command": {"argv": ["sleep", "1000"]}, "name": "box"}).json()
    os.kill(first, signal.SIGKILL)
    wait_until_gone(first)
    assert settings.socket.exists()
    assert start(settings).returncode == 0
    with client(settings) as api:
        record = api.get("/v1/sandboxes/box").json()
        assert (record["id"], record["state"], record["reason"]) == (made["id"], "lost", "lost")
        assert api.post("/v1/sandboxes", json={"name": "box"}).status_code == 201


def test_a_daemon_that_cannot_start_says_why_in_one_line(settings: Settings) -> None:
    start(settings)
    pid = pid_of(settings)
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(pid)
    with contextlib.closing(sqlite3.connect(settings.database)) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    done = start(settings)
    assert done.returncode == 125
    assert done.stderr.count("\n") == 1
    assert "9999" in done.stderr
    assert "[version_mismatch]" in done.stderr
    assert not settings.socket.exists()


def test_a_state_directory_that_cannot_be_used(settings: Settings) -> None:
    (settings.state_dir / "file").write_text("")
    done = start(Settings.at(settings.state_dir / "file" / "home"))
    assert (done.returncode, done.stdout) == (125, "")
    assert "can't be used" in done.stderr
    assert "[daemon_unavailable]" in done.stderr


def test_in_the_foreground_it_logs_to_standard_error(settings: Settings) -> None:
    with subprocess.Popen([*command(settings), "--foreground"], stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        serving = json.loads(daemon.stderr.readline())
        assert serving["event"] == "serving"
        assert read_pid(settings.pid_file) == daemon.pid
        daemon.send_signal(signal.SIGINT)
        rest = [json.loads(line)["event"] for line in daemon.stderr]
    assert daemon.returncode == 0
    assert rest == ["stopping", "stopped"]
    assert not settings.log_file.exists()
