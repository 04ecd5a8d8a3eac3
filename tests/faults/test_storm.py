"""Everything at once, by seed: clients do all that clients do while all kinds of processes are killed at random."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time

import pytest

from tartarus.model.errors import TartarusError
from tartarus.sdk import Sandbox

from .place import LEVELS, Place, kind_of

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")

LASTS_S = 1.5
COMMANDS = (
    ["true"],
    ["sleep", "600"],
    ["sh", "-c", "while :; do echo noise; done"],
    ["sh", "-c", "trap '' TERM; setsid sleep 600 & setsid sleep 600 & exec sleep 600"],
    ["python3", "-c", "import os\nwhile os.fork(): os.waitpid(-1, 0)"],
    ["python3", "-c", "import time; time.sleep(600)"],
)
ACTS = ("create", "create", "run", "pause", "resume", "kill", "exec", "write", "read", "logs", "list", "wait")


class Player:
    """A client that does something else each moment, whatever becomes of it."""

    def __init__(self, home: Place, seed: str, number: int) -> None:
        self.home = home
        self.chance = random.Random(f"{seed}-{number}")
        self.number = number
        self.mine: list[Sandbox] = []

    def play(self, until: float) -> None:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            with contextlib.suppress(TartarusError, OSError):
                self.act(self.chance.choice(ACTS), turn)

    def act(self, what: str, turn: int) -> None:
        chance = self.chance
        level = chance.choice(LEVELS)
        if what == "create" or not self.mine:
            command = chance.choice(COMMANDS) if chance.random() < 0.7 else []
            limit = chance.choice([None, 0.3, 1.0])
            self.mine.append(self.home.create(*command, level=level, timeout_s=limit, name=f"s{self.number}-{turn}"))
            return
        sandbox = chance.choice(self.mine)
        if what == "run":
            # As `tartarus run` does, but without starting a daemon that the test has just killed.
            request = {"spec": {"isolation": level, "command": {"argv": chance.choice(COMMANDS)}}}
            with contextlib.closing(self.home.client.transport.open("/v1/run", json.dumps(request).encode())) as stream:
                stream.flush()
                time.sleep(chance.uniform(0.0, 0.2))
        elif what == "pause":
            sandbox.pause()
        elif what == "resume":
            sandbox.resume()
        elif what == "kill":
            sandbox.kill()
        elif what == "exec":
            with sandbox.start(["sh", "-c", "setsid sleep 600 & echo on; sleep 600"], timeout_s=0.5) as process:
                next(iter(process))
        elif what == "write":
            sandbox.files.write("/tmp/file", b"x" * chance.randrange(1 << 20))
        elif what == "read":
            sandbox.files.read("/tmp/file")
        elif what == "logs":
            next(sandbox.logs(), None)
        elif what == "list":
            Sandbox.list(client=self.home.client)
        elif what == "wait":
            sandbox.wait(0.1)


def reap(home: Place, chance: random.Random, until: float, kinds: set[str]) -> None:
    """Kill or stop processes of these kinds, at random, until the time is over."""
    while time.monotonic() < until:
        time.sleep(chance.uniform(0.0, 0.15))
        targets = [pid for pid in home.processes() if kind_of(pid) in kinds]
        if targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(targets), chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))


@pytest.mark.parametrize(
    ("seed", "kinds", "last"),
    [
        ("a", {"agent", "runner", "guest"}, signal.SIGTERM),
        ("b", {"agent", "runner", "guest"}, signal.SIGKILL),
        ("c", {"nursery", "zygote"}, signal.SIGTERM),
        ("d", {"nursery", "zygote"}, signal.SIGKILL),
        ("e", {"nursery", "zygote", "agent", "runner", "guest"}, signal.SIGTERM),
        ("f", {"nursery", "zygote", "agent", "runner", "guest"}, signal.SIGKILL),
        ("g", set(), signal.SIGTERM),
        ("h", set(), signal.SIGKILL),
    ],
)
def test_nothing_is_left_after(home: Place, seed: str, kinds: set[str], last: int) -> None:
    home.start()
    until = time.monotonic() + LASTS_S
    players = [Player(home, seed, number) for number in range(3)]
    threads = [threading.Thread(target=player.play, args=[until]) for player in players]
    threads.append(threading.Thread(target=reap, args=[home, random.Random(seed), until, kinds]))
    for thread in threads:
        thread.start()
    time.sleep(LASTS_S * (0.7 if last == signal.SIGKILL else 1.0))
    status = home.end_daemon(last)
    for thread in threads:
        thread.join()
    if last == signal.SIGTERM:
        assert status == 0
        assert home.leftovers() == {}
        assert home.parent_groups() == []
    assert [line for line in home.said().splitlines() if "Traceback" in line] == []
    home.restart()
    assert len(home.recorded()) > 2
