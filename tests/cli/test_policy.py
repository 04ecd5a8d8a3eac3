"""`tartarus policy` against a real daemon: in force at once, with its history, tried before it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TARTARUS = str(Path(sys.executable).with_name("tartarus"))
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def tartarus() -> Iterator[Run]:
    """The command, with a daemon of its own that is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="tartarus-policy-") as home:
        Path(home).chmod(0o711)
        environ = {**os.environ, "TARTARUS_HOME": home}

        def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
            command = [TARTARUS, *arguments]
            return subprocess.run(
                command, env=environ, input=stdin, capture_output=True, text=True, timeout=100, check=False
            )

        yield run
        run("down")


def test_a_policy_from_its_first_version_to_its_end(tartarus: Run, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    assert tartarus("run", "--memory", "256MiB", "--", "true").returncode == 0
    file.write_text("id: small\nresources:\n  max_memory_mb: 128\n")
    assert tartarus("policy", "check", str(file)).stdout == f"{file} is right: policy 'small'\n"
    report = json.loads(tartarus("policy", "dry-run", "--json", str(file)).stdout)
    assert (report["requests"], report["rejected_before"], report["rejected_after"]) == (1, 0, 1)
    assert report["changed"][0]["reasons"] == ["memory of one sandbox: 256 MiB"]

    assert tartarus("policy", "put", str(file)).stdout == "Policy 'small' is in force (version 1)\n"
    refused = tartarus("run", "--memory", "256MiB", "--", "true")
    assert refused.returncode == 125
    assert "error[rejected]" in refused.stderr
    assert "minos: memory of one sandbox: 256 MiB" in refused.stderr
    assert "at most 128 MiB" in refused.stderr
    assert tartarus("run", "--memory", "128MiB", "--", "true").returncode == 0

    wider = "id: small\nresources:\n  max_memory_mb: 512\n"
    assert "version 2" in tartarus("policy", "put", "-", "--comment", "more", stdin=wider).stdout
    assert tartarus("run", "--memory", "256MiB", "--", "true").returncode == 0
    assert "-  max_memory_mb: 128\n+  max_memory_mb: 512\n" in tartarus("policy", "diff", "small", "1").stdout
    assert tartarus("policy", "put", "-", "--expected", "1", stdin=wider).returncode == 125
    assert tartarus("policy", "rollback", "small", "1").returncode == 0
    assert tartarus("policy", "show", "small").stdout == file.read_text()

    # A daemon that starts anew has them in force before it serves.
    assert tartarus("down").returncode == 0
    assert tartarus("run", "--memory", "256MiB", "--", "true").returncode == 125
    assert tartarus("policy", "delete", "small").returncode == 0
    assert tartarus("run", "--memory", "256MiB", "--", "true").returncode == 0
    history = json.loads(tartarus("policy", "history", "small", "--json").stdout)
    assert [(one["version"], one["deleted"]) for one in history] == [(4, True), (3, False), (2, False), (1, False)]
    assert history[2]["comment"] == "more"
    assert json.loads(tartarus("policy", "list", "--json").stdout) == []


def test_mistakes_change_nothing(tartarus: Run) -> None:
    done = tartarus("policy", "put", "-", stdin="id: p\nresources: {max_memory: 1}\n")
    assert done.returncode == 125
    assert "line 2: unknown key 'max_memory' in resources" in done.stderr
    for arguments in (
        ("show", "none"),
        ("history", "none"),
        ("delete", "none"),
        ("diff", "none", "1"),
        ("show", "../x"),
    ):
        assert tartarus("policy", *arguments).returncode == 125, arguments
    assert json.loads(tartarus("policy", "list", "--json").stdout) == []
