"""The agent's C code under the address and undefined-behaviour sanitizers: its unit tests, and the tests beside this file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import SOURCES

pytestmark = pytest.mark.needs("cc", "make", "sanitizers")
HERE = Path(__file__).parent
MODULES = ("exec", "files", "hostile_host", "ports", "sessions", "surroundings", "warm")


def test_unit_tests(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "test", f"BUILD={tmp_path}"], cwd=SOURCES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "frame_test: ok" in done.stdout


def test_the_whole_agent(tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "sanitized", f"BUILD={tmp_path}"], cwd=SOURCES, check=True)
    environment = {**os.environ, "TARTARUS_TEST_AGENT": str(tmp_path / "tartarus-guest-sanitized")}
    modules = [str(HERE / f"test_{name}.py") for name in MODULES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
