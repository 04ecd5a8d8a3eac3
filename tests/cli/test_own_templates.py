"""Templates and snapshots with the real daemon: made over the host's programs, so that nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.kit import refused, tartarus, text

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
    (tmp_path / "Dockerfile").write_text("FROM nowhere.invalid/x:1\nCOPY a /\n")
    (tmp_path / "a").write_text("x")
    done = tartarus("template", "build", str(tmp_path), "--name", "never")
    assert done.returncode == 125
    assert list(Path(home.state_dir, "cache", "uploads").glob("*")) == []
    assert "never" not in text("template", "list")
