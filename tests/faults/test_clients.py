"""Clients that do not read, leave in the middle, or say nothing, and deadlines when there is much to do."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from tartarus.sdk import Sandbox

from .place import LEVELS, PATIENCE_S, Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("level", LEVELS)
def test_a_client_that_never_reads_costs_little_and_meets_its_deadline(up: Place, level: str) -> None:
    assert up.daemon is not None
    up.works([level])
    before = resident_bytes(up.daemon.pid)
    deaf = [up.cli("run", "--isolation", level, "--timeout", "2s", "--name", f"d{n}", "--", "yes") for n in range(4)]
    wait_until(lambda: len(up.recorded()) == 5, "they run")
    most = 0
    while not all(state in {"timed_out", "succeeded", "killed"} for state in up.recorded().values()):
        most = max(most, resident_bytes(up.daemon.pid) - before)
        time.sleep(0.02)
    # Windows, socket buffers and queues of four streams; without bounds it would be hundreds a second.
    assert most < 64 * 1024**2
    for n in range(4):
        assert up.end_of(Sandbox.connect(f"d{n}", client=up.client)) == ("timed_out", "timeout")
    for client in deaf:
        client.kill()
        client.communicate()


@pytest.mark.parametrize("level", LEVELS)
def test_a_stopped_client_is_no_burden(up: Place, level: str) -> None:
    stopped = up.cli("run", "--isolation", level, "--name", "slow", "--", "yes")
    assert stopped.stdout.read(2) == b"y\n"
    os.kill(stopped.pid, signal.SIGSTOP)
    up_and_running = up.cli("run", "--isolation", level, "--", "echo", "quick")
    assert up_and_running.communicate(timeout=PATIENCE_S)[0] == b"quick\n"
    stopped.kill()
    stopped.communicate()
    assert up.end_of(Sandbox.connect("slow", client=up.client)) == ("killed", "user_request")


def test_clients_that_say_nothing_or_nonsense(up: Place) -> None:
    silent = []
    for said in (
        b"",
        b"GET ",
        b"\x16\x03\x01" * 100,
        b"POST /v1/sandboxes HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b"\0" * 70000,
    ):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(up.socket))
        connection.sendall(said)
        silent.append(connection)
    up.works()
    for connection in silent:
        connection.close()
    up.works()


def test_two_hundred_deadlines_are_met_in_order_and_none_is_missed(up: Place) -> None:
    # In an order that has nothing to do with when they were made, and far enough apart to be told from noise.
    limits = [5.0 + 0.03 * (index * 77 % 200) for index in range(200)]
    sandboxes = [
        up.create("sleep", "600", level=LEVELS[index % 2], timeout_s=limit, name=f"n{index}", memory="64MiB")
        for index, limit in enumerate(limits)
    ]
    for sandbox in sandboxes:
        assert up.end_of(sandbox) == ("timed_out", "timeout")
    records = [sandbox.info for sandbox in sandboxes]
    due = {record.id: (record.started_at or 0.0) + (record.spec.timeout_s or 0.0) for record in records}
    assert all(record.ended_at >= due[record.id] - 0.01 for record in records if record.ended_at)
    by_end = sorted(records, key=lambda record: record.ended_at or 0.0)
    # Whoever ended later was not due half a second earlier.
    latest = 0.0
    for record in by_end:
        assert due[record.id] > latest - 0.5
        latest = max(latest, due[record.id])


HOSTILE = """
import os, signal, sys, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
deadline = time.monotonic() + 600
def breed(depth):
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork(): os._exit(0)
            if depth: breed(depth - 1)
            while time.monotonic() < deadline:
                time.sleep(0.01)
                if os.fork() == 0: os._exit(0)
                try: os.waitpid(-1, os.WNOHANG)
                except OSError: pass
breed(1)
print("bred", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("end", ["kill", "deadline", "main command", "agent"])
def test_whatever_forks_ignores_and_hides_ends_with_its_sandbox(up: Place, level: str, end: str) -> None:
    limit = {"timeout_s": 1.5} if end == "deadline" else {}
    sandbox = up.create("python3", "-c", HOSTILE, level=level, pids=200, **limit)
    if end != "deadline":
        wait_until(lambda: any(entry.data for entry in sandbox.logs()), "it has bred")
    if end == "kill":
        sandbox.kill()
    elif end == "main command":
        sandbox.signal(signal.SIGKILL)
    elif end == "agent":
        os.kill(up.one("agent", sandbox), signal.SIGKILL)
    state = up.end_of(sandbox)[0]
    assert state == {"kill": "killed", "deadline": "timed_out", "main command": "failed", "agent": "lost"}[end]
    # The record says so only once nothing is left.
    assert up.inside(sandbox) == []
    assert [pid for pid in up.processes() if pid not in up.parked()] == []


DEEP = "import os\nfor _ in range(3000):\n os.mkdir('d'); os.chdir('d'); open('f', 'w').close()\nos.chmod('.', 0)\n"


@pytest.mark.parametrize("level", LEVELS)
def test_directories_nested_without_end_are_removed(up: Place, level: str) -> None:
    assert up.end_of(up.create("python3", "-c", DEEP, level=level, pids=50)) == ("succeeded", "completed")
    up.settle()


def test_directories_nested_without_end_do_not_keep_the_next_daemon_from_starting(home: Place) -> None:
    home.start()
    sandbox = home.create("python3", "-c", DEEP + "import time; print(1, flush=True); time.sleep(600)", level="process")
    wait_until(lambda: any(entry.data for entry in sandbox.logs()), "it has dug")
    home.end_daemon(signal.SIGKILL)
    home.restart()
