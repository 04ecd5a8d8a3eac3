"""The real daemon in a directory of its own, started by the first client that needs it and stopped at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tartarus.sdk import Client, Sandbox
from tartarus.sdk.daemon import stop
from tartarus.sdk.places import Places


@pytest.fixture(scope="module")
def home() -> Iterator[Places]:
    """TARTARUS_HOME of these tests; a short path, since a Unix socket's has few bytes."""
    directory = tempfile.mkdtemp(prefix="tt-")
    before = os.environ.get("TARTARUS_HOME")
    os.environ["TARTARUS_HOME"] = directory
    places = Places.at(directory)
    try:
        yield places
    finally:
        stop(places, 60)
        if before is None:
            del os.environ["TARTARUS_HOME"]
        else:
            os.environ["TARTARUS_HOME"] = before
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def levels(home: Places) -> list[str]:
    """The isolation levels that this host can give."""
    return [level.isolation for level in Client().levels() if level.ok]


@pytest.fixture
def sandbox(home: Places) -> Iterator[Sandbox]:
    """A fresh sandbox at the strongest level there is."""
    with Sandbox.create(timeout_s=120) as made:
        yield made
