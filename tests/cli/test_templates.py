"""The commands that make and manage templates and snapshots, as people type them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.kit import OnTerminal, refused, start, tartarus, text
from tests.library import EXPORTED
from tests.library_service import Served, served

from tartarus.model.errors import InvalidRequest
from tartarus.model.library import DockerfileSource, ImageSource, TemplateBase, UploadSource
from tartarus.sdk.shorthand import environment


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with served() as found:
        yield found


@pytest.fixture
def server(shared: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Served:
    """The server with the tests' own templates is the daemon of this environment."""
    shared.reset()
    monkeypatch.setenv("TARTARUS_HOME", shared.home)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return shared


SESSION = """\
Creating template 'my-python' from python:3.11...
✓ Pulled image
✓ Built rootfs
✓ Created snapshot
Template 'my-python' ready (ID: tpl-…)
"""


def test_the_roadmaps_session(server):
    said = text("init", "template", "--name", "my-python", "--from", "python:3.11")
    assert re.sub(r"tpl-[0-9a-z]{16}", "tpl-…", said) == SESSION
    (request,) = server.service.library.templates.requests
    assert request.source == ImageSource("python:3.11")
    assert (
        "error[template_exists]"
        in tartarus("init", "template", "--name", "my-python", "--from", "python:3.11").stderr.decode()
    )


def test_the_session_on_a_terminal_shows_no_bar_for_what_is_quick(server):
    terminal = OnTerminal(["init", "template", "--name", "my-python", "--from", "python:3.11"])
    said = terminal.expect(b"ready (ID: ")
    assert terminal.wait() == 0
    assert b"\x1b" not in said
    assert said.decode().splitlines()[:4] == SESSION.splitlines()[:4]


def test_what_takes_longer_than_a_second_shows_how_far_it_is(server):
    terminal = OnTerminal(["template", "pull", "slow:1"])
    terminal.expect("Pulling image… 1s".encode())
    terminal.type(b"\x03")
    assert terminal.wait() == 130


