"""Pause and resume at every level; hibernate and wake where memory can be saved, beside a bare restore of the same."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.measure import Row
from benchmarks.node_benches import running_node
from tartarus.model.errors import TartarusError
from tartarus.model.library import CreateSnapshot
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.model.snapshots import SnapshotKind
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node

_TENANT = "uid-0"
_TURNS = 7


async def _reply(sandbox: Sandbox) -> None:
    process = await sandbox.exec(ExecSpec(argv=("true",)))
    while await process.read() is not None:
        pass
    await process.wait()


def _ms(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


async def pause_and_sleep(_home: Path) -> list[Row]:
    """Every level of this host in turn. `restore` is the runtime's own, of the same memory: what a wake is held to."""
    rows: list[Row] = []
    async with running_node() as node:
        for level in (Isolation.PROCESS, Isolation.CONTAINER, Isolation.GVISOR, Isolation.MICROVM):
            try:
                sandbox = await node.create(_TENANT, SandboxSpec(isolation=level))
            except TartarusError:
                continue
            try:
                rows += await _paused(sandbox, level)
                if node.memory.can_save(level):
                    rows += await _slept(node, sandbox, level)
            finally:
                await sandbox.kill()
    return rows


async def _paused(sandbox: Sandbox, level: Isolation) -> list[Row]:
    took = []
    for _ in range(_TURNS):
        began = time.perf_counter()
        await sandbox.pause()
        await sandbox.resume()
        took.append(_ms(began))
    return [Row("pause", f"{level.value}: pause and resume", "ms", took)]


async def _slept(node: Node, sandbox: Sandbox, level: Isolation) -> list[Row]:
    asleep, awake, restored = [], [], []
    for _ in range(_TURNS):
        began = time.perf_counter()
        await node.sleeper.sleep(sandbox)
        asleep.append(_ms(began))
        began = time.perf_counter()
        await node.sleeper.wake(sandbox)
        await _reply(sandbox)
        awake.append(_ms(began))
    info = await node.library.snapshots.create(_TENANT, CreateSnapshot(sandbox.record.id, kind=SnapshotKind.MEMORY))
    for _ in range(_TURNS):
        began = time.perf_counter()
        copy = await node.create(_TENANT, SandboxSpec(snapshot=info.id))
        await _reply(copy)
        restored.append(_ms(began))
        await copy.kill()
    await node.library.snapshots.delete(_TENANT, info.id)
    return [
        Row("hibernate", f"{level.value}: to nothing left in memory", "ms", asleep),
        Row("wake", f"{level.value}: to its first reply", "ms", awake, "at most the restore + 20 ms"),
        Row("wake", f"{level.value}: restore of the same, first reply", "ms", restored),
    ]
