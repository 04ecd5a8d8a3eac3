"""Versions of policies: only added, one after another."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tartarus.model.errors import InvalidState, PolicyNotFound
from tartarus.model.policies import PolicyVersion
from tartarus.store import SandboxStore

pytestmark = pytest.mark.anyio
BARE = PolicyVersion(id="p", version=0, text="id: p", digest="d", author="uid-0", created_at=1.0)


async def test_versions_count_up_and_stay(store: SandboxStore) -> None:
    policies = store.policies
    for number in (1, 2, 3):
        kept = await policies.add(msgspec.structs.replace(BARE, comment=f"c{number}"), number - 1)
        assert kept.version == number
    assert [one.comment for one in await policies.history("p")] == ["c3", "c2", "c1"]
    assert (await policies.get("p", 2)).comment == "c2"
    with pytest.raises(InvalidState, match="at version 3, not 2"):
        await policies.add(BARE, 2)
    for name, version in (("q", None), ("p", 4)):
        with pytest.raises(PolicyNotFound):
            await policies.get(name, version)
    with pytest.raises(PolicyNotFound):
        await policies.history("q")


async def test_in_force_is_the_newest_unless_deleted(store: SandboxStore) -> None:
    for name in ("a", "b"):
        for _ in range(2):
            await store.policies.add(msgspec.structs.replace(BARE, id=name), None)
    await store.policies.add(msgspec.structs.replace(BARE, id="a", deleted=True), None)
    assert [(one.id, one.version) for one in await store.policies.in_force()] == [("b", 2)]


async def test_changes_at_once_get_versions_of_their_own(store: SandboxStore) -> None:
    made = await asyncio.gather(*(store.policies.add(BARE, None) for _ in range(20)))
    assert sorted(one.version for one in made) == list(range(1, 21))
    raced = await asyncio.gather(*(store.policies.add(BARE, 20) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(one, InvalidState) for one in raced) == 4
