"""One arena for all attacks: a node and its warmed templates are made once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.escape.arena import Arena, open_arena
from tests.network.topology import World, world


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One event loop for the whole session, because the node lives on it."""
    return "asyncio"


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    """A world of network namespaces."""
    with world(tmp_path / "state") as made:
        yield made


@pytest.fixture(scope="session")
async def arena(anyio_backend: str) -> AsyncIterator[Arena]:
    """The arena; at its end nothing may be left."""
    async with open_arena() as opened:
        yield opened
