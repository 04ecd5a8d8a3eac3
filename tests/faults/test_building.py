"""kill -9 in the middle of a build's step: nothing of it runs on, is mounted, or is offered, and the network is put back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tartarus.model.errors import TartarusError
from tartarus.sdk import Sandbox, Template

from .place import Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "busybox")

DOCKERFILE = """
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN echo one >/etc/one
RUN {step}
"""


def context(directory: Path, step: str) -> Path:
    busybox = shutil.which("busybox")
    assert busybox
    directory.mkdir(exist_ok=True)
    shutil.copy(busybox, directory / "busybox")
    (directory / "Dockerfile").write_text(DOCKERFILE.format(step=step))
    return directory


def host_network() -> tuple[set[str], str, str]:
    """(links, tables of rules, whether the host forwards): what a build with a network changes."""
    listed = subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, text=True, check=True).stdout
    tables = [entry["table"]["name"] for entry in json.loads(listed)["nftables"] if "table" in entry]
    forwards = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()
    return set(os.listdir("/sys/class/net")), " ".join(sorted(tables)), forwards


def own_files(place: Path) -> list[str]:
    """What is being made, or lies there for one build only."""
    cache = place / "cache"
    unfinished = [str(path) for path in cache.glob("tenants/*/layers/.making-*")]
    return [*unfinished, *map(str, cache.glob("contexts/*")), *map(str, cache.glob("uploads/*"))]


@pytest.mark.parametrize("victim", ["daemon", "step"])
@pytest.mark.parametrize("network", ["none", "open"])
def test_in_the_middle_of_a_step(home: Place, tmp_path: Path, victim: str, network: str) -> None:
    before = host_network()
    home.start()
    started = threading.Event()
    outcome: list[TartarusError] = []

    def build() -> None:
        def see(event: object) -> None:
            if "step began" in str(getattr(event, "text", "")):
                started.set()

        made = context(tmp_path / "context", "echo step $((1+0)) began | sed s/1.//; mkdir /made; sleep 600")
        try:
            Template.build(str(made), name="mine", network=network, client=home.client, on_progress=see)
        except TartarusError as error:
            outcome.append(error)

    builder = threading.Thread(target=build)
    builder.start()
    assert started.wait(60)
    if victim == "daemon":
        home.end_daemon(signal.SIGKILL)
        builder.join(60)
        wait_until(lambda: home.processes() == [], "nothing of it runs on")
        home.start()
    else:
        sleeping = next(pid for pid in home.processes() if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"600\0"))
        os.kill(sleeping, signal.SIGKILL)
        builder.join(60)
    assert outcome
    wait_until(lambda: own_files(home.home) == [], "nothing half-made is left")
    assert [found.name for found in Template.list(client=home.client) if found.info.status.value == "building"] == []
    made = context(tmp_path / "context", "echo two >/etc/two")
    Template.build(str(made), name="mine", client=home.client)
    with Sandbox.create("mine", timeout_s=60, client=home.client) as sandbox:
        assert sandbox.run(["cat", "/etc/one", "/etc/two"], check=True).stdout == "one\ntwo\n"
    home.end_daemon(signal.SIGTERM)
    assert host_network() == before


def test_a_snapshot_is_there_whole_or_not_at_all(home: Place) -> None:
    home.start()
    sandbox = Sandbox.create("host", client=home.client)
    sandbox.run(["sh", "-c", "head -c 50000000 /dev/urandom >/srv/large; echo kept >/srv/kept"], check=True)

    def take() -> None:
        with contextlib.suppress(TartarusError):
            sandbox.snapshot(name="files")

    taker = threading.Thread(target=take)
    taker.start()
    wait_until(lambda: list(home.home.glob("cache/tenants/*/layers/.making-*")), "it is being copied")
    home.end_daemon(signal.SIGKILL)
    taker.join(60)
    home.start()
    assert own_files(home.home) == []
    with Sandbox.create("host", client=home.client) as again:
        again.run(["sh", "-c", "echo kept >/srv/kept"], check=True)
        again.snapshot(name="files")
    with Sandbox.create("host", snapshot="files", client=home.client) as restored:
        assert restored.run(["cat", "/srv/kept"], check=True).stdout == "kept\n"
