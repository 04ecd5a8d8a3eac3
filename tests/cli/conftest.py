"""The fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.sdk.service import home, levels, sandbox

from tartarus import Sandbox
from tartarus.sdk.daemon import try_connect
from tartarus.sdk.places import Places

__all__ = ["home", "levels", "sandbox"]


@pytest.fixture
def clean(home: Places) -> Iterator[Places]:
    """The daemon, without sandboxes of other tests before and without ours after."""
    yield home
    connection = try_connect(home)
    if connection is not None:
        connection.close()
        for left in Sandbox.list():
            left.kill()
