"""Leaving a real Podman, and running through it; its service is started where none runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.kit import refused, tartarus, text
from tests.compat.engine import Engine, await_ready, rootfs

from tartarus.sdk import Template

pytestmark = [
    pytest.mark.needs("root", "podman", "runc", "busybox", "cgroups"), pytest.mark.usefixtures("home", "place"),
]  # fmt: skip
# Podman's own are more than every host may give.
SETTINGS = '[containers]\ndefault_ulimits = ["nofile=1000:1000", "nproc=1000:1000"]\n'


@pytest.fixture(scope="module")
def podman() -> Iterator[Engine]:
    place = Path(tempfile.mkdtemp(prefix="tt-podman-"))
    (place / "containers.conf").write_text(SETTINGS)
    # runc, since Debian's crun refuses hosts with both versions of cgroups.
    own = [f"--root={place}/root", f"--runroot={place}/run", f"--tmpdir={place}/tmp", "--runtime=runc"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            ["podman", *own, "system", "service", "--time", "0", f"unix://{place}/p.sock"],
            stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "CONTAINERS_CONF": f"{place}/containers.conf"},
        )  # fmt: skip
    engine = Engine(f"{place}/p.sock")
    try:
        await_ready(engine, process, place / "log")
        engine.load("box", rootfs())
        yield engine
        engine.clear()
    finally:
        engine.close()
        process.terminate()
        process.wait(60)
        end_monitors(place)
        subprocess.run(["umount", "-R", f"{place}/root/overlay"], capture_output=True, check=False)
        until = time.monotonic() + 30
        while place.exists():  # a monitor's clean-up that was under way makes its directories anew
            shutil.rmtree(place, ignore_errors=time.monotonic() < until)


def end_monitors(place: Path) -> None:
    """Podman keeps a monitor for five minutes after each exec, which then makes its directories anew."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes()
            if b"conmon" in words and str(place).encode() in words:
                os.kill(int(entry.parent.name), signal.SIGKILL)


def test_a_container_that_has_ended(podman: Engine, place: Path) -> None:
    script = "echo made >/srv/made; echo out $GREETING; echo err >&2; pwd; exit 3"
    podman.run(
        "job", "-c", script, Entrypoint=["/bin/sh"], Env=["GREETING=hello", "API_TOKEN=s3cret"], WorkingDir="/srv",
        host={"Memory": 64 << 20, "PidsLimit": 40},
    )  # fmt: skip
    before = podman.everything()
    done = tartarus("migrate", "podman", "--socket", podman.socket, "--isolation", "container", "--json", "job")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert podman.everything() == before
    made = json.loads(done.stdout)
    assert (made["proof"]["verdict"], made["proof"]["exit_code"]) == ("same", 3)
    assert made["plan"]["secrets"] == ["API_TOKEN"]
    assert b"s3cret" not in done.stdout
    assert made["plan"]["request"]["resources"]["memory_bytes"] == 64 << 20
    assert text("run", "--request", "job.request.json", "--", "/bin/cat", "/srv/made") == "made\n"
    Template.remove("job")


def test_a_container_that_runs(podman: Engine) -> None:
    podman.run("live", "/bin/sleep", "600", ends=False, User="app")
    done = tartarus(
        "migrate", "podman", "--socket", podman.socket, "--isolation", "container", "--pause", "--json", "live"
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert json.loads(done.stdout)["proof"]["verdict"] == "same"
    assert podman.state("live")["State"]["Status"] == "running"
    said = tartarus(
        "legacy", "exec", "--engine", "podman", "--socket", podman.socket, "live", "--", "sh", "-c", "exit 7"
    )
    assert said.returncode == 7
    Template.remove("live")


def test_a_command_runs_weakly_held_and_says_so(podman: Engine) -> None:
    script = "echo $A; echo err >&2; sed -n '/CapBnd/p;/NoNewPrivs/p' /proc/self/status; ls /sys/class/net; exit 4"
    socket = ("--engine", "podman", "--socket", podman.socket)
    done = tartarus("legacy", "run", *socket, "-e", "A=1", "box", "--", "sh", "-c", script)
    assert done.returncode == 4, done.stderr
    assert done.stdout.split() == [b"1", b"CapBnd:", b"0000000000000000", b"NoNewPrivs:", b"1", b"lo"]
    assert done.stderr.startswith(b"tartarus: held by podman 4")
    names = [entry["Names"][0] for entry in podman.call("GET", "/containers/json", params={"all": "1"})]
    assert not [name for name in names if "legacy" in name]
    ended = tartarus("legacy", "run", *socket, "--timeout", "1s", "box", "sleep", "600")
    assert ended.returncode == 124


def test_its_service_is_started_and_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTAINER_HOST", raising=False)
    assert "error[container_not_found]" in refused("migrate", "podman", "--dry-run", "nobody-by-that-name")
    until = time.monotonic() + 30
    while list(Path("/run").glob("tartarus-podman-0/*")):
        assert time.monotonic() < until
        time.sleep(0.05)
