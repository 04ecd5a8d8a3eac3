"""`config` shows what would be in force, and names a file's first mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TARTARUS = str(Path(sys.executable).with_name("tartarus"))


def tartarus(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "TARTARUS_HOME": str(home)}
    return subprocess.run([TARTARUS, *arguments], env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_config_shows_what_is_in_force(tmp_path: Path) -> None:
    assert "(there is none)" in tartarus(tmp_path, "config").stdout
    (tmp_path / "config.yaml").write_text("ended_kept: 48h\n")
    shown = tartarus(tmp_path, "config").stdout
    assert [line.split() for line in shown.splitlines() if "ended_kept" in line] == [
        ["ended_kept", "2d", "default", "7d"]
    ]
    found = json.loads(tartarus(tmp_path, "config", "--json").stdout)
    assert found["file"] == str(tmp_path / "config.yaml")
    assert found["settings"]["ended_kept"] == "2d"


def test_config_check_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text("isolation:\n  floor: weak\n")
    done = tartarus(tmp_path, "config", "check", str(file))
    assert done.returncode == 125
    assert "line 2: isolation.floor: 'weak' is none of the values" in done.stderr
    file.write_text("isolation:\n  floor: container\n")
    assert tartarus(tmp_path, "config", "check", str(file)).stdout == f"{file} is right\n"
    assert tartarus(tmp_path, "config", "check", str(tmp_path / "none")).returncode == 125
