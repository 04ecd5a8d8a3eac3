"""kill -9 of the daemon between a sandbox's start and its record's commit: nothing of it stays, not even a word."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.wasm.modules import LOOP

from tartarus.model.errors import TartarusError
from tartarus.sdk import Sandbox

from .place import LEVELS, Place, argv_of, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")


def ticks_of(pid: int) -> int:
    """Processor time that a process has used, in the kernel's ticks."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
    except OSError:
        return 0


def test_sandboxes_that_run_before_they_are_written_down_end_with_the_daemon(home: Place) -> None:
    home.start()
    creations: list[Callable[[], Sandbox]] = [
        lambda: home.create("sleep", "600", level=LEVELS[0]),
        lambda: home.create("sleep", "600", level=LEVELS[1]),
        lambda: Sandbox.create(command=["spin"], module=LOOP, client=home.client),
    ]
    for create in creations:  # what is made once, is made
        create().kill()
    before, began = home.recorded(), {pid: ticks_of(pid) for pid in home.processes()}
    answers: list[Sandbox] = []

    def creating(create: Callable[[], Sandbox]) -> None:
        with contextlib.suppress(TartarusError):
            answers.append(create())

    creators = [threading.Thread(target=creating, args=[create]) for create in creations]
    with contextlib.closing(sqlite3.connect(home.home / "state.db", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        for creator in creators:
            creator.start()
        wait_until(lambda: [*map(argv_of, home.processes())].count(["sleep", "600"]) == 2, "two of them run")
        # The third in a sandbox that was made ahead.
        wait_until(lambda: any(ticks_of(pid) > began.get(pid, 0) + 10 for pid in home.processes()), "the third runs")
        home.end_daemon(signal.SIGKILL)
        database.execute("ROLLBACK")
    for creator in creators:
        creator.join()
    assert not answers
    wait_until(lambda: not home.processes(), f"processes went on: {home.processes()}")
    home.restart()
    assert set(home.recorded().values()) == {"killed"}
    assert home.recorded().items() >= before.items()
    assert len(home.recorded()) == len(before) + len(LEVELS)  # those of the restart's own look