def test_interrupting_ends_the_work(server):
    server.service.library.templates.cancelled.clear()
    with start("template", "pull", "slow:1") as process:
        end = time.monotonic() + 20
        while not server.service.library.templates.requests:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(2)
        assert process.wait(20) == 130
    while not server.service.library.templates.cancelled.is_set():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_from_a_dockerfile(server, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM host\nCOPY a /a\nRUN echo hi\n")
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("left out")
    (tmp_path / ".dockerignore").write_text("b\n.dockerignore\nDockerfile\n")
    done = tartarus("init", "template", "--name", "mine", "--from", "./Dockerfile", cwd=tmp_path)
    assert done.returncode == 0
    assert [line for line in done.stdout.decode().splitlines() if "ID" not in line] == [
        "Creating template 'mine' from ./Dockerfile...", "✓ Built image", "✓ Built rootfs", "✓ Created snapshot",
    ]  # fmt: skip
    assert sorted(server.service.library.templates.received[0]["members"]) == [".dockerignore", "a"]
    steps = done.stderr.decode()
    assert "[1/3] FROM host (cached)\n" in steps
    assert "[3/3] RUN echo hi\n  running RUN echo hi\n" in steps
    assert "\x1b" not in steps
    directory = tartarus("init", "template", "--name", "other", "--from", str(tmp_path), "--json")
    assert json.loads(directory.stdout)["name"] == "other"


def test_build(server, tmp_path, monkeypatch):
    (tmp_path / "Dockerfile").write_text("ARG V\nFROM registry.example.org/base:${V}\nRUN make\n")
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(
        '{"auths": {"registry.example.org": {"auth": "bWU6aHVudGVyMg=="}, "other.example.org": {"auth": "eDp5"}}}'
    )
    monkeypatch.setenv("V", "1")
    done = tartarus(
        "template", "build", str(tmp_path), "--name", "mine", "--build-arg", "V", "--network", "open", "--ca-bundle",
        "--no-cache", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "mine"
    (request,) = server.service.library.templates.requests
    assert isinstance(request.source, DockerfileSource)
    assert (request.source.args, request.source.no_cache, request.network.value) == ({"V": "1"}, True, "open")
    assert request.ca_bundle
    (login,) = request.source.credentials
    assert (login.registry, login.username, login.password) == ("registry.example.org", "me", "hunter2")
    assert b"hunter2" not in done.stderr + done.stdout


def test_a_failing_build_says_where_and_what_to_do(server, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM host\nRUN exit 3\n")
    done = tartarus("template", "build", str(tmp_path), "--name", "mine")
    assert done.returncode == 125
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("tartarus: error[build_failed]: step 2 of 2, line 2: RUN exit 3")
    assert "tartarus run -it --template build-x-failed -- sh" in last


def test_a_bad_dockerfile_is_refused_before_anything_is_sent(server, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM host\nRUNN make\n")
    done = tartarus("template", "build", str(tmp_path), "--name", "mine")
    assert done.returncode == 125
    assert b"RUNN" in done.stderr
    assert b"line 2" in done.stderr
    assert server.service.library.templates.requests == []


def test_build_from_yaml(server, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "id: python-ds-2\nname: Python Data Science\nbase_image: python:3.11-slim\nresources:\n  default_cpu: 2\n"
    )
    done = tartarus("template", "build", "-f", "my.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("Creating template 'python-ds-2' from my.yaml...\n✓ Pulled image\n")
    (request,) = server.service.library.templates.requests
    assert request.source == ImageSource("python:3.11-slim")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.yaml").write_text("id: d\ndockerfile: Dockerfile\n")
    (tmp_path / "sub" / "Dockerfile").write_text("FROM host\n")
    assert tartarus("template", "build", "-f", "sub/d.yaml", cwd=tmp_path).returncode == 0
    assert sorted(server.service.library.templates.received[0]["members"]) == ["Dockerfile", "d.yaml"]
    (tmp_path / "bad.yml").write_text("id: x\nbase_image: host\nwarmup_scrip: y\n")
    line = refused("template", "build", "-f", str(tmp_path / "bad.yml"))
    assert "bad.yml, line 3: unknown key 'warmup_scrip' (did you mean 'warmup_script'?)" in line
    text("init", "template", "--name", "second", "--from", "python-ds-2")
    assert server.service.library.templates.requests[-1].source == TemplateBase("python-ds-2")


def test_what_is_wrong_is_said_in_one_line(server, tmp_path):
    assert "No such file" in refused("template", "build", str(tmp_path), "--name", "x")
    assert "is no directory" in refused("template", "build", "/nowhere", "--name", "x")
    (tmp_path / "Dockerfile").write_text("FROM host\n")
    assert "has no name" in refused("template", "build", str(tmp_path))
    assert "No such file" in refused("template", "import", "./nothing")
    assert "no name" in refused("template", "import", "-")
    assert "not a valid name" in tartarus("template", "pull", "x", "--name", "a/b").stderr.decode()
    assert "--from" in refused("init", "template", "--name", "x")
    assert "template_not_found" in refused("template", "scan", "nobody")
    assert tartarus("template", "rm", "nobody").returncode == 125
    assert "not a build argument" in refused("template", "build", str(tmp_path), "--name", "x", "--build-arg", "=x")


def test_import_from_a_file_and_from_standard_input(server, tmp_path):
    archive = tmp_path / "saved.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("manifest.json"))
    assert "Template 'saved' ready" in text("template", "import", str(archive), "--reference", "app:1")
    (request,) = server.service.library.templates.requests
    assert isinstance(request.source, UploadSource)
    assert request.source.reference == "app:1"
    done = tartarus("template", "import", "-", "--name", "piped", input=archive.read_bytes())
    assert done.returncode == 0, done.stderr
    first, second = server.service.library.templates.received
    assert first["digest"] == second["digest"]


def test_list_inspect_warm_push_and_rm(server, tmp_path):
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text('{"auths": {"example.org": {"identitytoken": "t0ken"}}}')
    text("template", "pull", "python:3.11")
    head, host, own = text("template", "list").splitlines()
    assert head.split() == ["TEMPLATE", "BASE", "STATUS", "SIZE", "MEMORY", "CPUS", "WARM", "DESCRIPTION"]
    assert host.split()[0] == "host"
    assert own.split()[:4] == ["python-3.11", "python:3.11", "ready", "123MiB"]
    assert [item["name"] for item in json.loads(text("template", "list", "--json"))] == ["host", "python-3.11"]
    (info,) = json.loads(text("template", "inspect", "python-3.11"))
    assert (info["base"], info["status"]) == ("python:3.11", "ready")
    assert text("template", "warm", "python-3.11") == "Template python-3.11 warmed (in 9 ms)\n"
    pushed = text("template", "push", "python-3.11", "example.org/mine:1")
    assert pushed.startswith("✓ Pushed image\nTemplate 'python-3.11' pushed to example.org/mine:1 (sha256:")
    assert server.service.library.templates.pushes[0].credentials[0].token == "t0ken"
    assert text("template", "rm", "python-3.11") == "Template python-3.11 removed\n"


def test_scan(server, tmp_path):
    text("template", "pull", "python:3.11", "--name", "mine")
    table = text("template", "scan", "mine").splitlines()
    assert table[1].split()[:3] == ["CVE-2026-1", "high", "openssl"]
    assert table[2] == "2 of 3 packages checked with a test, newest advisory 2026-11-20: 1 high"
    assert table[3] == "not checked: one"
    assert json.loads(text("template", "scan", "mine", "--format", "json"))["counts"]["high"] == 1
    assert json.loads(text("template", "scan", "mine", "--format", "cyclonedx"))["bomFormat"] == "CycloneDX"
    assert tartarus("template", "scan", "mine", "--fail-on", "high").returncode == 1
    assert tartarus("template", "scan", "mine", "--fail-on", "critical").returncode == 0
    text("template", "pull", "python:3.11", "--name", "blocked")
    assert tartarus("template", "scan", "blocked").returncode == 1
    with zipfile.ZipFile(tmp_path / "all.zip", "w"):
        pass
    text("template", "scan", "mine", "--database", str(tmp_path / "all.zip"))
    assert server.service.library.templates.scans[-1][1] == (tmp_path / "all.zip").stat().st_size
    assert "no zip" in refused("template", "scan", "mine", "--database", __file__)


def test_snapshots(server):
    name = text("run", "-d", "--isolation", "process", "--", "sleep", "60").strip()
    made = text("snapshot", "create", name, "--name", "before", "--label", "a=b")
    found = re.fullmatch(r"Snapshot 'before' created \(ID: (snap-[0-9a-z]{16}), 4KiB\)\n", made)
    assert found is not None
    snapshot = found[1]
    head, row = text("snapshot", "list").splitlines()
    assert head.split() == ["ID", "NAME", "KIND", "TEMPLATE", "SANDBOX", "SIZE", "CREATED"]
    assert row.split()[:5] == [snapshot, "before", "files", "host", name]
    assert text("snapshot", "list", "-q") == f"{snapshot}\n"
    (info,) = json.loads(text("snapshot", "inspect", "before"))
    assert (info["id"], info["labels"]) == (snapshot, {"a": "b"})
    assert text("snapshot", "delete", "before") == "Snapshot before deleted\n"
    assert json.loads(text("snapshot", "list", "--json")) == []
    text("kill", "-q", name)


def test_snapshots_of_memory(server, tmp_path):
    name = text("run", "-d", "--isolation", "process", "--", "sleep", "60").strip()
    made = text("snapshot", "create", "--memory", name, "all")
    assert re.fullmatch(r"Snapshot 'all' created \(ID: snap-[0-9a-z]{16}, 4KiB, stood still for 12 ms\)\n", made)
    assert "two names" in refused("snapshot", "create", name, "one", "--name", "other")
    text("snapshot", "create", name, "files")
    file = tmp_path / "all.snapshot"
    assert text("snapshot", "export", "all", str(file)) == f"Snapshot all exported to {file}\n"
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (EXPORTED, 0o600)
    assert "already" in refused("snapshot", "export", "all", str(file))
    assert "error[unsupported]" in refused("snapshot", "export", "files", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    again = json.loads(text("snapshot", "import", str(file), "--name", "again", "--json"))
    assert (again["name"], again["kind"]) == ("again", "memory")
    file.write_bytes(b"something else")
    assert "error[snapshot_refused]" in refused("snapshot", "import", str(file))
    assert server.uploads == []
    text("kill", "-q", name)


def test_a_process_can_not_be_forked(server):
    name = text("run", "-d", "--isolation", "process", "--", "sleep", "60").strip()
    assert "error[unsupported]" in refused("fork", name, "-n", "2")
    assert "error[invalid_request]" in refused("fork", name, "-n", "65")
    assert "error[sandbox_not_found]" in refused("fork", "nobody")
    text("kill", "-q", name)


def test_completion(server):
    text("template", "pull", "python:3.11", "--name", "mine")
    words = {"_TARTARUS_COMPLETE": "bash_complete", "COMP_WORDS": "tartarus template rm mi", "COMP_CWORD": "3"}
    done = tartarus(env={**os.environ, **words})
    assert done.stdout.decode().split() == ["plain,mine"]


def test_running_does_not_import_what_templates_need():
    program = (
        "import sys; from tartarus.cli import launch, quick, options, relay; "
        "print([m for m in sys.modules if m in {'yaml', 'click', 'msgspec', 'tarfile', 'tartarus.model.library'}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_build_arguments():
    assert environment(["A=1", "B", "C=", "D"], {"B": "own"}, "build argument") == {"A": "1", "B": "own", "C": ""}
    with pytest.raises(InvalidRequest):
        environment(["=x"], {}, "build argument")
