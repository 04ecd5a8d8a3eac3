"""kill -9 of the daemon: its sandboxes end with it, and the next start finds and removes the rest."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tartarus.model.errors import TartarusError
from tartarus.sdk import Sandbox

from .place import LEVELS, PATIENCE_S, Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")

ORPHANS = "import os, time\nfor _ in range(3):\n if os.fork() == 0:\n  os.setsid()\n  if os.fork(): os._exit(0)\n  break\ntime.sleep(600)"


@pytest.mark.parametrize("level", LEVELS)
def test_everything_that_runs_ends_with_the_daemon(home: Place, level: str) -> None:
    home.start()
    bare = home.create(level=level, name="bare")
    busy = home.create("sh", "-c", "trap '' TERM HUP INT; while :; do echo noise; done", level=level, name="busy")
    orphans = home.create("python3", "-c", ORPHANS, level=level, name="orphans")
    executing = bare.start(["sleep", "600"])
    wait_until(lambda: len(home.inside(orphans)) >= 5, "the orphans run")
    home.end_daemon(signal.SIGKILL)
    # Without any help from a next daemon:
    wait_until(lambda: not home.processes(), f"processes went on: {home.processes()}")
    executing.close()
    home.restart()
    assert {home.end_of(sandbox) for sandbox in (bare, busy, orphans)} == {("lost", "lost")}
    for name in ("bare", "busy", "orphans"):
        home.create(level=level, name=name).kill()


@pytest.mark.parametrize("level", LEVELS)
def test_a_paused_sandbox_does_not_survive_the_next_start(home: Place, level: str) -> None:
    home.start()
    sandboxes = [home.create("sleep", "600", level=level, name=f"paused-{index}") for index in range(3)]
    for sandbox in sandboxes:
        sandbox.pause()
    home.end_daemon(signal.SIGKILL)
    home.restart()
    assert [home.end_of(sandbox) for sandbox in sandboxes] == [("lost", "lost")] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_stopped_processes_do_not_survive_the_next_start(home: Place, level: str) -> None:
    home.start()
    sandbox = home.create("sleep", "600", level=level)
    warm = home.create("python3", "-c", "import time; time.sleep(600)", level=level)
    victims = [*home.inside(sandbox), *home.inside(warm), *home.parked()]
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    home.end_daemon(signal.SIGKILL)
    home.restart()
    assert home.end_of(sandbox) == home.end_of(warm) == ("lost", "lost")


def test_a_file_half_written_leaves_nothing(home: Place) -> None:
    home.start()
    sandboxes = [home.create(level=level) for level in LEVELS]
    begun = threading.Barrier(len(sandboxes) + 1, timeout=PATIENCE_S)

    def endless() -> Iterator[bytes]:
        yield b"x" * 65536
        begun.wait()
        while True:
            yield b"y" * 65536

    def write(sandbox: Sandbox) -> None:
        place = sandbox.run(["pwd"]).stdout.strip()
        with pytest.raises((TartarusError, OSError)):
            sandbox.files.write(f"{place}/half", endless())

    writers = [threading.Thread(target=write, args=[sandbox]) for sandbox in sandboxes]
    for writer in writers:
        writer.start()
    begun.wait()
    home.end_daemon(signal.SIGKILL)
    for writer in writers:
        writer.join()
    home.restart()


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_of_starting_sandboxes(home: Place, seed: int) -> None:
    chance = random.Random(seed)
    home.start()
    if seed % 2:
        home.works()  # with everything warm, launches are short and many
    stop = threading.Event()

    def create(level: str, name: str) -> None:
        for number in range(1000):
            if stop.is_set():
                return
            try:
                home.create("python3", "-c", "import time; time.sleep(600)", level=level, name=f"{name}-{number}")
            except TartarusError:
                return

    makers = [threading.Thread(target=create, args=[level, f"{level}-{n}"]) for level in LEVELS for n in range(2)]
    for maker in makers:
        maker.start()
    time.sleep(chance.uniform(0.0, 0.5))
    home.end_daemon(signal.SIGKILL)
    stop.set()
    for maker in makers:
        maker.join()
    home.restart()
    assert set(home.recorded().values()) <= {"lost", "failed", "killed"}


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_it_starts(home: Place, seed: int) -> None:
    home.start()
    home.create("sleep", "600")
    home.create("sleep", "600", level="process").pause()
    home.end_daemon(signal.SIGKILL)
    chance = random.Random(seed)
    for _ in range(3):
        home.start(serving=False)
        time.sleep(chance.uniform(0.0, 1.2))
        home.end_daemon(signal.SIGKILL)
    home.restart()
    assert sorted(home.recorded().values())[:2] == ["killed", "killed"]
