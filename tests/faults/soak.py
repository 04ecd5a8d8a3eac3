"""The soak: all that clients do, at every level, at random, while helpers and the daemon itself are killed.

`python -m tests.faults.soak --minutes 10 --seed 7` prints what it does. A sandbox's command counts; its log must show
every number once, in order, whatever was done to it: paused, saved, woken, copied, orphaned. At the end each sandbox
ends when it is told to, and nothing of any is left: no process, cgroup, mount, file, namespace or descriptor.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.node.images import guest_images

from tartarus.model.errors import TartarusError
from tartarus.model.states import TERMINAL, State
from tartarus.sdk import Sandbox

from .place import Place, kind_of, place

LEVELS = ("container", "process", "gvisor", "microvm")
COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"
ACTS = (
    "create", "create", "exec", "exec", "exec", "write", "read", "pause", "resume", "hibernate", "wake", "fork", "stats",
    "log", "stop", "kill", "kill",
)  # fmt: skip
MOST_EACH = 6
"""Live sandboxes of each player: a machine takes memory and, without hardware virtualisation, a processor."""
UNEXPECTED = "internal"
STUCK_S = 100.0
"""Longer than any limit inside: saving a guest is given up after 60 s."""


class Soak:
    """One run. `say` gets a line for everything that is done."""

    def __init__(
        self, home: Place, seed: int, levels: Sequence[str], say: Callable[[str], object], calm: float = 1.0
    ) -> None:
        self.home = home
        # What copies of containers were made of goes with age; places for memory that hold none.
        home.keeps = re.compile(r"(cache/tenants(/.*)?|memory(/[^/]+)?|snapshot-keys(/.*)?)$")
        self.seed = seed
        self.levels = tuple(levels)
        self.say = say
        self.calm = calm
        self.began = time.monotonic()
        self.done: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.broken: list[str] = []
        self._lock = threading.Lock()

    def note(self, who: str, what: str) -> None:
        """Say it, with the time since the beginning."""
        self.say(f"{time.monotonic() - self.began:8.3f} {who:8} {what}")

    def break_(self, what: str) -> None:
        """Something that must not be."""
        self.note("BROKEN", what)
        with self._lock:
            self.broken.append(what)

    def count(self, act: str, error: str = "") -> None:
        """For the summary."""
        with self._lock:
            self.done[act] += 1
            if error:
                self.errors[f"{act}: {error}"] += 1

    def run(self, lasts_s: float, players: int = 2) -> None:
        """Play until the time is over; then end every sandbox, and look for what is left. Raises AssertionError."""
        self.home.start()
        self.prepare()
        until = time.monotonic() + lasts_s
        threads = [threading.Thread(target=Player(self, number).play, args=[until]) for number in range(players)]
        threads.append(threading.Thread(target=self.reap, args=[until]))
        for thread in threads:
            thread.start()
        self.trouble_daemon(until)
        for thread in threads:
            thread.join()
        self.finish()

    def prepare(self) -> None:
        """One sandbox at each level, so that templates are ready and their nurseries stand."""
        for level in self.levels:
            with Sandbox.create(isolation=level, client=self.home.client) as sandbox:
                sandbox.run(["true"])
            self.note("soak", f"{level} is ready")

    def reap(self, until: float) -> None:
        """Kill a helper now and then."""
        chance = random.Random(f"{self.seed}-reaper")
        while time.monotonic() < until:
            time.sleep(chance.uniform(0.2, 2.0) * self.calm)
            kinds: dict[str, list[int]] = {}
            for pid in self.home.processes():
                kinds.setdefault(helper_of(pid), []).append(pid)
            kinds.pop("", None)
            if kinds:
                kind = chance.choice(sorted(kinds))
                pid = chance.choice(sorted(kinds[kind]))
                self.note("reaper", f"kill -9 {kind} {pid}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self.count(f"kill {kind}")

    def trouble_daemon(self, until: float) -> None:
        """Kill the daemon now and then, and start another."""
        chance = random.Random(f"{self.seed}-daemon")
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, chance.uniform(4.0, 15.0) * self.calm))
            if until - time.monotonic() < 1.0:
                continue
            number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            self.note("soak", f"end the daemon with {signal.Signals(number).name}")
            self.home.end_daemon(number)
            self.home.start()
            self.count(f"daemon {signal.Signals(number).name}")
            self.note("soak", "the daemon is back")

    def finish(self) -> None:
        """End what lives, look at every log, and let nothing be left."""
        for record in self.records():
            with contextlib.suppress(TartarusError):
                self.check_log(Sandbox.connect(record.id, client=self.home.client))
        for record in self.records():
            if record.state in TERMINAL:
                continue
            self.note("soak", f"end {record.id} {record.isolation.value} {record.state.value}")
            began = time.monotonic()
            try:
                Sandbox.connect(record.id, client=self.home.client).kill()
            except TartarusError as error:
                self.break_(f"{record.id} ({record.isolation.value}, {record.state.value}) can't be ended: {error}")
            if time.monotonic() - began > STUCK_S:
                self.break_(f"{record.id} took {time.monotonic() - began:.0f} s to end")
        stuck = [record.id for record in self.records() if record.state not in TERMINAL]
        if stuck:
            self.break_(f"stuck: {stuck}")
        # A download whose guest is killed is cut off: there is no other way to say so behind its headers.
        cut_off = "Exception caught after response started"
        lines = [line for line in self.home.said().splitlines() if "Traceback (most" in line and cut_off not in line]
        if lines:
            self.break_(f"the daemon logged {len(lines)} tracebacks: {lines[-1][-4000:]}")
        # What was killed last is tidied away when it is replaced, or within a minute; the first use may still meet it.
        with contextlib.suppress(TartarusError):
            self.prepare()
        self.prepare()
        self.home.settle()
        assert self.home.end_daemon(signal.SIGTERM) == 0
        self.home.settle()
        assert self.home.parent_groups() == []
        assert not self.broken, "\n".join(self.broken)

    def records(self) -> list[Any]:
        """Every sandbox that the daemon knows of."""
        return [sandbox.info for sandbox in Sandbox.list(states=list(State), client=self.home.client)]

    def check_log(self, sandbox: Sandbox) -> None:
        """Its command counts from 0; a copy's log may begin later. Every number must follow the one before."""
        said = b"".join(entry.data for entry in sandbox.logs() if entry.stream == "stdout")
        lines = said.decode().split("\n")[:-1]
        if not lines or not lines[0].isdigit():
            return
        first = int(lines[0])
        expected = [str(number) for number in range(first, first + len(lines))]
        if lines != expected:
            at = next(at for at, (one, other) in enumerate(zip(lines, expected, strict=True)) if one != other)
            self.break_(f"{sandbox.id} ({sandbox.info.isolation.value}) counted {lines[max(0, at - 3) : at + 3]}")

    def summary(self) -> str:
        """What was done how often, and what was refused."""
        lines = [f"  {count:6} {act}" for act, count in sorted(self.done.items())]
        lines += ["refused, or failed as helpers died:"]
        lines += [f"  {count:6} {error}" for error, count in self.errors.most_common()]
        return "\n".join(lines)


