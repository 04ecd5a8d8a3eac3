"""Leaving a real containerd: through `ctr`, and a mount that nobody else sees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.kit import refused, tartarus, text
from tests.compat.engine import rootfs

from tartarus.compat.snapshot import archive_argv
from tartarus.model.errors import EngineFailed
from tartarus.sdk import Template

pytestmark = [
    pytest.mark.needs("root", "containerd", "runc", "busybox", "cgroups"), pytest.mark.usefixtures("home", "place"),
]  # fmt: skip
CONFIG = """
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{place}/c.sock"
[ttrpc]
address = "{place}/c.sock.ttrpc"
"""


class Containerd:
    """The engine, asked with `ctr` as its own users do."""

    def __init__(self, place: Path) -> None:
        self.socket = f"{place}/c.sock"

    def ctr(self, *words: str) -> str:
        argv = ["ctr", "--address", self.socket, *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    place = Path(tempfile.mkdtemp(prefix="tt-containerd-"))
    (place / "config.toml").write_text(CONFIG.format(place=place))
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            ["containerd", "--config", f"{place}/config.toml"], stdout=log, stderr=log, start_new_session=True
        )
    engine = Containerd(place)
    try:
        until = time.monotonic() + 60
        while subprocess.run(
            ["ctr", "--address", engine.socket, "version"], capture_output=True, check=False
        ).returncode:
            assert time.monotonic() < until, (place / "log").read_text(errors="replace")[-2000:]
            time.sleep(0.1)
        (place / "box.tar").write_bytes(docker_archive())
        engine.ctr("images", "import", f"{place}/box.tar")
        yield engine
        for name in engine.ctr("tasks", "list", "--quiet").split():
            engine.ctr("tasks", "delete", "--force", name)
        for name in engine.ctr("containers", "list", "--quiet").split():
            engine.ctr("containers", "delete", name)
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(place)


def docker_archive() -> bytes:
    """What `docker save` would write of an image of busybox."""
    import hashlib
    import io
    import tarfile

    layer = rootfs()
    config = json.dumps({
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine], "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }).encode()  # fmt: skip
    manifest = json.dumps([{"Config": "config.json", "RepoTags": ["box:latest"], "Layers": ["layer.tar"]}]).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("config.json", config), ("layer.tar", layer), ("manifest.json", manifest)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def run(engine: Containerd, name: str, script: str, *options: str) -> None:
    engine.ctr("run", "--detach", "--null-io", *options, "docker.io/library/box:latest", name, "/bin/sh", "-c", script)


def mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def test_a_container_that_runs(containerd: Containerd, place: Path) -> None:
    run(containerd, "live", "echo made >/srv/made; exec sleep 600", "--env", "GREETING=hello", "--env", "TOKEN=s3cret",
        "--memory-limit", str(64 << 20))  # fmt: skip
    before = mounts()
    socket = ("--socket", containerd.socket)
    done = tartarus("migrate", "containerd", *socket, "--isolation", "container", "--pause", "--json", "live")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert b"s3cret" not in done.stdout
    made = json.loads(done.stdout)
    assert made["proof"]["verdict"] == "same"
    assert made["plan"]["request"]["resources"]["memory_bytes"] == 64 << 20
    assert text("run", "--request", "live.request.json", "--", "/bin/sh", "-c", "cat /srv/made; echo $GREETING") == (
        "made\nhello\n"
    )
    assert mounts() == before
    assert containerd.ctr("tasks", "list").split()[-1] == "RUNNING"
    engine = ("--engine", "containerd", *socket)
    (listed,) = json.loads(text("legacy", "ps", *engine, "--json"))
    assert (listed["name"], listed["status"], listed["engine"]) == ("live", "running", "containerd")
    assert tartarus("legacy", "exec", *engine, "live", "--", "/bin/sh", "-c", "exit 9").returncode == 9
    assert json.loads(text("legacy", "stats", *engine, "--json", "live"))["pids"] >= 1
    assert "error[unsupported]" in refused("legacy", "logs", *engine, "live")
    assert "was not made by tartarus" in refused("legacy", "rm", *engine, "live")
    text("legacy", "stop", *engine, "--grace", "0", "live")
    assert text("legacy", "ps", *engine).splitlines()[1:] == []
    Template.remove("live")


def test_powers_are_refused(containerd: Containerd, place: Path) -> None:
    socket = ("--socket", containerd.socket)
    containerd.ctr(
        "containers", "create", "--net-host", "--cap-add", "CAP_SYS_ADMIN", "--mount",
        "type=bind,src=/etc,dst=/host,options=rbind:ro", "docker.io/library/box:latest", "strong", "/bin/true",
    )  # fmt: skip
    plan = json.loads(text("migrate", "containerd", *socket, "--dry-run", "--json", "strong"))
    details = " ".join(finding["detail"] for finding in plan["findings"] if finding["effect"] == "refused")
    assert "SYS_ADMIN" in details
    assert "the host's network namespace" in details
    assert "what the host stands on (/etc)" in details
    assert "error[migration_refused]" in tartarus("migrate", "containerd", *socket, "strong").stderr.decode()
    assert list(place.iterdir()) == []
    assert "error[container_not_found]" in refused("migrate", "containerd", *socket, "nobody")
    assert "not a container's name" in refused("migrate", "containerd", *socket, "--", "--help")


@pytest.mark.parametrize(
    "text",
    [
        "", "mount", "umount -t overlay overlay /mnt -o ro", "mount -t tmpfs tmpfs /mnt -o ro",
        "mount -t overlay overlay /mnt -o lowerdir=relative", "mount -t bind relative /mnt -o ro",
        "mount -t bind /a /mnt -o ro\nmount -t bind /b /mnt -o ro", "mount -t overlay overlay /mnt -o index=off",
        "mount -t overlay overlay /mnt -o lowerdir=/a\\:b",
    ],
)  # fmt: skip
def test_mounts_that_are_none(text: str) -> None:
    with pytest.raises(EngineFailed):
        archive_argv(text)
