"""When a new sandbox is written down: once, before anybody hears of it, and before its start if that could be seen."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.node.conftest import TENANT, finish

from tartarus.model.errors import CommandNotFound, NameTaken, TartarusError
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.node import enrolment
from tartarus.node.service import Node
from tartarus.store.sandboxes import SandboxStore

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]
HELLO = SandboxSpec(isolation=Isolation.CONTAINER, command=ExecSpec(argv=("echo", "hello")))


@contextlib.contextmanager
def another_writer(state_dir: Path) -> Iterator[sqlite3.Connection]:
    """Holds the database, so that nothing is committed meanwhile."""
    with contextlib.closing(sqlite3.connect(state_dir / "state.db", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield database
        database.execute("ROLLBACK")


@contextlib.contextmanager
def full_table(state_dir: Path) -> Iterator[None]:
    """The database takes no new sandbox."""
    with contextlib.closing(sqlite3.connect(state_dir / "state.db", isolation_level=None)) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON sandboxes BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        try:
            yield
        finally:
            database.execute("DROP TRIGGER full")


async def stored(store: SandboxStore) -> dict[str, SandboxRecord]:
    records, _ = await store.list(TENANT, states=list(State), limit=1000)
    return {record.id: record for record in records}


async def test_nobody_hears_of_a_sandbox_before_it_is_written_down(
    node: Node, store: SandboxStore, state_dir: Path
) -> None:
    await finish(await node.create(TENANT, HELLO))
    before = await stored(store)
    with another_writer(state_dir):
        creating = asyncio.create_task(node.create(TENANT, HELLO))
        done, _ = await asyncio.wait([creating], timeout=0.3)
        assert not done
        assert await stored(store) == before
    ran = await finish(await creating)
    assert ran.out == b"hello\n"
    assert (await stored(store))[ran.record.id] == ran.record


@pytest.mark.parametrize("within_s", [0.0, 60.0])
async def test_a_start_is_written_down_on_the_way_or_at_its_end(
    node: Node, store: SandboxStore, monkeypatch: pytest.MonkeyPatch, within_s: float
) -> None:
    monkeypatch.setattr(enrolment, "WITHIN_S", within_s)
    sandbox = await node.create(TENANT, HELLO)
    assert sandbox.record.state is State.RUNNING
    assert (await stored(store))[sandbox.record.id].created_at == sandbox.record.created_at
    ran = await finish(sandbox)
    # Whichever way it took, its history has as many moves.
    assert (ran.record.state, ran.record.version) == (State.SUCCEEDED, 5)


@pytest.mark.parametrize("within_s", [0.0, 60.0])
async def test_a_start_that_fails_is_written_down_as_failed(
    node: Node, store: SandboxStore, monkeypatch: pytest.MonkeyPatch, within_s: float
) -> None:
    monkeypatch.setattr(enrolment, "WITHIN_S", within_s)
    before = await stored(store)
    spec = SandboxSpec(isolation=Isolation.CONTAINER, command=ExecSpec(argv=("no-such-command",)))
    with pytest.raises(CommandNotFound):
        await node.create(TENANT, spec)
    (record,) = [record for key, record in (await stored(store)).items() if key not in before]
    assert (record.state, record.version) == (State.FAILED, 4)
    assert "no-such-command" in record.message


@pytest.mark.parametrize("within_s", [0.0, 60.0])
async def test_what_cannot_be_written_down_does_not_go_on(
    node: Node, store: SandboxStore, state_dir: Path, monkeypatch: pytest.MonkeyPatch, within_s: float
) -> None:
    monkeypatch.setattr(enrolment, "WITHIN_S", within_s)
    before = await stored(store)
    with full_table(state_dir), pytest.raises(TartarusError, match="disk full"):
        await node.create(TENANT, HELLO)
    # The fixture looks for what is left of it.
    assert await stored(store) == before
    assert (await finish(await node.create(TENANT, HELLO))).out == b"hello\n"


async def test_a_creator_that_goes_away_while_it_is_written_down(
    node: Node, store: SandboxStore, state_dir: Path
) -> None:
    await finish(await node.create(TENANT, HELLO))
    before = await stored(store)
    with another_writer(state_dir):
        creating = asyncio.create_task(node.create(TENANT, HELLO))
        await asyncio.wait([creating], timeout=0.3)
        for task in node._creating:
            task.cancel()
        await asyncio.wait([creating], timeout=0.1)
    await asyncio.gather(creating, return_exceptions=True)
    (record,) = [record for key, record in (await stored(store)).items() if key not in before]
    assert record.state is State.KILLED


async def test_what_could_be_seen_is_written_down_before_it_starts(node: Node, state_dir: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    touch = ExecSpec(argv=("touch", "/out/seen"))
    mounted = SandboxSpec(
        isolation=Isolation.CONTAINER, command=touch, mounts=(Mount(str(tmp_path), "/out", read_only=False),)
    )
    named = SandboxSpec(isolation=Isolation.CONTAINER, name="one-name")
    with full_table(state_dir):
        with pytest.raises(TartarusError, match="disk full"):
            await node.create(TENANT, mounted)
        assert list(tmp_path.iterdir()) == []
    first = await node.create(TENANT, named)
    with pytest.raises(NameTaken):
        await node.create(TENANT, named)
    await first.kill()
    await finish(await node.create(TENANT, mounted))
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]