class Player:
    """A client that does something else each moment."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak = soak
        self.chance = random.Random(f"{soak.seed}-{number}")
        self.name = f"player{number}"
        self.mine: list[Sandbox] = []
        self.places: dict[str, str] = {}

    def play(self, until: float) -> None:
        """Until the time is over."""
        while time.monotonic() < until:
            act = self.chance.choice(ACTS)
            began = time.monotonic()
            try:
                what = getattr(self, act)()
            except (TartarusError, OSError) as error:
                code = getattr(error, "code", type(error).__name__)
                self.soak.count(act, f"{code}: {str(error)[:80]}")
                self.soak.note(self.name, f"{act}: {code}: {error}")
                if code == UNEXPECTED:
                    self.soak.break_(f"{act}: {error}")
                if code == "daemon_unavailable":
                    time.sleep(0.2)
                if code in ("invalid_state", "sandbox_not_found", "sandbox_lost", "guest_failed"):
                    self.forget_ended()
            else:
                if what is not None:
                    self.soak.count(act)
                    self.soak.note(self.name, f"{act} {what} ({(time.monotonic() - began) * 1e3:.0f} ms)")
            if time.monotonic() - began > STUCK_S:
                self.soak.break_(f"{act} took {time.monotonic() - began:.0f} s")
            if act not in ("create", "kill"):
                time.sleep(self.chance.uniform(0.0, 0.05))

    def forget_ended(self) -> None:
        """Those whose end was somebody else's doing."""
        with contextlib.suppress(TartarusError, OSError):
            self.mine = [sandbox for sandbox in self.mine if sandbox.refresh().state not in TERMINAL]

    def file_of(self, sandbox: Sandbox) -> str:
        """A file that the sandbox may write; at process level only its own directory is."""
        if sandbox.id not in self.places:
            self.places[sandbox.id] = sandbox.run(["pwd"], timeout_s=20).stdout.strip() + "/file"
        return self.places[sandbox.id]

    def one(self) -> Sandbox | None:
        """A sandbox of this player's."""
        return self.chance.choice(self.mine) if self.mine else None

    def create(self) -> str | None:
        if len(self.mine) >= MOST_EACH:
            self.mine.pop(0).kill()
        level = self.chance.choice(self.soak.levels)
        command = ["sh", "-c", COUNT] if self.chance.random() < 0.8 else None
        sandbox = Sandbox.create(
            isolation=level,
            command=command,
            client=self.soak.home.client,
            timeout_s=self.chance.choice([None, None, 20.0]),
        )
        self.mine.append(sandbox)
        return f"{level} {sandbox.id}"

    def exec(self) -> str | None:
        sandbox = self.one()
        if sandbox is None:
            return None
        number = self.chance.randrange(1 << 30)
        result = sandbox.run(["sh", "-c", f"cat && echo {number}"], input=b"in ", timeout_s=20)
        # A daemon that stops asks every command to end, and a player may kill the sandbox: that shows in the status.
        if result.exit_code == 0 and result.stdout != f"in {number}\n":
            self.soak.break_(f"exec in {sandbox.id} said {result.stdout!r}")
        return sandbox.id

    def write(self) -> str | None:
        sandbox = self.one()
        if sandbox is None:
            return None
        size = self.chance.randrange(1 << 20)
        sandbox.files.write(self.file_of(sandbox), bytes([size & 255]) * size)
        return f"{sandbox.id} {size}"

    def read(self) -> str | None:
        sandbox = self.one()
        if sandbox is None:
            return None
        content = sandbox.files.read(self.file_of(sandbox))
        if content != bytes([len(content) & 255]) * len(content):
            self.soak.break_(f"a file in {sandbox.id} is not what was written")
        return f"{sandbox.id} {len(content)}"

    def log(self) -> str | None:
        sandbox = self.one()
        if sandbox is not None:
            self.soak.check_log(sandbox)
        return None if sandbox is None else sandbox.id

    def stats(self) -> str | None:
        sandbox = self.one()
        return None if sandbox is None else f"{sandbox.id} {sandbox.stats().memory_bytes >> 20} MiB"

    def kill(self) -> str | None:
        if not self.mine:
            return None
        sandbox = self.mine.pop(self.chance.randrange(len(self.mine)))
        self.soak.check_log(sandbox)
        sandbox.kill()
        return sandbox.id

    def fork(self) -> str | None:
        sandbox = self.one()
        if sandbox is None or not hasattr(sandbox, "fork") or len(self.mine) >= MOST_EACH:
            return None
        forks = sandbox.fork(self.chance.randint(1, 2))
        self.mine += forks.sandboxes
        return f"{sandbox.id} -> {' '.join(copy.id for copy in forks.sandboxes)}"

    def pause(self) -> str | None:
        return self._ask("pause")

    def resume(self) -> str | None:
        return self._ask("resume")

    def hibernate(self) -> str | None:
        return self._ask("hibernate")

    def wake(self) -> str | None:
        return self._ask("wake")

    def stop(self) -> str | None:
        if self.chance.random() < 0.7:
            return None
        return self._ask("stop", grace=0.5)

    def _ask(self, what: str, **options: Any) -> str | None:
        sandbox = self.one()
        if sandbox is None or not hasattr(sandbox, what):
            return None
        getattr(sandbox, what)(**options)
        return sandbox.id


