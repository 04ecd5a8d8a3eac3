"""Stopping on purpose: SIGTERM, SIGINT, `tartarus down`, with everything alive, beginning, paused or unread."""

from __future__ import annotations

import signal
import subprocess
import threading
import time

import pytest

from tartarus.model.errors import TartarusError

from .place import LEVELS, PATIENCE_S, Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")


def done(client: subprocess.Popen[bytes]) -> None:
    """Wait for a command that must succeed."""
    _, err = client.communicate(timeout=PATIENCE_S * 2)
    assert client.returncode == 0, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_live_sandboxes_end_as_drained(home: Place, number: int) -> None:
    home.start()
    sandboxes = []
    for level in LEVELS:
        sandboxes += [
            home.create(level=level),
            home.create("sh", "-c", "trap '' TERM INT HUP; while :; do echo on; done", level=level),
            home.create("sh", "-c", "setsid sleep 600 & setsid sleep 600 & sleep 600", level=level),
            home.create("sleep", "600", level=level, name=f"paused-{level}"),
        ]
        sandboxes[-1].pause()
    client = home.cli("run", "--", "sh", "-c", "echo begun; sleep 600")
    assert client.stdout.readline() == b"begun\n"
    assert home.end_daemon(number) == 0
    assert home.leftovers() == {}
    assert home.parent_groups() == []
    assert not home.socket.exists()
    assert not (home.home / "daemon.pid").exists()
    _, err = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 125
    assert b"the daemon stopped" in err
    home.restart()
    assert {home.end_of(sandbox) for sandbox in sandboxes} == {("killed", "node_drain")}


@pytest.mark.parametrize("seed", range(3))
def test_sandboxes_that_begin_meanwhile(home: Place, seed: int) -> None:
    home.start()

    def create(level: str) -> None:
        try:
            while True:
                home.create("python3", "-c", "import time; time.sleep(600)", level=level)
        except (TartarusError, OSError):
            return

    makers = [threading.Thread(target=create, args=[level]) for level in LEVELS * 2]
    for maker in makers:
        maker.start()
    time.sleep(0.05 + seed * 0.3)
    assert home.end_daemon(signal.SIGTERM) == 0
    for maker in makers:
        maker.join()
    assert home.leftovers() == {}
    assert home.parent_groups() == []
    assert set(home.recorded().values()) <= {"killed", "failed"}
    home.restart()


def test_a_template_is_being_prepared(home: Place) -> None:
    """A long installation is not waited for; what it had is not kept."""
    home.start()
    client = home.cli("run", "--template", "python-ds", "--", "true")
    wait_until(lambda: list(home.home.glob("cache/templates/.making-*")), "the preparation began")
    time.time()
    assert home.end_daemon(signal.SIGTERM) == 0
    client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 125
    home.settle()


def test_a_client_that_never_reads(home: Place) -> None:
    home.start()
    deaf = [home.cli("run", "--isolation", level, "--", "yes") for level in LEVELS]
    wait_until(lambda: list(home.recorded().values()) == ["running"] * 2, "both run")
    assert home.end_daemon(signal.SIGTERM) == 0
    assert home.leftovers() == {}
    for client in deaf:
        client.kill()
        client.communicate()


def test_down_and_up_again_and_again(home: Place) -> None:
    for _ in range(3):
        done(home.cli("up"))
        sandbox = home.create("sleep", "600", name="same")
        done(home.cli("down"))
        wait_until(lambda: not home.processes(daemons=True), "it is gone")
        assert home.leftovers() == {}
        assert home.recorded()[sandbox.id] == "killed"


def test_a_second_signal_does_no_harm(home: Place) -> None:
    daemon = home.start()
    home.create("sleep", "600")
    for _ in range(5):
        daemon.send_signal(signal.SIGTERM)
        daemon.send_signal(signal.SIGINT)
    assert daemon.wait(PATIENCE_S) == 0
    assert home.leftovers() == {}
