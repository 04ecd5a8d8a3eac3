"""A world of namespaces for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.network.stage import Stage
from tests.network.topology import World, world
from tests.network.webs import Authority


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "state") as made:
        yield made


@pytest.fixture(name="stage")
def _stage(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle))
    return Stage(world, authority)
