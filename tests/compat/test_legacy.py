"""Running through a real Docker engine: what it may do there, that the record says who holds it, and that nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from tests.cli.kit import COMMAND, refused, tartarus, text
from tests.compat.engine import Engine

pytestmark = pytest.mark.needs("root", "dockerd", "busybox", "cgroups")


@pytest.fixture
def engine(docker: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The engine, by the variable that its own client goes by."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{docker.socket}")
    yield docker
    docker.clear()


def names(engine: Engine) -> list[str]:
    return [entry["Names"][0] for entry in engine.call("GET", "/containers/json", params={"all": "1"})]


def test_a_command_runs_weakly_held_and_says_so(engine: Engine) -> None:
    script = "echo $A; echo err >&2; sed -n '/CapBnd/p;/NoNewPrivs/p' /proc/self/status; ls /sys/class/net; exit 4"
    done = tartarus("legacy", "run", "-e", "A=1", "box", "--", "sh", "-c", script)
    assert done.returncode == 4
    assert done.stdout.split() == [b"1", b"CapBnd:", b"0000000000000000", b"NoNewPrivs:", b"1", b"lo"]
    first, second = done.stderr.splitlines()
    assert first.startswith(b"tartarus: held by docker ")
    assert first.endswith(b"(runc), not by Tartarus")
    assert second == b"err"
    assert names(engine) == []


def test_the_record(engine: Engine) -> None:
    said = json.loads(text("legacy", "run", "--json", "box", "echo", "hi"))
    assert said["stdout"] == "hi\n"
    assert said["record"]["isolation"] == "engine"
    assert said["record"]["held_by"].startswith("docker ")
    assert said["record"]["exit_code"] == 0


def test_a_container_that_stays(engine: Engine) -> None:
    assert text("legacy", "run", "-dq", "--name", "stay", "box", "sh", "-c", "echo up; sleep 600") == "stay\n"
    (listed,) = json.loads(text("legacy", "ps", "--json"))
    assert (listed["name"], listed["status"]) == ("stay", "running")
    done = tartarus("legacy", "exec", "stay", "--", "sh", "-c", "echo out; echo err >&2; exit 9")
    assert (done.returncode, done.stdout, done.stderr) == (9, b"out\n", b"err\n")
    assert text("legacy", "logs", "stay") == "up\n"
    used = json.loads(text("legacy", "stats", "--json", "stay"))
    assert used["pids"] >= 1
    assert used["memory_bytes"] > 0
    shown = json.loads(text("legacy", "inspect", "stay"))
    assert (shown["isolation"], shown["status"]) == ("engine", "running")
    host = engine.state("stay")["HostConfig"]
    assert (host["NetworkMode"], host["CapDrop"], host["PidsLimit"]) == ("none", ["ALL"], 512)
    assert text("legacy", "stop", "--grace", "0", "stay") == ""
    assert text("legacy", "ps").splitlines()[1:] == []
    text("legacy", "rm", "stay")
    assert names(engine) == []


def test_only_what_it_made_is_removed(engine: Engine) -> None:
    engine.create("precious", "/bin/true")
    assert "was not made by tartarus" in refused("legacy", "rm", "precious")
    assert b"already in use" in tartarus("legacy", "run", "--name", "precious", "box", "true").stderr
    assert b"No such image" in tartarus("legacy", "run", "nothere", "true").stderr
    assert names(engine) == ["/precious"]


def test_a_time_limit_ends_it(engine: Engine) -> None:
    done = tartarus("legacy", "run", "--timeout", "1s", "box", "sleep", "600")
    assert done.returncode == 124
    assert names(engine) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_while_it_runs(engine: Engine, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "legacy", "run", "-q", "box", "sh", "-c", "echo up; sleep 600"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
        os.kill(process.pid, number)
        process.wait()
    until = time.monotonic() + 60
    while names(engine):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_engine_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    assert "not on this host" in refused("legacy", "ps")
    assert "not the path of a socket" in refused("legacy", "ps", "--socket", "tcp://192.0.2.1:2375")
