"""`tartarus audit` against a real daemon: what was done and refused is there, can be proved, and a change shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TARTARUS = str(Path(sys.executable).with_name("tartarus"))
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tartarus-audit-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@pytest.fixture(scope="module")
def tartarus(home: Path) -> Iterator[Run]:
    """The command, with a daemon of its own that is stopped at the end."""
    environ = {**os.environ, "TARTARUS_HOME": str(home)}

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [TARTARUS, *arguments]
        return subprocess.run(
            command, env=environ, input=stdin, capture_output=True, text=True, timeout=100, check=False
        )

    yield run
    run("down")


def test_from_what_was_done_to_a_change_that_shows(tartarus: Run, home: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    (home / "config.yaml").write_text(f"audit: {{witness: {witness}}}\n")
    assert tartarus("run", "--", "echo", "a-secret-word").returncode == 0
    small = "id: small\nresources: {max_memory_mb: 64}\n"
    assert tartarus("policy", "put", "-", stdin=small).returncode == 0
    assert tartarus("run", "--memory", "128MiB", "--", "true").returncode == 125

    found = json.loads(tartarus("audit", "list", "--json").stdout)
    said = {(one["action"], one["decision"], one["target"][:4]) for one in found}
    assert {
        ("sandbox.create", "allow", "sbx-"), ("sandbox.end", "", "sbx-"), ("policy.put", "allow", "smal"),
        ("sandbox.create", "deny", "host"),
    } <= said  # fmt: skip
    assert [one["sequence"] for one in found] == list(range(len(found) - 1, -1, -1))
    (refused,) = json.loads(
        tartarus("audit", "list", "--action", "sandbox", "--decision", "deny", "--json", "--limit", "1").stdout
    )
    assert refused["action"] == "sandbox.create"
    assert (refused["reason"], refused["rules"]) == ("minos: memory of one sandbox: 128 MiB", ["small"])
    assert refused["actor"] == f"uid-{os.geteuid()}"
    assert "memory of one sandbox" in tartarus("audit", "list", "--since", "1h").stdout
    exported = tartarus("audit", "export").stdout
    assert "a-secret-word" not in exported
    assert len(exported.splitlines()) >= len(found)
    assert "All of it holds." in tartarus("audit", "verify").stdout

    # A daemon that ends signs: by then all is proved that was said.
    assert tartarus("down").returncode == 0
    key = (home / "audit" / "key.pub").read_text().strip()
    offline = ("audit", "verify", "--directory", str(home / "audit"), "--witness", str(witness), "--key", key)
    assert tartarus(*offline).returncode == 0
    proof = tartarus("audit", "prove", "0").stdout  # of a daemon that has begun anew
    assert tartarus("audit", "check-proof", "-", "--key", key, stdin=proof).returncode == 0
    forged = proof.replace('"decision":"allow"', '"decision":"deny"')
    assert tartarus("audit", "check-proof", "-", "--key", key, stdin=forged).returncode == 1
    assert tartarus("audit", "prove", "100000").returncode == 125

    (segment,) = (home / "audit" / "log").glob("entries-*.jsonl")
    segment.write_text(re.sub("memory of one sandbox: 128", "memory of one sandbox: 127", segment.read_text()))
    changed = tartarus(*offline)
    assert changed.returncode == 1
    assert "is not what its hash says" in changed.stdout
    # The next daemon says so, and is not locked out.
    assert tartarus("down").returncode == 0
    assert tartarus("audit", "list", "--action", "audit.break", "--json").stdout.count("audit.break") == 1
    assert len(list((home / "audit").glob("broken-*"))) == 1


def test_mistakes(tartarus: Run) -> None:
    for arguments in (
        ("list", "--since", "soon"), ("verify", "--directory", "/nowhere"), ("verify", "--key", "x"),
        ("prove", "-1"), ("check-proof", "/nowhere", "--key", "x"),
    ):  # fmt: skip
        assert tartarus("audit", *arguments).returncode == 125, arguments
