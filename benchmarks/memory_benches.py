"""Saving sandboxes with their memory, going on from that, and forking; and the store of sets by itself."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

from benchmarks.measure import Row
from benchmarks.node_benches import running_node
from tartarus.images.memory import Facts, MemorySets
from tartarus.model.errors import IsolationUnavailable
from tartarus.model.forking import ForkRequest
from tartarus.model.library import CreateSnapshot
from tartarus.model.sandbox import ExecSpec, Isolation, Resources, SandboxSpec
from tartarus.model.snapshots import SnapshotKind
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node

_TENANT = "uid-0"
_TURNS = 7
_COPIES = 8
_SET_BYTES = 256 * 1024**2


async def _first_reply(sandbox: Sandbox) -> None:
    process = await sandbox.exec(ExecSpec(argv=("true",)))
    while await process.read() is not None:
        pass
    await process.wait()


async def memory(_home: Path) -> list[Row]:
    """At every level here that can save memory: the pause, the save until it is on disk, and the way back."""
    rows: list[Row] = []
    async with running_node() as node:
        for level in (Isolation.GVISOR, Isolation.MICROVM):
            if not node.memory.can_save(level):
                continue
            try:
                rows += await _at(node, level)
            except IsolationUnavailable as error:
                print(f"no {level.value} here: {error}", file=sys.stderr)
    return rows


async def _at(node: Node, level: Isolation) -> list[Row]:
    paused, saved, back, forked = [], [], [], []
    source = await node.create(_TENANT, SandboxSpec(isolation=level))
    try:
        await _first_reply(source)
        for _ in range(_TURNS):
            began = time.perf_counter()
            info = await node.library.snapshots.create(
                _TENANT, CreateSnapshot(source.record.id, kind=SnapshotKind.MEMORY)
            )
            saved.append((time.perf_counter() - began) * 1e3)
            paused.append(info.paused_ms or 0.0)
            began = time.perf_counter()
            copy = await node.create(_TENANT, SandboxSpec(snapshot=info.id))
            await _first_reply(copy)
            back.append((time.perf_counter() - began) * 1e3)
            await copy.kill()
            await node.library.snapshots.delete(_TENANT, info.id)
        began = time.perf_counter()
        result = await node.fork(_TENANT, source.record.id, ForkRequest(_COPIES))
        forked.append((time.perf_counter() - began) * 1e3)
        for child in result.children:
            if child.sandbox is not None:
                await node.live(_TENANT, child.sandbox.id).kill()
    finally:
        await source.kill()
    name = f"memory, {level.value}"
    return [
        Row(name, "the source stands still", "ms", paused),
        Row(name, "snapshot, on disk", "ms", saved),
        Row(name, "go on, first reply", "ms", back),
        Row(name, f"fork, {_COPIES} copies", "ms", forked, f"paused {result.paused_ms:.0f} ms"),
    ]


def _fill(path: Path, turn: int) -> None:
    with path.open("wb") as file:
        for part in range(_SET_BYTES // 2**20):
            file.write(hashlib.shake_256(b"%d %d" % (turn, part)).digest(2**19))
            file.write(b"tartarus" * 2**16)


async def memory_sets(home: Path) -> list[Row]:
    """The store of sets: keep (digests, on disk), verify, pack, put together again; pages half compressible."""
    sets = MemorySets(home / "memory", 2**40)
    sets.open()
    facts = Facts(isolation="gvisor", needs={}, offer={}, resources=Resources())
    rates: dict[str, list[float]] = {"keep": [], "verify": [], "pack": [], "unpack": []}

    def rate(what: str, began: float) -> None:
        rates[what].append(_SET_BYTES / 1e6 / (time.perf_counter() - began))

    for turn in range(3):
        async with sets.staging(_TENANT) as place:
            _fill(place / "memory", turn)
            began = time.perf_counter()
            kept = await sets.keep(_TENANT, f"set-{turn}", place, facts)
            rate("keep", began)
        fresh = MemorySets(home / "memory", 2**40)
        began = time.perf_counter()
        async with fresh.taken(_TENANT, kept.id, kept.digest):
            rate("verify", began)
        began = time.perf_counter()
        await fresh.cool(0)
        rate("pack", began)
        began = time.perf_counter()
        async with fresh.taken(_TENANT, kept.id, kept.digest):
            rate("unpack", began)
        await fresh.remove(_TENANT, kept.id)
    return [Row("memory sets on disk", name, "MB/s", values) for name, values in rates.items()]
