"""Hibernation and graceful ends while things are killed: what sleeps is never lost, and never there twice."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time

import pytest

from tartarus.model.errors import NoSpace, TartarusError
from tartarus.sdk import Sandbox

from .place import PATIENCE_S, Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "runsc")

ROUNDS = 3
"""How often the daemon is killed; 20 rounds of other seeds were run by hand."""
COUNTS = ("sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")


def sleeper(place: Place, **options: object) -> Sandbox:
    return place.create(*COUNTS, level="gvisor", **options)


def numbers(sandbox: Sandbox) -> list[int]:
    return [int(line) for line in b"".join(entry.data for entry in sandbox.logs()).split(b"\n")[:-1]]


def goes_on(sandbox: Sandbox) -> None:
    """It counts on from where it was."""
    seen = numbers(sandbox)
    wait_until(lambda: len(numbers(sandbox)) > len(seen) + 2, "it counts")
    found = numbers(sandbox)
    assert found[len(seen) :] == list(range(found[len(seen)], found[len(seen)] + len(found) - len(seen)))


def test_whatever_is_asked_of_it_wakes_it(up: Place) -> None:
    sandbox = sleeper(up)
    for ask in (
        lambda: sandbox.run(["true"], check=True),
        lambda: sandbox.files.write("/tmp/x", b"x"),
        lambda: sandbox.files.list("/"),
        lambda: sandbox.signal(signal.SIGCONT),
        lambda: sandbox.attach().close(),
        sandbox.wake,
    ):
        sandbox.hibernate()
        assert sandbox.refresh().state.value == "hibernated"
        assert up.inside(sandbox) == []
        ask()
        assert sandbox.refresh().state.value == "running"
    sandbox.hibernate()
    answers: list[str] = []
    asking = [threading.Thread(target=lambda: answers.append(sandbox.run(["echo", "hi"]).stdout)) for _ in range(6)]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert answers == ["hi\n"] * 6
    goes_on(sandbox)
    sandbox.hibernate()
    sandbox.stats()
    numbers(sandbox)
    assert sandbox.refresh().state.value == "hibernated"
    sandbox.kill()
    assert up.end_of(sandbox) == ("killed", "user_request")


def test_a_disk_that_is_full(home: Place) -> None:
    (home.home / "config.yaml").write_text("memory_budget: 1KiB\n")
    home.start()
    sandbox = sleeper(home)
    for _ in range(2):
        with pytest.raises(NoSpace):
            sandbox.hibernate()
        assert sandbox.refresh().state.value == "running"
        goes_on(sandbox)
    assert sandbox.run(["echo", "on"]).stdout == "on\n"
    sandbox.kill()
    assert home.end_daemon(signal.SIGTERM) == 0
    (home.home / "config.yaml").unlink()
    home.settle()


def test_the_daemon_is_killed_at_any_moment(home: Place) -> None:
    chance = random.Random(4711)
    home.start()
    for _ in range(ROUNDS):
        sandboxes = [sleeper(home), sleeper(home)]
        over = threading.Event()

        def toggle(sandbox: Sandbox, over: threading.Event) -> None:
            with contextlib.suppress(TartarusError, OSError):
                while not over.is_set():
                    sandbox.hibernate()
                    sandbox.wake()

        toggling = [threading.Thread(target=toggle, args=[sandbox, over]) for sandbox in sandboxes]
        for each in toggling:
            each.start()
        time.sleep(chance.uniform(0.0, 1.5))
        home.end_daemon(signal.SIGKILL)
        over.set()
        for each in toggling:
            each.join()
        slept = {sandbox.id for sandbox in sandboxes if home.recorded()[sandbox.id] in {"hibernated", "starting"}}
        home.start()
        for sandbox in sandboxes:
            state = sandbox.refresh().state.value
            assert state == ("hibernated" if sandbox.id in slept else "lost")
            if sandbox.id in slept:
                assert home.inside(sandbox) == []
                sandbox.wake()
                goes_on(sandbox)
                sandbox.kill()
        home.settle()
    assert home.end_daemon(signal.SIGTERM) == 0


def test_it_sleeps_while_the_daemon_is_stopped_and_started(home: Place) -> None:
    home.start()
    sandbox = sleeper(home, name="long")
    wait_until(lambda: len(numbers(sandbox)) > 2, "it counts")
    sandbox.hibernate()
    for number in (signal.SIGTERM, signal.SIGKILL):
        home.end_daemon(number)
        assert home.processes() == []
        assert home.groups() == []
        home.start()
        assert sandbox.refresh().state.value == "hibernated"
    goes_on_from = len(numbers(sandbox))
    sandbox.wake()
    goes_on(sandbox)
    found = numbers(sandbox)
    assert found == list(range(1, len(found) + 1))
    assert len(found) > goes_on_from
    sandbox.kill()
    home.settle()
    assert home.end_daemon(signal.SIGTERM) == 0


def test_one_whose_guest_was_killed_does_not_sleep(up: Place) -> None:
    sandbox = sleeper(up)
    for pid in up.inside(sandbox):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(TartarusError):
        sandbox.hibernate()
    assert up.end_of(sandbox)[0] in {"lost", "killed"}


@pytest.mark.parametrize("level", ["container", "process"])
def test_the_daemon_is_killed_in_a_grace(home: Place, level: str) -> None:
    home.start()
    sandbox = home.create("sh", "-c", "trap '' TERM; while :; do sleep 0.05; done", level=level)

    def stop() -> None:
        with contextlib.suppress(TartarusError, OSError):
            sandbox.stop(grace=60)

    stopping = threading.Thread(target=stop)
    stopping.start()
    wait_until(lambda: home.recorded()[sandbox.id] == "stopping", "its grace began")
    home.end_daemon(signal.SIGKILL)
    stopping.join()
    home.start()
    assert home.end_of(sandbox) == ("lost", "lost")
    home.settle()
    assert home.end_daemon(signal.SIGTERM) == 0


def test_whoever_asked_for_a_stop_is_killed(up: Place) -> None:
    sandbox = up.create("sh", "-c", "trap 'sleep 0.3; exit 0' TERM; while :; do sleep 0.05; done")
    client = up.cli("stop", "--grace", "30s", sandbox.id)
    wait_until(lambda: up.recorded()[sandbox.id] == "stopping", "its grace began")
    client.kill()
    client.communicate()
    assert up.end_of(sandbox) == ("succeeded", "user_request")


def test_commands_of_a_graceful_end(up: Place) -> None:
    up.keeps = re.compile(r"cache/tenants(/|$)")  # a deleted snapshot's layer stays for an hour
    heeds = up.create("sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done", name="heeds")
    out, err = up.cli("stop", "heeds").communicate(timeout=PATIENCE_S)
    assert (out, err) == (f"Sandbox {heeds.id} failed (exit code: 3)\n".encode(), b"")
    keeps = up.create("sh", "-c", "trap 'echo kept >/work/x; exit 0' TERM; while :; do sleep 0.05; done", name="keeps")
    out, err = up.cli("stop", "keeps", "--checkpoint", "point").communicate(timeout=PATIENCE_S)
    assert err == b""
    assert b"Checkpoint 'point' has its files" in out
    assert keeps.id.encode() in up.cli("checkpoints").communicate(timeout=PATIENCE_S)[0]
    resumed = Sandbox.connect(
        up.cli("resume", "point").communicate(timeout=PATIENCE_S)[0].decode().strip(), client=up.client
    )
    assert resumed.run(["cat", "/work/x"]).stdout == "kept\n"
    resumed.kill()
    assert up.cli("snapshot", "delete", "point").communicate(timeout=PATIENCE_S)[1] == b""
    up.create("sh", "-c", "trap 'exit 0' QUIT; while :; do sleep 0.05; done", name="quits", stop_signal="QUIT")
    drain = up.cli("drain")
    out, err = drain.communicate(timeout=PATIENCE_S)
    assert (drain.returncode, err) == (0, b"")
    assert b"succeeded" in out
    assert b"takes no new sandboxes; none is left" in out
    refused = up.cli("run", "--", "true")
    assert b"drained" in refused.communicate(timeout=PATIENCE_S)[1]
    assert b"takes new sandboxes" in up.cli("drain", "--undo").communicate(timeout=PATIENCE_S)[0]
    up.works(["container"])
