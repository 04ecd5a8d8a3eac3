"""`tartarus secret`, as its users type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VALUE = b"s3cr3t \xff\n"


def secret(home: Path, *arguments: str, value: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tartarus.cli.main", "secret", *arguments]
    environ = {**os.environ, "TARTARUS_HOME": str(home)}
    return subprocess.run(command, input=value, capture_output=True, check=False, env=environ)


def test_a_vaults_life_on_the_command_line(tmp_path: Path) -> None:
    assert secret(tmp_path, "create").returncode == 0
    kept = secret(tmp_path, "set", "db", value=VALUE)
    assert (kept.returncode, kept.stdout) == (0, b"Secret 'db' is kept (revision 1)\n")
    assert secret(tmp_path, "get", "db").stdout == VALUE
    assert secret(tmp_path, "rotate").returncode == 0
    (listed,) = json.loads(secret(tmp_path, "list", "--json").stdout)
    assert (listed["name"], listed["revision"], sorted(listed)) == ("db", 1, ["changed_at", "name", "revision"])
    assert secret(tmp_path, "rm", "db").returncode == 0
    gone = secret(tmp_path, "get", "db")
    assert gone.returncode == 125
    assert b"secret_not_found" in gone.stderr


@pytest.mark.parametrize(
    "arguments", [("set", "db", "a-value"), ("set",), ("get", "db", "--identity", "/i", "--passphrase")]
)
def test_no_value_is_taken_from_the_command_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert secret(tmp_path, *arguments).returncode == 125
    assert list(tmp_path.iterdir()) == []
