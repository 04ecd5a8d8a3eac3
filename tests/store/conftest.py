"""A fresh store, and records to put into it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from tartarus.model.ids import new_id
from tartarus.model.sandbox import Isolation, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.store import SandboxStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_clock = itertools.count(1_000)


def a_record(**fields: Any) -> SandboxRecord:
    """A pending sandbox, created later than every one before it."""
    name = fields.pop("name", "")
    labels = fields.pop("labels", {})
    defaults: dict[str, Any] = {
        "id": new_id("sbx"),
        "tenant": "uid-1",
        "name": name,
        "template": "host",
        "isolation": Isolation.CONTAINER,
        "isolation_reason": "asked for",
        "state": State.PENDING,
        "spec": SandboxSpec(name=name, labels=labels),
        "created_at": float(next(_clock)),
    }
    return SandboxRecord(**(defaults | fields))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
async def store(path: Path, anyio_backend: str) -> AsyncIterator[SandboxStore]:
    opened = await SandboxStore.open(path)
    yield opened
    await opened.close()
