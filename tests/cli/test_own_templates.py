"""Templates and snapshots with the real daemon: made over the host's programs, so that nothing is downloaded."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.kit import refused, tartarus, text
from tests.images.registries import PASSWORD, USER, docker_registry, htpasswd_auth

from tartarus.sdk.places import Places

pytestmark = pytest.mark.usefixtures("clean")

YAML = """\
id: own-host
name: My own
base_image: host
env: {GREETING: hello}
warmup_script: |
  import decimal
resources: {default_cpu: 0.5, default_memory: 256, max_memory: 512}
"""


def test_a_template_of_ones_own(home: Places, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(YAML)
    said = text("template", "build", "-f", str(tmp_path / "my.yaml")).splitlines()
    assert said[0].startswith("Creating template 'own-host' from ")
    assert said[-2] == "✓ Created snapshot"
    assert said[-1].startswith("Template 'own-host' ready (ID: tpl-")
    program = "import os, sys; print(os.environ['GREETING'], 'decimal' in sys.modules)"
    assert text("run", "--template", "own-host", "--", "python3", "-c", program) == "hello True\n"
    assert "more memory than template 'own-host' allows" in refused(
        "run", "--template", "own-host", "--memory", "1GiB", "--", "true"
    )
    (info,) = json.loads(text("template", "inspect", "own-host"))
    assert (info["base"], info["status"], info["title"], info["build"]) == ("host", "ready", "My own", 1)
    again = tartarus("template", "build", "-f", str(tmp_path / "my.yaml"))
    assert b"error[template_exists]" in again.stderr
    text("template", "build", "-f", str(tmp_path / "my.yaml"), "--replace")
    (info,) = json.loads(text("template", "inspect", "own-host"))
    assert info["build"] == 2
    assert "own-host" in text("template", "list")
    assert text("template", "warm", "own-host").startswith("Template own-host warmed")
    assert text("template", "rm", "own-host") == "Template own-host removed\n"
    assert "error[template_not_found]" in refused("run", "--template", "own-host", "--", "true")


def test_built_in_names_are_not_taken(home: Places) -> None:
    for name in ("host", "python-ds"):
        done = tartarus("init", "template", "--name", name, "--from", "host")
        assert done.returncode == 125
        assert b"built-in" in done.stderr
        assert b"built-in" in tartarus("template", "rm", name).stderr


def test_what_was_sent_does_not_stay(home: Places, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY missing /\n")
    (tmp_path / "a").write_text("x")
    done = tartarus("template", "build", str(tmp_path), "--name", "never")
    assert done.returncode == 125
    assert list(Path(home.state_dir, "cache", "uploads").glob("*")) == []
    assert "never" not in text("template", "list")


def small_root(place: Path) -> Path:
    """A root file system of this host's sh and cat, and the libraries they need."""
    for program in ("sh", "cat"):
        source = shutil.which(program)
        assert source is not None
        found = subprocess.run(["ldd", source], capture_output=True, text=True, check=True).stdout
        for path in (f"/bin/{program}", *re.findall(r"(/\S+) \(", found)):
            target = place / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path if path != f"/bin/{program}" else source, target)
    (place / "etc").mkdir()
    (place / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    return place


@pytest.mark.needs("root", "cgroups")
def test_from_a_root_file_system_over_a_dockerfile_to_a_snapshot(home: Places, tmp_path: Path) -> None:
    said = text("template", "import", str(small_root(tmp_path / "tiny"))).splitlines()
    assert said[1:-1] == ["✓ Imported image", "✓ Built rootfs", "✓ Created snapshot"]
    assert text("run", "--template", "tiny", "--", "cat", "/etc/passwd").startswith("root:x:0:0")
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(
        'FROM tiny\nARG V=1\nCOPY a /srv/a\nRUN cat /srv/a && echo "built $V" > /out\nENV X=y\nWORKDIR /srv\n'
    )
    (context / "a").write_text("from the context\n")
    (context / "secret").write_text("left out")
    (context / ".dockerignore").write_text("secret\n")
    done = tartarus("template", "build", str(context), "--name", "built", "--build-arg", "V=7")
    assert done.returncode == 0, done.stderr
    assert "RUN cat /srv/a" in done.stderr.decode()
    assert "  from the context\n" in done.stderr.decode()
    assert text("run", "--template", "built", "--", "sh", "-c", "cat /out; echo $X; pwd") == "built 7\ny\n/srv\n"
    again = tartarus("template", "build", str(context), "--name", "built", "--build-arg", "V=7", "--replace")
    assert "(cached)" in again.stderr.decode()

    live = text("run", "-d", "--template", "built", "--", "sh", "-c", "echo kept > /kept; exec cat /dev/zero").strip()
    wait_for(lambda: tartarus("exec", live, "cat", "/kept").returncode == 0)
    assert text("snapshot", "create", live, "--name", "kept").startswith("Snapshot 'kept' created (ID: snap-")
    text("kill", "-q", live)
    for _ in range(2):  # nothing that one writes is the next one's
        script = "cat /kept /out; echo changed > /kept"
        assert text("run", "--snapshot", "kept", "--", "sh", "-c", script) == "kept\nbuilt 7\n"
    text("template", "rm", "built")
    assert text("run", "--snapshot", "kept", "--", "cat", "/out") == "built 7\n"
    text("snapshot", "delete", "kept")
    assert "error[snapshot_not_found]" in refused("run", "--snapshot", "kept", "--", "true")

    (context / "Dockerfile").write_text("FROM tiny\nRUN echo before; exit 3\n")
    failed = tartarus("template", "build", str(context), "--name", "failing")
    last = failed.stderr.decode().splitlines()[-1]
    assert failed.returncode == 125
    assert "error[build_failed]" in last
    assert "RUN echo before; exit 3" in last
    assert "  before\n" in failed.stderr.decode()
    shell = re.search(r"tartarus run -it --template (\S+) -- ", last)
    assert shell is not None, last
    assert text("run", "--template", shell[1], "--", "cat", "/etc/passwd").startswith("root")
    assert b"error[template_not_found]" in tartarus("template", "inspect", "failing").stderr
    assert list(Path(home.state_dir, "cache", "uploads").glob("*")) == []


@pytest.mark.needs("root", "cgroups", "docker-registry")
def test_push_and_pull_with_a_login(home: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    text("template", "import", str(small_root(tmp_path / "root")), "--name", "pushed")
    with docker_registry(tmp_path / "registry", htpasswd_auth(tmp_path / "registry")) as registry:
        image = registry.reference("own/tiny:1")
        assert b"error[" in tartarus("template", "push", "pushed", image).stderr
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (tmp_path / "docker").mkdir()
        (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": login}}}))
        said = text("template", "push", "pushed", image)
        assert said.startswith("✓ Pushed image\nTemplate 'pushed' pushed to ")
        text("template", "rm", "pushed")
        made = text("init", "template", "--name", "pulled", "--from", image).splitlines()
        assert made[:-1] == [
            f"Creating template 'pulled' from {image}...", "✓ Pulled image", "✓ Built rootfs", "✓ Created snapshot",
        ]  # fmt: skip
        assert text("run", "--template", "pulled", "--", "cat", "/etc/passwd").startswith("root")
        (tmp_path / "docker" / "config.json").unlink()
        assert b"error[" in tartarus("template", "pull", image, "--name", "again").stderr
    kept = [Path(home.state_dir, name).read_bytes() for name in ("state.db", "state.db-wal", "daemon.log")]
    assert not any(word.encode() in part for part in kept for word in (PASSWORD, login))


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)
