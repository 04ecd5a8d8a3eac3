"""kill -9 of every other part, one at a time: what ends with it, what goes on, and what the next launch finds."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tartarus.model.errors import SandboxLost, TartarusError
from tartarus.sdk import Sandbox

from .place import LEVELS, Place, kind_of, wait_until

pytestmark = [pytest.mark.needs("root", "cgroups", "landlock"), pytest.mark.parametrize("level", LEVELS)]

SLEEP = ("python3", "-c", "import time; time.sleep(600)")


def parked(up: Place, kind: str, level: str) -> int:
    """The nursery or warm interpreter of one level; the groups tell whose it is."""
    mark = "-process-" if level == "process" else "/nursery-"
    found = [
        pid for pid in up.parked()
        if kind_of(pid) == kind and (("-process-" in groups_of(pid)) == (level == "process")) and mark in groups_of(pid)
    ]  # fmt: skip
    first = [pid for pid in found if kind == "nursery" or is_child_of_nursery(pid)]
    assert len(first) == 1, found
    return first[0]


def first_line(client: subprocess.Popen[bytes]) -> bytes:
    assert client.stdout is not None
    return client.stdout.readline()


def groups_of(pid: int) -> str:
    with open(f"/proc/{pid}/cgroup", encoding="ascii") as groups:
        return groups.read()


def is_child_of_nursery(pid: int) -> bool:
    """What an interpreter cloned ahead has its interpreter for a parent."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return kind_of(int(stat.read().rpartition(")")[2].split()[1])) == "nursery"


def test_the_agent(up: Place, level: str) -> None:
    sandbox = up.create(level=level)
    with sandbox.start(["sh", "-c", "setsid sleep 601 & sleep 602"]) as command:
        wait_until(lambda: len(up.inside(sandbox)) >= 4, "the command runs")
        os.kill(up.one("agent", sandbox), signal.SIGKILL)
        with pytest.raises(SandboxLost):
            command.wait()
    assert up.end_of(sandbox) == ("lost", "lost")
    assert sandbox.info.message == "its guest agent ended"
    up.works([level])


def test_the_warm_runner_beside_a_sandbox(up: Place, level: str) -> None:
    sandbox = up.create(level=level)
    with sandbox.start(["python3", "-c", "pass"]) as process:
        assert process.warm
    os.kill(up.one("runner", sandbox), signal.SIGKILL)
    wait_until(lambda: not up.inside(sandbox, "runner"), "it is gone")
    with sandbox.start(["python3", "-c", "print('cold')"]) as process:
        assert not process.warm
        assert process.wait().stdout == "cold\n"
    sandbox.kill()


def test_the_warm_main_command(up: Place, level: str) -> None:
    sandbox = up.create(*SLEEP, level=level)
    assert sandbox.info.warm is not None
    os.kill(up.one("runner", sandbox), signal.SIGKILL)
    assert up.end_of(sandbox) == ("failed", "completed")
    assert (sandbox.info.exit_code, sandbox.info.exit_signal) == (137, 9)


def test_the_parked_interpreter(up: Place, level: str) -> None:
    before = [up.create(*SLEEP, level=level), up.create(level=level)]
    os.kill(parked(up, "zygote", level), signal.SIGKILL)
    after = up.create(*SLEEP, level=level)
    for sandbox in [*before, after]:
        assert sandbox.run(["python3", "-c", "print(6 * 7)"]).stdout == "42\n"
    assert [sandbox.refresh().state.value for sandbox in [*before, after]] == ["running"] * 3
    for sandbox in [*before, after]:
        sandbox.kill()
        assert up.end_of(sandbox) == ("killed", "user_request")


def test_the_nursery(up: Place, level: str) -> None:
    before = [up.create(*SLEEP, level=level), up.create("sleep", "600", level=level)]
    before[1].pause()
    os.kill(parked(up, "nursery", level), signal.SIGKILL)
    with up.create(level=level) as after:
        assert after.run(["echo", "on"]).stdout == "on\n"
        if level == "process":
            assert before[0].run(["echo", "on"]).stdout == "on\n"
            for sandbox in before:
                sandbox.kill()
    ends = [up.end_of(sandbox) for sandbox in before]
    # There it is process 1 above them; here they have only lost their reaper.
    assert ends == [("lost", "lost") if level == "container" else ("killed", "user_request")] * 2


def test_a_foreground_client(up: Place, level: str) -> None:
    client = up.cli("run", "--isolation", level, "--name", "mine", "--", "sh", "-c", "echo begun; sleep 600")
    assert first_line(client) == b"begun\n"
    client.kill()
    client.communicate()
    sandbox = Sandbox.connect("mine", client=up.client)
    assert up.end_of(sandbox) == ("killed", "user_request")
    assert b"".join(entry.data for entry in sandbox.logs()) == b"begun\n"


def test_a_client_of_a_detached_run(up: Place, level: str) -> None:
    client = up.cli("run", "--isolation", level, "--detach", "--name", "on", "--", "sleep", "600")
    client.communicate()
    Sandbox.connect("on", client=up.client).kill()


def test_a_client_with_a_command_beside(up: Place, level: str) -> None:
    with up.create(level=level) as sandbox:
        client = up.cli("exec", sandbox.id, "--", "sh", "-c", "echo begun; sleep 603")
        assert first_line(client) == b"begun\n"
        client.kill()
        client.communicate()
        wait_until(lambda: len(up.inside(sandbox, "guest")) == 0, "the command is gone")
        assert sandbox.run(["echo", "on"]).stdout == "on\n"


def test_clients_leave_no_descriptors_open(up: Place, level: str) -> None:
    assert up.daemon is not None

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{up.daemon.pid}/fd"))  # type: ignore[union-attr]

    up.works([level])
    before = descriptors()
    for _ in range(5):
        client = up.cli("run", "--isolation", level, "--", "sh", "-c", "echo begun; sleep 600")
        assert first_line(client) == b"begun\n"
        client.kill()
        client.communicate()
    up.settle()
    wait_until(lambda: descriptors() <= before, f"{descriptors() - before} descriptors more")


def test_the_agent_again_and_again(up: Place, level: str) -> None:
    for _ in range(10):
        sandbox = up.create("sh", "-c", "while :; do :; done", level=level, name="again")
        os.kill(up.one("agent", sandbox), signal.SIGKILL)
        assert up.end_of(sandbox) == ("lost", "lost")


def test_the_parked_interpreter_while_sandboxes_start(up: Place, level: str) -> None:
    up.create(*SLEEP, level=level).kill()
    deadline = time.monotonic() + 3.0
    outcomes = []
    while time.monotonic() < deadline:
        for pid in [pid for pid in up.parked() if kind_of(pid) == "zygote"]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            sandbox = up.create("python3", "-c", "print(1)", level=level)
            outcomes.append(up.end_of(sandbox)[0])
        except TartarusError as error:
            outcomes.append(error.code)
    assert set(outcomes) <= {"succeeded", "guest_failed", "template_failed"}, outcomes
    up.works([level])
