"""The rule about skips, tried on small test files: CI has no silent holes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

DECLARED = 'import pytest\n@pytest.mark.needs("{need}")\ndef test_it():\n    pass\n'


def run(folder: Path, body: str, *, ci: bool) -> tuple[int, str]:
    """Run `body` as a test file below this project's conftest; returns the exit status and the output."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_sample.py").write_text(body)
    root = CONFTEST.parent.parent
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "CI": "true" if ci else ""}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:anyio", "test_sample.py"]
    done = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "body", ['def test_it():\n    pytest.skip("because")\n', 'pytest.importorskip("no_such_thing")\n']
)
def test_an_undeclared_skip_fails_in_ci_only(tmp_path: Path, body: str) -> None:
    assert run(tmp_path, "import pytest\n" + body, ci=True)[0] != 0
    assert run(tmp_path, "import pytest\n" + body, ci=False)[0] in {0, 5}


def test_an_unknown_need_is_an_error(tmp_path: Path) -> None:
    status, output = run(tmp_path, DECLARED.format(need="moonlight"), ci=False)
    assert status == 1
    assert "unknown need 'moonlight'" in output


def test_a_need_that_ci_must_meet_fails_there_and_skips_elsewhere(tmp_path: Path) -> None:
    # With this PATH emptied of bwrap, the same test is skipped by hand and refused in CI.
    body = 'import os\nos.environ["PATH"] = "/nonexistent"\n' + DECLARED.format(need="bwrap")
    status, output = run(tmp_path, body, ci=True)
    assert status == 1
    assert "CI must have 'bwrap'" in output
    assert run(tmp_path, body, ci=False)[0] == 0


def test_a_need_that_ci_may_lack_skips_everywhere(tmp_path: Path) -> None:
    body = 'import os\nos.environ["PATH"] = "/nonexistent"\n' + DECLARED.format(need="docker")
    status, output = run(tmp_path, body, ci=True)
    assert status == 0
    assert "1 skipped" in output
