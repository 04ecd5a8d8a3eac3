"""The way from packages to an answer: an image in a registry, a Dockerfile on it, warm, in a container."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.needs("root", "cgroups", "mmdebstrap", "docker-registry")


def test_an_image_becomes_a_template(tartarus, base):
    said = tartarus("init", "template", "--name", "my-python", "--from", base)
    lines = said.splitlines()
    assert lines[:4] == [
        f"Creating template 'my-python' from {base}...", "✓ Pulled image", "✓ Built rootfs", "✓ Created snapshot",
    ]  # fmt: skip
    assert re.fullmatch(r"Template 'my-python' ready \(ID: tpl-[0-9a-z]+\)", lines[4])
    assert tartarus("run", "--template", "my-python", "--", "python3", "-c", "print('Hello from Tartarus')") == (
        "Hello from Tartarus\n"
    )


def test_without_a_login_there_is_nothing(tartarus, base):
    environ, tartarus.environ = tartarus.environ, {**tartarus.environ, "DOCKER_CONFIG": "/nonexistent"}
    try:
        said = tartarus("init", "template", "--name", "stranger", "--from", base, status=125)
    finally:
        tartarus.environ = environ
    assert "docker login" in said
    assert "stranger" not in tartarus("template", "list")


def test_a_dockerfile_on_it_installs_numpy_and_runs_warm(tartarus, base, tmp_path):
    (tmp_path / "Dockerfile").write_text(
        f"FROM {base}\n"
        "RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir numpy\n"
        "ENV PATH=/opt/venv/bin:$PATH\n"
        "RUN useradd --create-home app\n"
        "COPY answer.py /home/app/\n"
        "USER app\nWORKDIR /home/app\n"
    )
    (tmp_path / "answer.py").write_text("import numpy\nprint(int(numpy.arange(10).sum()))\n")
    (tmp_path / "template.yaml").write_text(
        "id: answer\nname: Answer\ndockerfile: Dockerfile\nwarmup_script: |\n  import numpy\n"
    )
    build = ("template", "build", str(tmp_path), "-f", str(tmp_path / "template.yaml"), "--ca-bundle")
    refused = tartarus(*build, status=125)
    assert "tartarus run -it --template answer-failed" in refused  # no network was given
    tartarus(*build, "--network", "open")
    run = ("run", "--template", "answer", "--isolation", "container")
    assert tartarus(*run, "--", "python3", "answer.py") == "45\n"
    assert tartarus(*run, "--", "id", "-un") == "app\n"
    assert '"warm": true' in tartarus(*run, "--json", "--", "python3", "answer.py").replace(
        '"warm":true', '"warm": true'
    )
    again = tartarus(*build, "--network", "open", "--replace")
    assert "Collecting numpy" not in again  # every step was cached
    tartarus("template", "rm", "answer", "answer-failed")


def test_a_snapshot_from_the_command_line(tartarus, base):
    tartarus("run", "--detach", "--name", "box", "--template", "my-python", "--", "sleep", "600")
    tartarus("exec", "box", "--", "sh", "-c", "echo kept >/srv/kept")
    assert "files" in tartarus("snapshot", "create", "box", "--name", "files")
    tartarus("kill", "box")
    assert tartarus("run", "--snapshot", "files", "--", "cat", "/srv/kept") == "kept\n"
    assert "files" in tartarus("snapshot", "list")
    tartarus("snapshot", "delete", "files")
    assert "files" not in tartarus("snapshot", "list")


def test_what_it_holds(tartarus, base):
    found = tartarus("template", "scan", "my-python", "--format", "cyclonedx")
    assert '"bomFormat":"CycloneDX"' in found.replace(" ", "")
    assert "pkg:deb/debian/python3" in found
