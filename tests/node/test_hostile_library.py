"""Templates made to harm: that follow each other, clash, end at a bad moment, or leave something behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from tartarus.model.definition import Definition
from tartarus.model.errors import InvalidState, TartarusError, TemplateFailed, TemplateNotFound
from tartarus.model.library import BuildOutput, CreateTemplate, Done, TemplateBase, TemplateInfo, TemplateStatus
from tartarus.node.progress import Tell, streamed
from tartarus.node.service import Node

from .conftest import TENANT
from .making import Maker

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "cgroups")]
HOST = TemplateBase("host")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.02)


def groups(node: Node) -> list[str]:
    assert node._levels.hierarchy is not None
    return [name for name in node._levels.hierarchy.existing() if not name.startswith("nursery-host-")]


async def quiet(node: Node) -> None:
    """Wait until nothing follows a replacement any more."""
    await until(lambda: not node.library.templates._warming)


async def test_templates_that_stand_on_each_other(maker: Maker, node: Node):
    await maker.make("one", HOST, definition=Definition(warmup_script="x = 1"))
    await maker.make("two", TemplateBase("one"))
    await maker.make("one", TemplateBase("two"), replace=True)
    await quiet(node)
    again = await maker.make("two", TemplateBase("one"), replace=True)
    await quiet(node)
    builds = {info.name: info.build for info in await node.library.templates.list(TENANT) if not info.builtin}
    assert again.build <= builds["two"] <= again.build + 1
    assert builds["one"] <= 4


async def test_a_check_that_fails_leaves_nothing(maker: Maker, node: Node):
    before = groups(node)
    for number in range(2):
        said = Definition(warmup_script=f"x = {number}", ready_check=("false",))
        with pytest.raises(TemplateFailed, match="status 1"):
            await maker.make("mine", HOST, definition=said)
    await node._pool.sweep()
    assert (groups(node), await maker.names()) == (before, set())
    assert [key for key in node._pool._entries if TENANT in key[0]] == []


async def test_a_check_that_fails_keeps_what_served(maker: Maker, node: Node):
    await maker.make("mine", HOST, definition=Definition(warmup_script="x = 1"))
    (standing,) = [entry.snapshot for key, entry in node._pool._entries.items() if key[1] == "mine"]
    said = Definition(warmup_script="x = 1", ready_check=("false",))
    with pytest.raises(TemplateFailed, match="status 1"):
        await maker.make("mine", HOST, definition=said, replace=True)
    (after,) = [entry.snapshot for key, entry in node._pool._entries.items() if key[1] == "mine"]
    assert after is standing
    assert after is not None
    assert after.is_warm


async def test_the_same_again_stays_warm(maker: Maker, node: Node):
    for _ in range(2):
        await maker.make("mine", HOST, definition=Definition(warmup_script="x = 1"), replace=True)
    (standing,) = [entry.snapshot for key, entry in node._pool._entries.items() if key[1] == "mine"]
    assert standing is not None
    assert standing.is_warm


async def test_only_one_replaces_at_a_time(maker: Maker, node: Node):
    await maker.make("mine", HOST)
    slow = Definition(warmup_script="import time; time.sleep(1)")
    first = asyncio.create_task(Maker(node, TENANT).make("mine", HOST, definition=slow, replace=True))
    await asyncio.sleep(0.3)
    with pytest.raises(InvalidState):
        await maker.make("mine", HOST, replace=True)
    assert (await first).build == 2


@pytest.mark.parametrize("replace", [False, True])
async def test_removed_while_it_is_made(maker: Maker, node: Node, replace: bool):
    if replace:
        await maker.make("mine", HOST)
    before = [name for name in groups(node) if not name.startswith("nursery-mine-")]
    slow = Definition(warmup_script="import time; time.sleep(1)")
    work = asyncio.create_task(Maker(node, TENANT).make("mine", HOST, definition=slow, replace=replace))
    await asyncio.sleep(0.3)
    await node.library.templates.remove(TENANT, "mine")
    with pytest.raises(TartarusError):
        await work
    await node._pool.sweep()
    assert (groups(node), await maker.names()) == (before, set())


@pytest.mark.parametrize("after", [*range(12), 20, 40, 80])
async def test_cancelled_at_any_moment(maker: Maker, node: Node, after: int):
    """Whatever it is at, it is there whole or not at all, and can be made again."""
    before = groups(node)
    request = CreateTemplate(name="mine", source=HOST, definition=Definition(warmup_script="x = 1"))
    work = asyncio.create_task(node.library.templates._create(TENANT, request, None, lambda _event: None))
    for _ in range(after):
        await asyncio.sleep(0.002)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    found = [info for info in await node.library.templates.list(TENANT) if not info.builtin]
    assert [info.status for info in found] in ([], [TemplateStatus.READY])
    if found:
        await node.library.templates.remove(TENANT, "mine")
    await node._pool.sweep()
    await until(lambda: groups(node) == before)
    with pytest.raises(TemplateNotFound):
        await node.library.templates.get(TENANT, "mine")


async def test_progress_that_nobody_reads_is_bounded():
    piece = BuildOutput("x" * 65536)
    told = 0

    async def work(tell: Tell) -> None:
        nonlocal told
        for _ in range(2000):
            tell(piece)
            told += 1
        for _ in range(10_000):
            tell(BuildOutput("y"))
        tell(Done(TemplateInfo(id="tpl-1", name="mine")))

    async with streamed(work) as events:
        first = await anext(events)
        await until(lambda: told == 2000)
        rest = [event async for event in events]
    assert first == piece
    assert isinstance(rest[-1], Done)
    assert sum(len(msgspec.json.encode(event)) for event in rest) < 8 * 1024**2


async def test_blobs_that_a_killed_replacement_held(maker: Maker, node: Node):
    info = await maker.make("mine", HOST)
    blobs = node.library._tools.stacks.blobs(TENANT)
    blob = await blobs.put_bytes(b"of a replacement that was never proven")
    blobs.hold(f"{info.id}.2", [blob.digest])
    await node.library.open()
    assert blobs.held() == {}


async def test_what_nobody_uses_keeps_no_processes(maker: Maker, node: Node, monkeypatch):
    for number in range(4):
        await maker.make(f"mine-{number}", HOST)
    monkeypatch.setattr("tartarus.node.pool.MOST_UNUSED", 2)
    monkeypatch.setattr("tartarus.node.pool._JUST_USED_S", 0.0)
    await node._pool.sweep()
    kept = [name for name in groups(node) if name.startswith("nursery-mine-")]
    assert sorted(name.split("-")[2] for name in kept) == ["2", "3"]
    monkeypatch.setattr("tartarus.node.pool.IDLE_KEPT_S", 0.0)
    await node._pool.sweep()
    assert [name for name in groups(node) if name.startswith("nursery-mine-")] == []
    assert await maker.out("mine-0", "echo", "here") == "here\n"
