"""Failed runs (Cocytus): each failure is kept once, as what it was, for its tenant; nothing else is."""

from __future__ import annotations

import time

import msgspec
import pytest

from tartarus.model.errors import InvalidState, LamentationNotFound, TartarusError
from tartarus.model.lamentations import Category, Fault, Lamentation, LamentationFilter
from tartarus.model.sandbox import ExecSpec, Isolation, ResourceRequest, SandboxSpec
from tartarus.node import service
from tartarus.node.lamentations import Lamentations
from tartarus.node.service import Node
from tartarus.store import lamentations as rows
from tartarus.store.sandboxes import SandboxStore

from .conftest import TENANT, Run

pytestmark = pytest.mark.anyio
PROCESS = Isolation.PROCESS


@pytest.fixture
async def laments(node: Node) -> Lamentations:
    await node.furies.lamentations.purge(TENANT, 0)
    return node.furies.lamentations


async def all_of(laments: Lamentations, **wanted: object) -> list[Lamentation]:
    return await laments.list(TENANT, LamentationFilter(**wanted))  # type: ignore[arg-type]


async def test_each_kind_of_end_is_classified(laments: Lamentations, run: Run) -> None:
    ran = {
        Category.EXIT_CODE: await run(PROCESS, "sh", "-c", "echo Traceback: it broke >&2; exit 3"),
        Category.SIGNAL: await run(PROCESS, "sh", "-c", "kill -SEGV $$"),
        Category.TIMEOUT: await run(PROCESS, "sleep", "60", timeout_s=0.3),
    }
    await run(PROCESS, "true")
    found = {one.sandbox_id: one for one in await all_of(laments)}
    assert {found[one.record.id].category for one in ran.values()} == set(ran)
    assert len(found) == len(ran)
    exited = found[ran[Category.EXIT_CODE].record.id]
    assert (exited.fault, exited.stack_trace, exited.metadata["exit_code"]) == (
        Fault.PROGRAM, "Traceback: it broke\n", "3",
    )  # fmt: skip
    assert found[ran[Category.TIMEOUT].record.id].fault is Fault.LIMIT


@pytest.mark.needs("root")
async def test_a_command_that_its_memory_limit_killed_is_out_of_memory(laments: Lamentations, run: Run) -> None:
    fill = "hoard = [b'x' * (1 << 20) for _ in range(200)]"
    await run(Isolation.CONTAINER, "python3", "-c", fill, resources=ResourceRequest(memory_bytes=64 << 20))
    assert [one.category for one in await all_of(laments)] == [Category.OUT_OF_MEMORY]


async def test_what_its_owner_ended_is_no_failure(laments: Lamentations, node: Node) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=PROCESS))
    await sandbox.kill()
    assert await all_of(laments) == []


async def test_a_request_that_came_to_nothing_is_kept_and_tried_again(
    laments: Lamentations, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SandboxSpec(isolation=PROCESS, command=ExecSpec(argv=("true",)), name="again")
    with monkeypatch.context() as patched:
        patched.setattr(service.Node, "_rootfs", _no_space)
        with pytest.raises(TartarusError):
            await node.create(TENANT, spec)
        (dead,) = await all_of(laments, dead_letters=True)
        assert (dead.category, dead.fault, dead.metadata["command"]) == (
            Category.INFRASTRUCTURE, Fault.PLATFORM, "true",
        )  # fmt: skip
        with pytest.raises(TartarusError):
            await laments.retry(TENANT, dead.id)
    assert [one.id for one in await all_of(laments, dead_letters=True)] == [dead.id]
    with pytest.raises(LamentationNotFound):
        await laments.retry("somebody else", dead.id)
    sandbox = await laments.retry(TENANT, dead.id)
    assert (await sandbox.wait()).exit_code == 0
    assert (await laments.get(TENANT, dead.id)).retried_as == sandbox.record.id
    assert await all_of(laments, dead_letters=True) == []
    with pytest.raises(InvalidState):
        await laments.retry(TENANT, dead.id)


async def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


async def test_a_command_that_is_not_there_is_no_dead_letter(laments: Lamentations, node: Node) -> None:
    with pytest.raises(TartarusError):
        await node.create(TENANT, SandboxSpec(isolation=PROCESS, command=ExecSpec(argv=("no-such-command",))))
    (one,) = await all_of(laments)
    assert (one.category, one.fault, one.dead_letter) == (Category.START_FAILED, Fault.PROGRAM, False)
    assert one.sandbox_id.startswith("sbx-")


async def test_queries_purge_and_the_cap_on_one_tenants_rows(
    store: SandboxStore, laments: Lamentations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_OF_A_TENANT", 100)
    lament = Lamentation(
        id="", tenant="many", sandbox_id="", template="host", timestamp=0.0, category=Category.SIGNAL,
        fault=Fault.PROGRAM, message="\x1b[31m'; DROP TABLE lamentations; --",
    )  # fmt: skip
    now = time.time()
    for number in range(256):
        await store.lamentations.add(msgspec.structs.replace(lament, id=f"lam-{number:03}", timestamp=now - number))
    kept = await laments.list("many", LamentationFilter(limit=1000))
    assert 100 <= len(kept) < 200
    assert await laments.list("many", LamentationFilter(category=Category.TIMEOUT)) == []
    assert len(await laments.list("many", LamentationFilter(since=now - 1.5))) == 2
    assert await laments.purge(TENANT, 0) == 0
    monkeypatch.setattr(laments, "_kept_s", 50.0)
    await laments.sweep()
    young = await laments.list("many", LamentationFilter(limit=1000))
    assert [one.id for one in young] == [one.id for one in kept if one.timestamp > now - 50]
    assert await laments.purge("many", 0) == len(young)


async def test_an_interrupted_retry_is_a_dead_letter_again(store: SandboxStore, laments: Lamentations) -> None:
    lament = Lamentation(
        id="lam-x", tenant=TENANT, sandbox_id="", template="host", timestamp=time.time(), message="",
        category=Category.INFRASTRUCTURE, fault=Fault.PLATFORM, dead_letter=True,
    )  # fmt: skip
    await store.lamentations.add(lament, SandboxSpec())
    await store.lamentations.claim(TENANT, "lam-x", "pending")  # and then the daemon is killed
    assert await all_of(laments, dead_letters=True) == []
    await laments.open()
    assert [one.id for one in await all_of(laments, dead_letters=True)] == ["lam-x"]
