"""Templates and snapshots in the store: whose they are, what they are called, and two writers at once."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import text

from tartarus.model.definition import Definition, TemplateResources
from tartarus.model.errors import (
    InvalidRequest,
    InvalidState,
    NameTaken,
    SnapshotNotFound,
    TemplateExists,
    TemplateNotFound,
)
from tartarus.model.ids import new_id
from tartarus.model.library import SnapshotRecord, TemplateRecord, TemplateStatus
from tartarus.model.template import WarmUp
from tartarus.store import SandboxStore, database

from .conftest import a_record

pytestmark = pytest.mark.anyio
_clock = itertools.count(1_000)


def a_template(name: str = "mine", **fields: Any) -> TemplateRecord:
    moment = float(next(_clock))
    defaults: dict[str, Any] = {
        "id": new_id("tpl"),
        "tenant": "uid-1",
        "name": name,
        "status": TemplateStatus.READY,
        "definition": Definition(id=name, packages=("numpy",), resources=TemplateResources(default_cpu=2)),
        "base": "python:3.11",
        "created_at": moment,
        "updated_at": moment,
    }
    return TemplateRecord(**(defaults | fields))


def a_snapshot(name: str = "", **fields: Any) -> SnapshotRecord:
    defaults: dict[str, Any] = {
        "id": new_id("snap"),
        "tenant": "uid-1",
        "name": name,
        "sandbox": "sbx-1",
        "template": "host",
        "digest": "sha256:1",
        "size_bytes": 2**40,
        "created_at": float(next(_clock)),
    }
    return SnapshotRecord(**(defaults | fields))


async def test_a_template_comes_back_as_it_was(store: SandboxStore) -> None:
    made = a_template(
        layers=("layer-1", "layer-2"),
        warm_up=WarmUp("/usr/bin/python3", ("numpy",)),
        warmed_at=5.0,
        warm_ms=1.5,
        details={"image": {"env": {"A": "b"}}},
        size_bytes=2**40,
    )
    await store.templates.insert(made)
    assert await store.templates.get("uid-1", "mine") == made
    assert await store.templates.get("uid-1", made.id) == made
    assert await store.templates.get("uid-1", made.id[:10]) == made
    info = made.info
    assert (info.name, info.layers, info.resources.cpu_milli, info.builtin) == ("mine", 2, 2000, False)
    assert msgspec.json.decode(msgspec.json.encode(info), type=type(info)) == info


async def test_names_are_each_tenants_own(store: SandboxStore) -> None:
    first = await store.templates.insert(a_template())
    with pytest.raises(TemplateExists, match="tartarus template rm mine"):
        await store.templates.insert(a_template())
    other = await store.templates.insert(a_template(tenant="uid-2"))
    assert await store.templates.list("uid-1") == [first]
    assert await store.templates.list("uid-2") == [other]
    assert await store.templates.all() == [first, other]
    for asked in ("", "tpl-", "tpl-00", "nobody", "tpl-0000", other.id, other.id[:12]):
        with pytest.raises(TemplateNotFound):
            await store.templates.get("uid-1", asked)


async def test_a_prefix_that_fits_two_is_refused(store: SandboxStore) -> None:
    for number in (1, 2):
        await store.templates.insert(a_template(f"t{number}", id=f"tpl-aaaa{number}"))
    with pytest.raises(InvalidRequest, match="fits several"):
        await store.templates.get("uid-1", "tpl-aaaa")


async def test_of_two_writers_one_wins(store: SandboxStore) -> None:
    made = await store.templates.insert(a_template(status=TemplateStatus.BUILDING))
    changes = [store.templates.update(made, status=TemplateStatus.READY, message=str(n)) for n in range(5)]
    outcomes = await asyncio.gather(*changes, store.templates.remove(made), return_exceptions=True)
    assert len([outcome for outcome in outcomes if isinstance(outcome, InvalidState)]) == 5
    now = await store.templates.get("uid-1", "mine")
    assert (now.status, now.message, now.revision) == (TemplateStatus.READY, "0", 1)
    with pytest.raises(TypeError):
        await store.templates.update(now, tenant="uid-2")
    with pytest.raises(TypeError):
        await store.templates.update(now, nothing=1)
    await store.templates.remove(now)
    with pytest.raises(InvalidState):
        await store.templates.update(now, message="late")


async def test_renaming_onto_another_is_refused(store: SandboxStore) -> None:
    first = await store.templates.insert(a_template("one"))
    await store.templates.insert(a_template("two"))
    with pytest.raises(TemplateExists):
        await store.templates.update(first, name="two")
    assert (await store.templates.update(first, name="three")).name == "three"


async def test_snapshots(store: SandboxStore) -> None:
    unnamed = [await store.snapshots.insert(a_snapshot()) for _ in range(2)]
    named = await store.snapshots.insert(a_snapshot("before", labels={"a": "b"}, layers=("l",)))
    with pytest.raises(NameTaken, match="tartarus snapshot delete before"):
        await store.snapshots.insert(a_snapshot("before"))
    assert await store.snapshots.list("uid-1") == [named, *reversed(unnamed)]
    assert await store.snapshots.get("uid-1", "before") == named
    assert named.info.size_bytes == 2**40
    for asked in ("", "snap-", named.id):
        with pytest.raises(SnapshotNotFound):
            await store.snapshots.get("uid-2", asked)
    await store.snapshots.remove(named)
    with pytest.raises(InvalidState):
        await store.snapshots.remove(named)
    assert len(await store.snapshots.all()) == 2


async def test_a_database_of_the_first_milestone_keeps_its_sandboxes(path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    path.parent.mkdir(parents=True)
    engine = database.open_engine(path)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    store = await SandboxStore.open(path)
    await store.insert(a_record(id="sbx-old", name="kept"))
    await store.templates.insert(a_template())
    await store.close()
    engine = database.open_engine(path)
    with engine.begin() as connection:
        command.downgrade(_with(config, connection), "0001")
        tables = {row[0] for row in connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'"))}
    engine.dispose()
    assert "templates" not in tables
    store = await SandboxStore.open(path)
    assert (await store.get("uid-1", "kept")).id == "sbx-old"
    assert await store.templates.all() == []
    await store.close()


def _with(config: Any, connection: Any) -> Any:
    config.attributes["connection"] = connection
    return config