def helper_of(pid: int) -> str:
    """What part of Tartarus a process is that the reaper may kill; "" for a sandbox's own programs and clients."""
    kind = kind_of(pid)
    if kind in ("agent", "nursery", "zygote", "runner"):
        return kind
    try:
        program = Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return ""
    return program if program.startswith(("qemu-", "runsc")) else ""


@contextlib.contextmanager
def soaking(seed: int, levels: Sequence[str], say: Callable[[str], object], calm: float = 1.0) -> Iterator[Soak]:
    """A soak in a place of its own."""
    with place() as home, guest_images(home.home) if "microvm" in levels else contextlib.nullcontext():
        yield Soak(home, seed, levels, say, calm)


def main() -> None:
    """Parse, soak, print the summary."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--players", type=int, default=2)
    parser.add_argument("--calm", type=float, default=1.0, help="how much less is killed: a machine takes long to boot")
    parser.add_argument("--levels", default=",".join(LEVELS), help="of: %(default)s")
    arguments = parser.parse_args()
    say = sys.stdout.write
    say(f"seed {arguments.seed}\n")
    with soaking(arguments.seed, arguments.levels.split(","), lambda line: say(f"{line}\n"), arguments.calm) as soak:
        try:
            soak.run(arguments.minutes * 60, arguments.players)
        finally:
            say(f"{soak.summary()}\n")
    say("nothing is left\n")


if __name__ == "__main__":
    main()
