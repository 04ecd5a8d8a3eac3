"""Processes that are there but do nothing (SIGSTOP, the freezer): whatever stands still, a sandbox ends in time."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from tartarus.model.errors import GuestFailed, InvalidState, SandboxLost, TartarusError, TimeLimit

from .place import LEVELS, PATIENCE_S, Place, kind_of, wait_until

pytestmark = [pytest.mark.needs("root", "cgroups", "landlock"), pytest.mark.parametrize("level", LEVELS)]

SLEEP = ("python3", "-c", "import time; time.sleep(600)")


def test_an_agent_stopped_from_outside(up: Place, level: str) -> None:
    sandbox = up.create(*SLEEP, level=level, timeout_s=0.5)
    for pid in up.inside(sandbox):
        os.kill(pid, signal.SIGSTOP)
    assert up.end_of(sandbox) == ("timed_out", "timeout")


STOP_ALL = "import os, signal\nfor pid in range(2, 1 << 17):\n try: os.kill(pid, {})\n except OSError: pass"
HOSTILE = {
    "stop": ("sh", "-c", "kill -STOP $PPID; kill -STOP -1; kill -STOP $$"),
    "kill": ("sh", "-c", "trap '' TERM; kill -9 $PPID; kill -9 -1; kill -9 1; sleep 600"),
    "stop-each": ("python3", "-c", STOP_ALL.format("signal.SIGSTOP")),
}


@pytest.mark.parametrize("deed", HOSTILE)
def test_a_guest_that_turns_against_its_agent(up: Place, level: str, deed: str) -> None:
    # What it does at once may hit its own start: the caller then has the error instead.
    with contextlib.suppress(TimeLimit, GuestFailed):
        up.create(*HOSTILE[deed], level=level, name="hostile", timeout_s=1.0)
    record = up.sandboxes()[0].wait(PATIENCE_S)
    assert record.state.value in {"timed_out", "lost", "failed"}, record
    up.works([level])


def test_a_guest_that_turns_against_its_agent_later(up: Place, level: str) -> None:
    sandbox = up.create(level=level, timeout_s=1.0)
    with contextlib.ExitStack() as running:
        with contextlib.suppress(SandboxLost, InvalidState):  # its time may be over before the second begins
            for command in (["sleep", "600"], list(HOSTILE["stop"])):
                running.enter_context(sandbox.start(command))
        assert up.end_of(sandbox) == ("timed_out", "timeout")


def test_a_stopped_nursery_keeps_no_sandbox_from_ending(home: Place, level: str) -> None:
    home.start()
    sandboxes = [home.create(*SLEEP, level=level, timeout_s=1.0), home.create(*SLEEP, level=level)]
    for pid in home.parked():
        os.kill(pid, signal.SIGSTOP)
    assert home.end_of(sandboxes[0]) == ("timed_out", "timeout")
    sandboxes[1].kill()
    assert home.end_of(sandboxes[1]) == ("killed", "user_request")
    assert home.end_daemon(signal.SIGTERM) == 0
    home.settle()


def test_a_stopped_nursery_is_replaced(home: Place, level: str) -> None:
    home.start()
    home.create("true", level=level).wait(PATIENCE_S)
    stopped = home.parked()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    sandbox = home.create("sleep", "600", level=level)
    assert sandbox.run(["echo", "hi"]).stdout == "hi\n"
    assert not set(stopped) & set(home.parked())
    sandbox.kill()
    assert home.end_daemon(signal.SIGTERM) == 0
    home.settle()


def test_a_stopped_interpreter_is_replaced(home: Place, level: str) -> None:
    home.start()
    home.create(*SLEEP, level=level).kill()
    for pid in [pid for pid in home.parked() if kind_of(pid) == "zygote"]:
        os.kill(pid, signal.SIGSTOP)
    with home.create(*SLEEP, level=level) as sandbox:
        assert sandbox.run(["echo", "hi"]).stdout == "hi\n"
    assert home.end_daemon(signal.SIGTERM) == 0
    home.settle()


def test_a_paused_sandbox_is_killed(up: Place, level: str) -> None:
    sandbox = up.create("sh", "-c", "while :; do :; done", level=level)
    sandbox.pause()
    sandbox.kill()
    assert up.end_of(sandbox) == ("killed", "user_request")


def test_a_paused_sandbox_meets_its_deadline(up: Place, level: str) -> None:
    sandbox = up.create(*SLEEP, level=level, timeout_s=0.5)
    sandbox.pause()
    assert up.end_of(sandbox) == ("timed_out", "timeout")


def test_a_paused_sandbox_does_nothing_until_it_is_resumed(up: Place, level: str) -> None:
    sandbox = up.create(*SLEEP, level=level)
    sandbox.pause()
    with pytest.raises(TartarusError):
        sandbox.run(["echo", "no"])
    sandbox.resume()
    assert sandbox.run(["echo", "yes"]).stdout == "yes\n"
    sandbox.kill()


def test_the_daemon_itself_stopped_for_a_while(up: Place, level: str) -> None:
    assert up.daemon is not None
    sandbox = up.create(*SLEEP, level=level, timeout_s=0.3)
    other = up.create("sh", "-c", "yes", level=level)
    os.kill(up.daemon.pid, signal.SIGSTOP)
    client = up.cli("run", "--isolation", level, "--", "echo", "late")
    wait_until(lambda: kind_of(client.pid) == "client", "the client runs")
    os.kill(up.daemon.pid, signal.SIGCONT)
    assert client.communicate()[0] == b"late\n"
    assert up.end_of(sandbox) == ("timed_out", "timeout")
    other.kill()
