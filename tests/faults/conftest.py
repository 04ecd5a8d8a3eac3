"""A place of its own for each test; nothing of it may be on the host when the test is over."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from .place import Place, place


@pytest.fixture
def home() -> Iterator[Place]:
    """A place without a daemon."""
    with place() as made:
        yield made


@pytest.fixture
def up(home: Place) -> Iterator[Place]:
    """A place with a daemon, which is stopped at the end and must then have left nothing at all."""
    home.start()
    yield home
    assert home.daemon is not None
    if home.daemon.poll() is None:
        assert home.end_daemon(signal.SIGTERM) == 0
    home.settle()
    assert home.parent_groups() == []
    assert not home.socket.exists()
