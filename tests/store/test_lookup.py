"""Finding sandboxes: names, id prefixes, filters, pages; and never another tenant's."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tartarus.model.errors import InvalidRequest, NameTaken, SandboxNotFound
from tartarus.model.states import State
from tartarus.store import SandboxStore
from tartarus.store.database import open_engine

from .conftest import a_record

pytestmark = pytest.mark.anyio
LOST = (State.LOST,)


async def test_a_live_name_is_taken_for_its_tenant_only(store: SandboxStore) -> None:
    first = await store.insert(a_record(name="web"))
    with pytest.raises(NameTaken, match="web"):
        await store.insert(a_record(name="web"))
    await store.insert(a_record(name="web", tenant="uid-2"))
    await store.transition(first.id, {State.PENDING}, State.LOST)
    await store.insert(a_record(name="web"))


async def test_nameless_sandboxes_never_collide(store: SandboxStore) -> None:
    for _ in range(3):
        await store.insert(a_record())
    assert len(await store.alive()) == 3


async def test_the_database_itself_refuses_a_second_live_name(store: SandboxStore, path) -> None:
    """Should the check ever be raced or wrong, the index holds."""
    await store.insert(a_record(name="web"))
    engine = open_engine(path)
    with engine.begin() as connection, pytest.raises(Exception, match="UNIQUE"):
        connection.execute(text("INSERT INTO sandboxes SELECT 'sbx-other', tenant, name, template, isolation, "
                                "isolation_reason, state, spec, created_at, started_at, ended_at, start_ms, warm, "
                                "exit_code, exit_signal, reason, message, saved, version FROM sandboxes"))  # fmt: skip
    engine.dispose()


async def test_a_name_means_the_live_one_then_the_newest(store: SandboxStore) -> None:
    old = await store.insert(a_record(name="job"), *LOST)
    newer = await store.insert(a_record(name="job"), *LOST)
    assert (await store.get("uid-1", "job")).id == newer.id
    live = await store.insert(a_record(name="job", created_at=old.created_at - 1))
    assert (await store.get("uid-1", "job")).id == live.id


async def test_a_unique_prefix_of_the_id_is_enough(store: SandboxStore) -> None:
    record = await store.insert(a_record(id="sbx-abcd1111"))
    await store.insert(a_record(id="sbx-abcd2222"))
    assert (await store.get("uid-1", "sbx-abcd1")).id == record.id
    assert (await store.get("uid-1", "sbx-abcd1111")).id == record.id
    with pytest.raises(InvalidRequest, match="several"):
        await store.get("uid-1", "sbx-abcd")
    for too_short_or_wrong in ("sbx-abc", "sbx-", "sbx-abce", "abcd1111", "", "sbx-abcd1111x"):
        with pytest.raises(SandboxNotFound):
            await store.get("uid-1", too_short_or_wrong)


async def test_wildcards_mean_nothing(store: SandboxStore) -> None:
    await store.insert(a_record(id="sbx-abcd1111", name="web"))
    for pattern in ("sbx-%%%%%", "sbx-____1111", "we_", "%", "sbx-abcd%"):
        with pytest.raises(SandboxNotFound):
            await store.get("uid-1", pattern)


async def test_another_tenants_sandbox_does_not_exist(store: SandboxStore) -> None:
    theirs = await store.insert(a_record(id="sbx-abcd1111", name="web", tenant="uid-2"))
    for way in (theirs.id, "web", "sbx-abcd1"):
        with pytest.raises(SandboxNotFound):
            await store.get("uid-1", way)
    assert await store.list("uid-1") == ([], None)
    mine = await store.insert(a_record(id="sbx-abcd1222"))
    assert (await store.get("uid-1", "sbx-abcd1")).id == mine.id


async def test_pages_are_exact_while_sandboxes_come_and_go(store: SandboxStore) -> None:
    records = [await store.insert(a_record(created_at=float(at // 3))) for at in range(20)]
    seen, cursor = await store.list("uid-1", limit=6)
    while cursor is not None:
        await store.insert(a_record())
        page, cursor = await store.list("uid-1", limit=6, cursor=cursor)
        seen += page
    expected = sorted(records, key=lambda record: (record.created_at, record.id), reverse=True)
    assert [record.id for record in seen] == [record.id for record in expected]


async def test_a_last_full_page_has_no_next(store: SandboxStore) -> None:
    for _ in range(4):
        await store.insert(a_record())
    page, cursor = await store.list("uid-1", limit=4)
    assert (len(page), cursor) == (4, None)


@pytest.mark.parametrize("cursor", ["", "x", "@@@@", "AAAA", "é", "A" * 10_000])
async def test_foreign_cursors_are_refused(store: SandboxStore, cursor: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        await store.list("uid-1", cursor=cursor)


async def test_filters_join_by_and(store: SandboxStore) -> None:
    both = await store.insert(a_record(name="a", labels={"team": "red", "env": "dev"}))
    red = await store.insert(a_record(name="b", labels={"team": "red"}), State.SCHEDULED)
    await store.insert(a_record(labels={"team": "blue", "env": "dev"}))
    await store.insert(a_record(tenant="uid-2", labels={"team": "red", "env": "dev"}))

    async def ids(**filters: object) -> list[str]:
        return [record.id for record in (await store.list("uid-1", **filters))[0]]  # type: ignore[arg-type]

    assert await ids(labels={"team": "red"}) == [red.id, both.id]
    assert await ids(labels={"team": "red", "env": "dev"}) == [both.id]
    assert await ids(labels={"team": "red"}, states={State.SCHEDULED}) == [red.id]
    assert await ids(name="a") == [both.id]
    assert await ids(states=set()) == []
    assert await ids(labels={"team": "re%"}) == []


async def test_alive_is_everyones_and_prune_forgets_the_long_ended(store: SandboxStore) -> None:
    live = await store.insert(a_record())
    theirs = await store.insert(a_record(tenant="uid-2"))
    ended = await store.insert(a_record(labels={"a": "b"}), *LOST)
    assert ended.ended_at is not None
    assert [record.id for record in await store.alive()] == [live.id, theirs.id]
    assert await store.prune(ended.ended_at) == 0
    assert await store.prune(ended.ended_at + 1) == 1
    assert await store.list("uid-1", labels={"a": "b"}) == ([], None)
    with pytest.raises(SandboxNotFound):
        await store.get("uid-1", ended.id)
