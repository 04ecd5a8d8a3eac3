"""kill -9 of what machines depend on: daemon, nursery, monitor; and machines that end themselves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from tests.node.images import guest_images

from tartarus.model.errors import TartarusError
from tartarus.sdk import Sandbox

from .place import Place, place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock", "microvm")
LEVEL = "microvm"


@pytest.fixture(scope="module")
def machines() -> Iterator[Place]:
    """One place for all, since a machine's first boot takes seconds."""
    with place() as made, guest_images(made.home):
        yield made


@pytest.fixture
def up(machines: Place) -> Iterator[Place]:
    """It, with a daemon, which is stopped at the end and must then have left nothing."""
    machines.start()
    yield machines
    assert machines.daemon is not None
    if machines.daemon.poll() is None:
        assert machines.end_daemon(signal.SIGTERM) == 0
    machines.settle()


def works(home: Place) -> None:
    with home.create(level=LEVEL, name="phoenix") as fresh:
        assert fresh.run(["echo", "risen"]).stdout == "risen\n"


def test_machines_end_with_the_daemon(up: Place) -> None:
    idle = up.create(level=LEVEL, name="idle")
    busy = up.create("sh", "-c", "while :; do echo noise; done", level=LEVEL, name="busy")
    paused = up.create("sleep", "600", level=LEVEL, name="paused")
    paused.pause()
    up.end_daemon(signal.SIGKILL)
    # Without any help from a next daemon:
    wait_until(lambda: not up.processes(), f"processes went on: {up.processes()}")
    up.start()
    up.settle()
    assert {up.end_of(sandbox) for sandbox in (idle, busy, paused)} == {("lost", "lost")}
    works(up)


def test_killed_while_the_first_machine_boots(up: Place) -> None:
    def odd_size() -> None:
        with pytest.raises((TartarusError, OSError)):
            up.create(level=LEVEL, memory="200MiB")

    import threading

    maker = threading.Thread(target=odd_size)
    maker.start()
    wait_until(lambda: any("booting-" in group for group in up.groups()), "it boots")
    up.end_daemon(signal.SIGKILL)
    maker.join()
    wait_until(lambda: not up.processes(), f"processes went on: {up.processes()}")
    up.start()
    up.settle()
    works(up)


def test_a_killed_nursery_takes_its_machines_and_is_replaced(up: Place) -> None:
    sandbox = up.create("sleep", "600", level=LEVEL)
    monitor = up.one("monitor", sandbox)
    with open(f"/proc/{monitor}/stat", encoding="utf-8") as stat:
        nursery = int(stat.read().rpartition(")")[2].split()[1])
    os.kill(nursery, signal.SIGKILL)
    assert up.end_of(sandbox) == ("lost", "lost")
    works(up)


def test_a_killed_monitor_ends_its_sandbox_and_no_other(up: Place) -> None:
    victim, other = (up.create("sleep", "600", level=LEVEL) for _ in range(2))
    os.kill(up.one("monitor", victim), signal.SIGKILL)
    assert up.end_of(victim) == ("lost", "lost")
    assert other.run(["echo", "alive"]).stdout == "alive\n"
    other.kill()


@pytest.mark.parametrize("how", ["echo b > /proc/sysrq-trigger", "echo c > /proc/sysrq-trigger", "kill -9 1; exit 3"])
def test_a_machine_that_ends_itself_is_told(up: Place, how: str) -> None:
    sandbox: Sandbox = up.create("sh", "-c", f"{how}; sleep 600" if "exit" not in how else how, level=LEVEL)
    expected = ("failed", "completed") if "exit" in how else ("lost", "lost")
    assert up.end_of(sandbox) == expected
    works(up)
