"""Sandboxes that sleep and wake, on real guests: nothing of them is left meanwhile, and nothing of them is lost."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tartarus.model.audit import AuditQuery
from tartarus.model.errors import InvalidState, RequestRejected, SnapshotRefused, TartarusError, Unsupported
from tartarus.model.library import CreateSnapshot
from tartarus.model.lifecycle import DrainRequest, StopRequest
from tartarus.model.sandbox import ExecSpec, Isolation, Reason, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.model.snapshots import SnapshotKind
from tartarus.model.states import State
from tartarus.node.idleness import Idleness
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.policy.documents import read_policy
from tartarus.store.sandboxes import SandboxStore

from .conftest import TENANT, finish, leftovers

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "runsc")]

COUNTS = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"


async def made(node: Node, script: str = "", isolation: Isolation = Isolation.GVISOR, **spec: Any) -> Sandbox:
    """A sandbox whose output goes to its log."""
    command = ExecSpec(argv=("sh", "-c", script), stdin=bool(spec.pop("stdin", False))) if script else None
    return await node.create(TENANT, SandboxSpec(isolation=isolation, command=command, **spec))


async def said(sandbox: Sandbox, *argv: str) -> str:
    """What a command in it prints."""
    process = await sandbox.exec(ExecSpec(argv=argv))
    out = bytearray()
    while (piece := await process.read()) is not None:
        out += piece[1]
    return out.decode()


def held(state_dir: Path, sandbox: Sandbox) -> list[str]:
    """What the host has of it, but for its memory on disk."""
    return [name for name in leftovers(state_dir) if sandbox.record.id in name]


async def counted(sandbox: Sandbox, least: int) -> list[int]:
    """The numbers in its log, once there are so many."""
    while True:
        out = b"".join([entry.data async for entry in sandbox.log.read()])
        numbers = [int(line) for line in out.split(b"\n")[:-1]]
        if len(numbers) >= least:
            return numbers
        await asyncio.sleep(0.02)


async def until_asleep(sandbox: Sandbox) -> None:
    while not sandbox.asleep:
        await asyncio.sleep(0.02)


def state_of(sandbox: Sandbox) -> State:
    """Its state as it is by now."""
    return sandbox.record.state


def sets_of(state_dir: Path, sandbox: Sandbox) -> list[Path]:
    return list((state_dir / "memory").glob(f"*/{sandbox.record.id}")) + list(
        (state_dir / "memory").glob(f"*/sets/{sandbox.record.id}")
    )


async def test_it_sleeps_and_goes_on_where_it_was(node: Node, state_dir: Path, store: SandboxStore) -> None:
    sandbox = await made(node, COUNTS)
    sandbox.detach()
    await counted(sandbox, 3)
    record = await node.sleeper.sleep(sandbox)
    assert (record.state, bool(record.saved)) == (State.HIBERNATED, True)
    assert (await store.get(TENANT, record.id)).state is State.HIBERNATED
    assert node.sleeper.is_sleeping(record.id)
    assert held(state_dir, sandbox) == []
    assert await node.sleeper.sleep(sandbox) == record
    before = len(await counted(sandbox, 3))
    record = await node.sleeper.wake(sandbox)
    assert (record.state, record.saved) == (State.RUNNING, "")
    assert not node.sleeper.is_sleeping(record.id)
    numbers = await counted(sandbox, before + 5)
    assert numbers == list(range(1, len(numbers) + 1))
    assert await said(sandbox, "echo", "hi") == "hi\n"
    assert await node.sleeper.wake(sandbox) == record
    await sandbox.kill()


async def test_many_requests_wake_it_once(node: Node) -> None:
    sandbox = await made(node)
    await said(sandbox, "sh", "-c", "echo kept >/tmp/kept")
    await node.sleeper.sleep(sandbox)
    woken = await asyncio.gather(*(node.sleeper.wake(sandbox) for _ in range(8)))
    assert {record.version for record in woken} == {woken[0].version}
    assert await said(sandbox, "cat", "/tmp/kept") == "kept\n"
    await sandbox.kill()


async def test_it_is_judged_again_when_it_wakes(node: Node) -> None:
    sandbox = await made(node)
    await node.sleeper.sleep(sandbox)
    node.admission.replace([read_policy("id: p\ntemplates: [{id: host, allowed_callers: [nobody]}]")])
    with pytest.raises(RequestRejected, match="may not use template host"):
        await node.sleeper.wake(sandbox)
    assert (sandbox.asleep, state_of(sandbox)) == (True, State.HIBERNATED)
    (denied,) = (await node.audit.find(AuditQuery(action="sandbox.wake", limit=1))).entries
    assert denied.decision == "deny"
    # Its own place is not in its way.
    node.admission.replace([read_policy("id: p\nresources: {max_instances: 1}")])
    await node.sleeper.wake(sandbox)
    assert await said(sandbox, "echo", "awake") == "awake\n"
    await sandbox.kill()


async def test_a_snapshot_wakes_it(node: Node) -> None:
    sandbox = await made(node)
    await said(sandbox, "sh", "-c", "echo kept >/tmp/kept")
    await node.sleeper.sleep(sandbox)
    asked = CreateSnapshot(sandbox.record.id, kind=SnapshotKind.MEMORY)
    snapshot = await node.library.snapshots.create(TENANT, asked)
    assert state_of(sandbox) is State.RUNNING
    copy = await node.create(TENANT, SandboxSpec(snapshot=snapshot.id))
    assert await said(copy, "cat", "/tmp/kept") == await said(sandbox, "cat", "/tmp/kept") == "kept\n"
    await asyncio.gather(copy.kill(), sandbox.kill())
    await node.library.snapshots.delete(TENANT, snapshot.id)


async def test_what_is_asked_meanwhile_wakes_it(node: Node) -> None:
    sandbox = await made(node, "read line; echo got $line", stdin=True)
    await node.sleeper.sleep(sandbox)
    assert sandbox.main is not None
    await sandbox.main.write_stdin(b"word\n")
    assert (await finish(sandbox)).out == b"got word\n"


@pytest.mark.parametrize(
    "isolation", [Isolation.GVISOR, pytest.param(Isolation.MICROVM, marks=pytest.mark.needs("microvm"))]
)
async def test_again_and_again(node: Node, isolation: Isolation) -> None:
    sandbox = await made(node, COUNTS, isolation)
    sandbox.detach()
    for _ in range(3):
        seen = len(await counted(sandbox, 1))
        await node.sleeper.sleep(sandbox)
        await node.sleeper.wake(sandbox)
        numbers = await counted(sandbox, seen + 2)
    assert numbers == list(range(1, len(numbers) + 1))
    await sandbox.kill()


async def test_its_end_comes_also_asleep(node: Node, state_dir: Path) -> None:
    sandbox = await made(node, timeout_s=2.0, stop_grace_s=1.0)
    await node.sleeper.sleep(sandbox)
    record = await sandbox.wait()
    assert (record.state, record.reason) == (State.TIMED_OUT, Reason.TIMEOUT)
    killed = await made(node)
    await node.sleeper.sleep(killed)
    await killed.kill()
    assert state_of(killed) is State.KILLED
    with pytest.raises(InvalidState):
        await node.sleeper.sleep(killed)
    for ended in (sandbox, killed):
        while sets_of(state_dir, ended):
            await asyncio.sleep(0.01)


async def test_a_stop_wakes_it_to_heed_the_signal(node: Node) -> None:
    sandbox = await made(node, "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done")
    assert sandbox.main is not None
    assert await sandbox.main.read() == (1, b"up\n")
    await node.sleeper.sleep(sandbox)
    stopping = asyncio.create_task(node.terminator.stop(sandbox, StopRequest(grace_s=60.0)))
    assert (await finish(sandbox)).out == b"bye\n"
    assert (await stopping).sandbox.state is State.SUCCEEDED


async def test_a_paused_one_sleeps_and_wakes_running(node: Node) -> None:
    sandbox = await made(node)
    await sandbox.pause()
    assert (await node.sleeper.sleep(sandbox)).state is State.HIBERNATED
    with pytest.raises(InvalidState):
        await sandbox.resume()
    assert (await node.sleeper.wake(sandbox)).state is State.RUNNING
    assert await said(sandbox, "echo", "on") == "on\n"
    await sandbox.kill()


async def test_idle_ones_sleep_by_themselves(node: Node) -> None:
    idle = await made(node, idle_s=1.0)
    busy = await made(node, COUNTS, idle_s=1.0)
    busy.detach()
    await until_asleep(idle)
    assert not busy.asleep
    await busy.kill()
    await node.sleeper.wake(idle)
    assert await said(idle, "echo", "hi") == "hi\n"
    await until_asleep(idle)
    await idle.kill()


async def test_it_sleeps_when_it_was_told_to(node: Node) -> None:
    sandbox = await made(node, COUNTS)
    sandbox.detach()
    node.sleeper.schedule_sleep(sandbox, 3600)
    node.sleeper.schedule_sleep(sandbox, 0.1)
    await until_asleep(sandbox)
    await sandbox.kill()


async def test_levels_that_can_not_say_what_to_use(node: Node) -> None:
    for level in (Isolation.CONTAINER, Isolation.PROCESS):
        sandbox = await node.create(TENANT, SandboxSpec(isolation=level))
        with pytest.raises(Unsupported, match=r"gvisor or microvm"):
            await node.sleeper.sleep(sandbox)
        with pytest.raises(Unsupported, match=r"gvisor or microvm"):
            node.sleeper.schedule_sleep(sandbox, 1)
        assert await said(sandbox, "echo", "on") == "on\n"
        await sandbox.kill()
        with pytest.raises(Unsupported, match=r"gvisor or microvm"):
            await node.create(TENANT, SandboxSpec(isolation=level, idle_s=60.0))


async def test_a_drain_may_put_them_to_sleep(node: Node) -> None:
    sleeps = await made(node)
    ends = await node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS))
    report = await node.terminator.drain(DrainRequest(hibernate=True))
    assert {ended.id: ended.state for ended in report.ended} == {
        sleeps.record.id: State.HIBERNATED, ends.record.id: State.KILLED,
    }  # fmt: skip
    assert (report.left, report.asleep) == ((), (sleeps.record.id,))
    node.terminator.undo()
    await sleeps.kill()


async def test_its_memory_was_changed(node: Node, state_dir: Path) -> None:
    sandbox = await made(node)
    await node.sleeper.sleep(sandbox)
    for path in (state_dir / "memory").rglob("*.img"):
        if sandbox.record.id in str(path):
            with open(path, "r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SnapshotRefused):
        await node.sleeper.wake(sandbox)
    assert sandbox.asleep
    assert sandbox.record.state is State.HIBERNATED
    await sandbox.kill()
    assert state_of(sandbox) is State.KILLED


async def test_a_failed_write_leaves_it_running(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    from tartarus.model.errors import NoSpace

    sandbox = await made(node, COUNTS)
    sandbox.detach()
    await counted(sandbox, 3)

    async def full(*_: object, **__: object) -> None:
        raise NoSpace("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(node.memory.sets, "keep", full)
        with pytest.raises(NoSpace):
            await node.sleeper.sleep(sandbox)
    assert sandbox.record.state is State.RUNNING
    seen = len(await counted(sandbox, 3))
    await counted(sandbox, seen + 3)
    with monkeypatch.context() as patched:
        patched.setattr(node._store, "transition", full)
        with pytest.raises(NoSpace):
            await node.sleeper.sleep(sandbox)
    assert sandbox.record.state is State.RUNNING
    seen = len(await counted(sandbox, 3))
    numbers = await counted(sandbox, seen + 3)
    assert numbers == list(range(1, len(numbers) + 1))
    await sandbox.kill()


@pytest.fixture
async def homes(state_dir: Path, store: SandboxStore) -> AsyncIterator[Any]:
    """Starts one node after the other on the same state."""
    nodes: list[Node] = []

    async def start(**changes: Any) -> Node:
        if nodes:
            await nodes.pop().stop(Reason.NODE_DRAIN)
        node = Node(msgspec.structs.replace(Settings.at(state_dir), **changes), store)
        await node.start()
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        for sandbox in list(node._live.values()):
            await sandbox.kill()
        await node.stop(Reason.NODE_DRAIN)
    assert leftovers(state_dir) == []


async def test_it_sleeps_through_the_daemons_end(homes: Any, store: SandboxStore) -> None:
    node = await homes()
    sandbox = await made(node, COUNTS, name="sleeper", timeout_s=3600.0)
    sandbox.detach()
    await counted(sandbox, 3)
    await node.sleeper.sleep(sandbox)
    waiting = asyncio.create_task(sandbox.wait())
    node = await homes()
    assert (await waiting).state is State.HIBERNATED
    found = node.live(TENANT, "sleeper")
    assert found.asleep
    assert found.record.id == sandbox.record.id
    # It has its place in its tenant's share, and gives it back at its end.
    assert node.admission._books[TENANT].sandboxes == 1
    before = len(await counted(found, 3))
    await node.sleeper.wake(found)
    numbers = await counted(found, before + 5)
    assert numbers == list(range(1, len(numbers) + 1))
    await found.kill()
    assert (await store.get(TENANT, found.record.id)).state is State.KILLED
    assert node.admission._books[TENANT].sandboxes == 0


async def test_a_wake_that_the_daemon_did_not_survive(homes: Any, store: SandboxStore) -> None:
    node = await homes()
    sandbox = await made(node)
    await node.sleeper.sleep(sandbox)
    await store.transition(sandbox.record.id, {State.HIBERNATED}, State.STARTING)
    node = await homes()
    found = node.live(TENANT, sandbox.record.id)
    assert found.record.state is State.HIBERNATED
    await node.sleeper.wake(found)
    assert await said(found, "echo", "hi") == "hi\n"


async def test_its_time_limit_passed_while_there_was_no_daemon(homes: Any, store: SandboxStore) -> None:
    node = await homes()
    sandbox = await made(node, timeout_s=2.0)
    await node.sleeper.sleep(sandbox)
    await node.stop(Reason.NODE_DRAIN)
    await asyncio.sleep(max(0.0, (sandbox.record.started_at or 0.0) + 2.1 - time.time()))
    node = await homes()
    while (await store.get(TENANT, sandbox.record.id)).state is State.HIBERNATED:
        await asyncio.sleep(0.01)
    assert (await store.get(TENANT, sandbox.record.id)).state is State.TIMED_OUT


async def test_one_whose_memory_is_gone_can_still_be_ended(homes: Any, state_dir: Path) -> None:
    import shutil

    node = await homes()
    sandbox = await made(node, name="gone")
    await node.sleeper.sleep(sandbox)
    await node.stop(Reason.NODE_DRAIN)
    for path in sets_of(state_dir, sandbox):
        shutil.rmtree(path)
    node = await homes()
    found = node.live(TENANT, "gone")
    with pytest.raises(TartarusError):
        await node.sleeper.wake(found)
    assert found.record.state is State.HIBERNATED
    await found.kill()
    assert state_of(found) is State.KILLED


async def test_switched_off(homes: Any) -> None:
    node = await homes(enable_hypnos=False)
    sandbox = await made(node)
    with pytest.raises(Unsupported, match="EnableHypnos"):
        await node.sleeper.sleep(sandbox)
    with pytest.raises(Unsupported, match="EnableHypnos"):
        await made(node, idle_s=60.0)


def test_what_counts_as_idle() -> None:
    idleness = Idleness()
    assert idleness.since(100.0, 10, 0) == 0
    assert idleness.since(101.0, 10, 20_000) == 1.0
    assert idleness.since(102.0, 10, 120_000) == 0  # a tenth of a CPU
    assert idleness.since(103.0, 10, 130_000) == 1.0
    assert idleness.since(104.0, 11, 130_000) == 0  # somebody said something
    idleness.begin(104.5)
    assert idleness.since(105.0, 11, 130_000) == 0.5
