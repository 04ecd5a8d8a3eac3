"""Stopping a tree of processes one by one, where no cgroup can freeze them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tartarus.model.errors import GuestFailed
from tartarus.runtimes import stopping
from tartarus.runtimes.stopping import StoppedTree, descendants

FAMILY = """
import os, signal, sys, time
def born():
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    while True:
        os.write(1, b"x")
        time.sleep(0.001)
born()
grandparent = os.fork()
if grandparent == 0:
    born()
    while True: time.sleep(1)
time.sleep(1000)
"""


def start(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    process = start(FAMILY)
    until(lambda: len(descendants(process.pid)) == 4)
    yield process
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states(root: int) -> set[str]:
    return {state for _, state in descendants(root).values()}


def test_all_of_them_stand_still_and_go_on(family: subprocess.Popen[bytes]) -> None:
    tree = StoppedTree(family.pid)
    tree.stop()
    assert states(family.pid) == {"T"}
    assert family.stdout is not None
    os.set_blocking(family.stdout.fileno(), False)
    while family.stdout.read(65536):
        pass
    time.sleep(0.05)
    assert not family.stdout.read(65536)
    tree.go_on()
    tree.go_on()
    until(lambda: bool(family.stdout and family.stdout.read(1)))
    assert "T" not in states(family.pid)


def test_one_that_had_stopped_stays_so(family: subprocess.Popen[bytes]) -> None:
    own = next(pid for pid, (parent, _) in descendants(family.pid).items() if parent == family.pid)
    os.kill(own, signal.SIGSTOP)
    until(lambda: descendants(family.pid)[own][1] == "T")
    tree = StoppedTree(family.pid)
    tree.stop()
    tree.go_on()
    until(lambda: descendants(family.pid)[family.pid][1] != "T")
    assert descendants(family.pid)[own][1] == "T"


def test_what_was_stopped_can_be_ended(family: subprocess.Popen[bytes]) -> None:
    tree = StoppedTree(family.pid)
    tree.stop()
    pids = list(descendants(family.pid))
    tree.kill()
    family.wait(20)
    until(lambda: not any(os.path.exists(f"/proc/{pid}") and states(pid) - {"Z"} for pid in pids))


def test_a_tree_that_is_gone(family: subprocess.Popen[bytes]) -> None:
    ended = start("pass")
    ended.wait()
    assert ended.stdout is not None
    ended.stdout.close()
    StoppedTree(ended.pid).stop()


def test_one_that_can_not_be_caught_is_let_go(family: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that forks without end may be: the sandbox goes on, and the caller hears why it is not paused."""
    monkeypatch.setattr(stopping, "LIMIT_S", 0.05)
    monkeypatch.setattr(StoppedTree, "_round", lambda self: self._stop_one(family.pid, os.getpid()))
    with pytest.raises(GuestFailed, match="paused"):
        StoppedTree(family.pid).stop()
    until(lambda: "T" not in states(family.pid))
