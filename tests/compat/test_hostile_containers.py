"""Containers of a real Docker engine that mean harm: in their files, their configuration and their names."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.kit import tartarus, text
from tests.compat.engine import Engine, rootfs

from tartarus.sdk import Template

pytestmark = [pytest.mark.needs("root", "dockerd", "busybox", "cgroups"), pytest.mark.usefixtures("home", "place")]
LEVEL = ("--isolation", "container")


@pytest.fixture
def engine(docker: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{docker.socket}")
    yield docker
    docker.clear()
    for template in Template.list():
        if not template.info.builtin:
            template.remove()


def evil_files() -> bytes:
    """A root file system with a setuid shell, devices, and links that lead out."""
    buffer = io.BytesIO(rootfs())
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        shell = tarfile.TarInfo("suid/id")
        content = Path("/bin/busybox").read_bytes()
        shell.size, shell.mode = len(content), 0o6755
        tar.addfile(shell, io.BytesIO(content))
        for name, kind, major, minor in (("disk", tarfile.BLKTYPE, 8, 0), ("mem", tarfile.CHRTYPE, 1, 1)):
            device = tarfile.TarInfo(name)
            device.type, device.mode, device.devmajor, device.devminor = kind, 0o666, major, minor
            tar.addfile(device)
        for name, target in (("out", "/etc/shadow"), ("up", "../../../../../../etc")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    return buffer.getvalue()


def test_files_that_mean_harm_mean_nothing_here(engine: Engine) -> None:
    engine.load("evil", evil_files())
    before = os.stat("/etc/shadow")
    engine.run("evil", "/bin/sh", "-c", "echo x", image="evil", User="app")
    done = tartarus("migrate", "docker", *LEVEL, "evil")
    assert os.stat("/etc/shadow") == before
    assert done.returncode == 0, done.stderr
    check = "cat /disk /mem /out /up/shadow 2>/dev/null; /suid/id -u; ls -l / | sed -n '/^[bc]/p'; echo end"
    assert text("run", "--request", "evil.request.json", "--", "/bin/sh", "-c", check) == "1000\nend\n"


def test_a_configuration_that_looks_like_options(engine: Engine, place: Path) -> None:
    engine.run(
        "tricky", "--privileged", "-v/:/host", Entrypoint=["/bin/echo"],
        Env=["LD_PRELOAD=/x.so", "--network=host", "A=\x1b[2J\nB=\x9b1"],
        Labels={"--privileged": "true", "a=b": "c", "x" * 200: "y", "long": "z" * 5000, "ok": "\x1b[31m\x9b\u202e"},
        WorkingDir="/srv",
    )  # fmt: skip
    done = tartarus("migrate", "docker", *LEVEL, "tricky")
    assert done.returncode == 0, done.stderr
    assert not any(mark in done.stdout.decode() for mark in ("\x1b", "\x9b", "\u202e"))
    request = json.loads((place / "tricky.request.json").read_text())
    assert request["labels"] == {"--privileged": "true", "ok": "\x1b[31m\x9b\u202e"}
    assert request["command"]["argv"] == ["/bin/echo", "--privileged", "-v/:/host"]
    assert text("run", "--request", "tricky.request.json") == "--privileged -v/:/host\n"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"Env": [f"V{number}=x" for number in range(5000)]}, "environment is too large"),
        ({"Env": ["BIG=" + "x" * (1 << 20)]}, "environment is too large"),
        ({"Env": ["=nameless"]}, "no process could have"),
        ({"User": "nobody-knows-me"}, "nobody-knows-me"),
    ],
)
def test_what_no_sandbox_can_have_is_refused_whole(
    engine: Engine, place: Path, config: dict[str, Any], why: str
) -> None:
    try:
        engine.create("bad", "/bin/true", **config)
    except AssertionError:
        return  # the engine itself refuses it
    done = tartarus("migrate", "docker", *LEVEL, "bad")
    assert done.returncode == 125
    assert why in done.stderr.decode()
    assert list(place.iterdir()) == []
    assert [template.name for template in Template.list() if not template.info.builtin] == []


def test_a_template_is_as_closed_as_any(engine: Engine, place: Path) -> None:
    """A privileged container's heir has no power that another sandbox lacks."""
    engine.create("strong", "/bin/true", host={"Privileged": True})
    assert tartarus("migrate", "docker", *LEVEL, "--drop-refused", "strong").returncode == 0
    script = "sed -n '/CapEff/p;/NoNewPrivs/p' /proc/self/status; ls /dev/sda /dev/vda 2>/dev/null; echo end"
    said = text("run", "--request", "strong.request.json", "--", "/bin/sh", "-c", script)
    assert said.split() == ["CapEff:", "0000000000000000", "NoNewPrivs:", "1", "end"]
    assert stat.S_IMODE((place / "strong.request.json").stat().st_mode) == 0o600
