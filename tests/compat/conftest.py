"""One engine of each kind for a module's tests, and our daemon in a directory of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.compat.engine import Engine, dockerd
from tests.sdk.service import home

__all__ = ["home"]


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    with dockerd() as engine:
        yield engine


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """The current directory: where requests are saved."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
