"""Leaving a real Docker engine: what a container was becomes a template and a request, and runs the same."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.kit import COMMAND, refused, tartarus, text
from tests.compat.engine import Engine
from tests.needs import kernel_package

from tartarus.compat.docker import DockerRuntime
from tartarus.compat.migration import Orders, plan_migration
from tartarus.compat.migration import migrate as run_migration
from tartarus.compat.plan import Wishes
from tartarus.compat.proving import Verdict, prove
from tartarus.model.errors import EngineFailed
from tartarus.runtimes.microvm import kernel
from tartarus.sdk import Client, Sandbox, Template
from tartarus.sdk.places import Places

pytestmark = [pytest.mark.needs("root", "dockerd", "busybox", "cgroups"), pytest.mark.usefixtures("home")]
LEVEL = ("--isolation", "container")


@pytest.fixture
def untouched(docker: Engine, place: Path) -> Iterator[Engine]:
    """The engine, which has nothing else after the test than what the test itself made there."""
    yield docker
    docker.clear()
    for template in Template.list():
        if not template.info.builtin:
            template.remove()


def migrate(docker: Engine, *arguments: str) -> dict[str, Any]:
    """A migration that must succeed, and must have left the engine as it was."""
    before = docker.everything()
    done = tartarus("migrate", "docker", "--socket", docker.socket, "--json", *arguments)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert docker.everything() == before
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_container_that_has_ended(untouched: Engine, place: Path) -> None:
    untouched.run(
        "job", "-c", "echo made >/srv/made; echo out $GREETING; echo err >&2; pwd; id -u; exit 3",
        Entrypoint=["/bin/sh"], Env=["GREETING=hello", "API_TOKEN=s3cret"], WorkingDir="/srv", Labels={"team": "x"},
        host={"Memory": 64 << 20, "NanoCpus": 500_000_000, "PidsLimit": 40},
    )  # fmt: skip
    made = migrate(untouched, *LEVEL, "job")
    assert made["proof"]["verdict"] == "same"
    assert (made["proof"]["exit_code"], made["proof"]["isolation"]) == (3, "container")
    request = json.loads((place / "job.request.json").read_text())
    assert request["resources"]["memory_bytes"] == 64 << 20
    assert (request["resources"]["cpu_milli"], request["resources"]["pids"]) == (500, 40)
    assert request["labels"] == {"team": "x"}
    assert stat.S_IMODE((place / "job.request.json").stat().st_mode) == 0o600
    # What it wrote came along; its secret did not.
    assert text("run", "--request", "job.request.json", "--", "/bin/cat", "/srv/made") == "made\n"
    assert "s3cret" not in text("run", "--request", "job.request.json", "--", "/bin/env")
    assert made["plan"]["secrets"] == ["API_TOKEN"]
    assert "s3cret" not in json.dumps(made)
    again = tartarus("run", "--request", "job.request.json")
    assert (again.returncode, again.stdout, again.stderr) == (3, b"out hello\n/srv\n0\n", b"err\n")


def test_a_container_that_runs_is_checked_harmlessly(untouched: Engine) -> None:
    untouched.run("live", "/bin/sleep", "600", ends=False, User="app", WorkingDir="/srv")
    made = migrate(untouched, *LEVEL, "--pause", "live")
    assert made["proof"]["verdict"] == "same"
    assert untouched.state("live")["State"]["Status"] == "running"
    own = migrate(untouched, *LEVEL, "--replace", "--prove", "/bin/sh -c 'id -un; exit 7'", "live")
    assert (own["proof"]["verdict"], own["proof"]["exit_code"]) == ("same", 7)


def test_a_difference_is_told(untouched: Engine) -> None:
    untouched.run("clock", "/bin/cat", "/proc/1/cmdline", ends=True)
    done = tartarus("migrate", "docker", "--socket", untouched.socket, *LEVEL, "clock")
    assert done.returncode == 1
    assert b"Not the same at level container: /bin/cat /proc/1/cmdline" in done.stdout


def test_a_plan_makes_nothing(untouched: Engine, place: Path) -> None:
    untouched.create("job", "/bin/true", Env=["A=1"])
    said = text("migrate", "docker", "--socket", untouched.socket, "--dry-run", "job")
    assert "environment" in said
    assert list(place.iterdir()) == []
    assert [template.name for template in Template.list() if not template.info.builtin] == []


def test_secrets_go_where_their_owner_says(untouched: Engine, place: Path) -> None:
    untouched.run("job", "/bin/sh", "-c", "echo $DB_PASSWORD", Env=["DB_PASSWORD=pw"])
    done = tartarus("migrate", "docker", "--socket", untouched.socket, *LEVEL, "job")
    assert done.returncode == 1
    assert b"secrets were left out" in done.stdout
    shown = tartarus(
        "migrate", "docker", "--socket", untouched.socket, *LEVEL, "--replace", "--secrets", "request", "job"
    )
    assert shown.returncode == 0
    assert b'"pw"' not in shown.stdout
    assert json.loads((place / "job.request.json").read_text())["env"] == {"DB_PASSWORD": "pw"}
    assert text("run", "--request", "job.request.json") == "pw\n"
    migrate(untouched, *LEVEL, "--replace", "--secrets", "template", "-o", "t.yaml", "job")
    assert text("run", "--request", "t.yaml") == "pw\n"


@pytest.mark.parametrize(
    ("host", "what"),
    [
        ({"Privileged": True}, "privileged"),
        ({"NetworkMode": "host"}, "the host's network namespace"),
        ({"PidMode": "host"}, "the host's process namespace"),
        ({"CapAdd": ["SYS_ADMIN"]}, "the capability SYS_ADMIN"),
        ({"Devices": [{"PathOnHost": "/dev/null", "PathInContainer": "/dev/x"}]}, "devices of the host"),
        ({"SecurityOpt": ["seccomp=unconfined"]}, "seccomp"),
        ({"Binds": ["/proc:/host-proc"]}, "what the host stands on"),
        ({"Binds": ["/:/host:ro"]}, "an engine's socket or files"),
    ],
)
def test_powers_are_refused_or_dropped_by_name(untouched: Engine, place: Path, host: dict[str, Any], what: str) -> None:
    untouched.create("strong", "/bin/true", host=host)
    socket = ("--socket", untouched.socket)
    plan = json.loads(text("migrate", "docker", *socket, "--dry-run", "--json", "strong"))
    (finding,) = [finding for finding in plan["findings"] if finding["effect"] == "refused"]
    assert what in finding["detail"]
    done = tartarus("migrate", "docker", *socket, *LEVEL, "strong")
    assert done.returncode == 125
    assert b"error[migration_refused]" in done.stderr
    assert list(place.iterdir()) == []
    plan = json.loads(text("migrate", "docker", *socket, "--dry-run", "--json", "--drop-refused", "strong"))
    assert not [finding for finding in plan["findings"] if finding["effect"] == "refused"]
    assert any(finding["effect"] == "dropped" and what in finding["detail"] for finding in plan["findings"])
    assert plan["request"]["mounts"] == []


def test_the_engines_socket_is_never_given(untouched: Engine, tmp_path: Path) -> None:
    (tmp_path / "innocent").symlink_to(untouched.socket)
    for number, source in enumerate((untouched.socket, str(tmp_path / "innocent"), str(Path(untouched.socket).parent))):
        untouched.create(f"holder{number}", "/bin/true", host={"Binds": [f"{source}:/s"]})
        options = ("--socket", untouched.socket, "--dry-run", "--json", "--drop-refused")
        plan = json.loads(text("migrate", "docker", *options, f"holder{number}"))
        assert plan["request"]["mounts"] == []


def test_mounts_are_carried_and_not_written_by_the_proof(untouched: Engine, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").write_text("one")
    untouched.run(
        "mounted", "/bin/sh", "-c", "cat /data/a; cat /vol/x 2>/dev/null; touch /data/b 2>/dev/null; exit 0",
        host={"Binds": [f"{data}:/data", "vol:/vol:ro"]},
    )  # fmt: skip
    (data / "b").unlink()
    made = migrate(untouched, *LEVEL, "mounted")
    assert made["proof"]["verdict"] == "same"
    assert not (data / "b").exists()
    mounts = made["plan"]["request"]["mounts"]
    assert [(mount["target"], mount["read_only"]) for mount in mounts] == [("/data", False), ("/vol", True)]
    none = migrate(untouched, *LEVEL, "--replace", "--mounts", "drop", "--no-prove", "mounted")
    assert none["plan"]["request"]["mounts"] == []


def test_mounts_can_be_copied(untouched: Engine, tmp_path: Path) -> None:
    """For levels that take none, and for leaving volumes behind."""
    data = tmp_path / "data"
    (data / "deep" / "er").mkdir(parents=True)
    (data / "deep" / "er" / "a").write_text("one\n")
    (data / "out").symlink_to("/etc/hostname")
    (data / "deep" / "own").write_text("x")
    os.chown(data / "deep" / "own", 1000, 1000)
    script = "cat /data/deep/er/a /vol/x; [ -L /data/out ]; ls -n /data/deep | sed -n '/own/s/ .*//p'"
    untouched.run("filler", "/bin/sh", "-c", "echo two >/vol/x", host={"Binds": ["copied:/vol"]})
    untouched.run("mounted", "/bin/sh", "-c", script, host={"Binds": [f"{data}:/data", "copied:/vol"]})
    made = migrate(untouched, *LEVEL, "--mounts", "copy", "mounted")
    assert made["proof"]["verdict"] == "same", made["proof"]
    assert made["plan"]["request"]["mounts"] == []
    changing = "echo three >/data/deep/er/a; cat /data/deep/er/a; ls -n /data/deep/own | sed 's/  */ /g'"
    said = text("run", "--request", "mounted.request.json", "--", "/bin/sh", "-c", changing).splitlines()
    assert said[0] == "three"
    assert "1000 1000" in said[1]
    assert (data / "deep" / "er" / "a").read_text() == "one\n"
    wanted = ("--isolation", "microvm", "--dry-run", "--json", "mounted")
    plan = json.loads(text("migrate", "docker", "--socket", untouched.socket, *wanted))
    assert [finding["effect"] for finding in plan["findings"] if finding["what"] == "mount /data"] == ["refused"]


def test_what_stands_in_the_way_is_found_before_anything_is_made(untouched: Engine, place: Path) -> None:
    untouched.create("job", "/bin/true")
    socket = ("--socket", untouched.socket)
    (place / "job.request.json").write_text("mine")
    assert "is there already" in tartarus("migrate", "docker", *socket, "job").stderr.decode()
    assert (place / "job.request.json").read_text() == "mine"
    assert [template.name for template in Template.list() if not template.info.builtin] == []
    assert "error[container_not_found]" in refused("migrate", "docker", *socket, "nobody")
    assert "not a container's name" in refused("migrate", "docker", *socket, "--", "--privileged")
    assert "not a container's name" in refused("migrate", "docker", *socket, "a/../b")
    late = tartarus("migrate", "docker", *socket, "-o", "x.json", "--prove", "ls", "job")
    assert b"not running" in late.stderr
    assert [template.name for template in Template.list() if not template.info.builtin] == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ended_while_it_has_a_container_frozen(
    untouched: Engine, home: Places, place: Path, number: signal.Signals
) -> None:
    """The helper thaws it, and nothing of the template is there."""
    untouched.run("live", "/bin/sh", "-c", "dd if=/dev/zero of=/big bs=1M count=600 2>/dev/null; sleep 600", ends=False)
    argv = ["migrate", "docker", "--socket", untouched.socket, "--pause", "live"]
    process = subprocess.Popen([*COMMAND, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while untouched.state("live")["State"]["Status"] != "paused":
        assert process.poll() is None
        assert time.monotonic() < until
    os.kill(process.pid, number)
    process.wait()
    while untouched.state("live")["State"]["Status"] == "paused":
        assert time.monotonic() < until
        time.sleep(0.05)
    while list(Path(home.state_dir, "cache", "uploads").glob("*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    # The daemon notices by itself that its client has gone.
    while [template.name for template in Template.list() if not template.info.builtin]:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert list(place.iterdir()) == []
    assert Sandbox.list() == []


def test_where_no_sandbox_can_be_made_there_is_no_proof(untouched: Engine) -> None:
    untouched.run("job", "/bin/true")
    runtime = DockerRuntime(untouched.socket)
    state, plan = plan_migration(runtime, "job", Wishes(name="never-made"))
    proof = prove(runtime, state, plan, (), timeout_s=10, client=Client())
    assert proof.verdict is Verdict.FAILED
    assert "never-made" in proof.why


def test_a_command_that_does_not_end_is_no_proof(untouched: Engine) -> None:
    untouched.run("live", "/bin/sleep", "600", ends=False)
    socket = ("--socket", untouched.socket)
    done = tartarus("migrate", "docker", *socket, *LEVEL, "--prove", "sleep 100", "--prove-timeout", "1s", "live")
    assert (done.returncode, done.stderr.count(b"error[")) == (1, 0)
    assert b"Not proven: the container: docker did not answer in time" in done.stdout


def test_one_that_somebody_else_froze_stays_frozen(untouched: Engine) -> None:
    """Also when that happens between our look and our own pause."""
    untouched.run("live", "/bin/sleep", "600", ends=False)
    runtime = DockerRuntime(untouched.socket)
    state, plan = plan_migration(runtime, "live", Wishes(name="frozen"))
    untouched.call("POST", "/containers/live/pause")
    with pytest.raises(EngineFailed, match="already paused"):
        run_migration(runtime, state, plan, Orders(request_path="x.json", pause=True))
    assert untouched.state("live")["State"]["Status"] == "paused"
    untouched.call("POST", "/containers/live/unpause")


@pytest.mark.needs("runsc")
def test_a_container_gets_a_kernel_of_its_own(untouched: Engine) -> None:
    """The same command under gVisor, whose kernel is not the one that Docker's containers share."""
    untouched.run(
        "job", "/bin/sh", "-c", "echo x >/srv/y; cat /srv/y; id -u; exit 5", User="1000:1000", WorkingDir="/tmp"
    )
    untouched.run("kernel", "/bin/cat", "/proc/version")
    done = tartarus("migrate", "docker", "--socket", untouched.socket, "--isolation", "gvisor", "--json", "job")
    proof = json.loads(done.stdout)["proof"]
    assert (done.returncode, proof["verdict"], proof["isolation"], proof["exit_code"]) == (0, "same", "gvisor", 5)
    done = tartarus("migrate", "docker", "--socket", untouched.socket, "--isolation", "gvisor", "--json", "kernel")
    assert json.loads(done.stdout)["proof"]["verdict"] == "differs"


@pytest.mark.needs("microvm")
def test_a_container_becomes_a_machine(untouched: Engine, home: Places) -> None:
    """A real virtual machine, with the container's volume copied into it, does what the container did."""
    package = kernel_package()
    assert package is not None
    kernel.install(package, Path(home.state_dir) / "kernels")
    untouched.run("filler", "/bin/sh", "-c", "echo data >/vol/x", host={"Binds": ["machine:/vol"]})
    untouched.run("job", "/bin/sh", "-c", "cat /vol/x; id -u; exit 5", User="app", host={"Binds": ["machine:/vol"]})
    wanted = ("--isolation", "microvm", "--mounts", "copy", "--json", "job")
    done = tartarus("migrate", "docker", "--socket", untouched.socket, *wanted)
    proof = json.loads(done.stdout)["proof"]
    assert (done.returncode, proof["verdict"], proof["isolation"], proof["exit_code"]) == (0, "same", "microvm", 5)
