"""microVMs: a clone's way to its first reply beside a cold boot, and what clones take of memory."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.measure import Row, alternate
from benchmarks.node_benches import PANDAS, run_once, running_node
from tartarus.model.errors import IsolationUnavailable
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.runtimes.microvm.machinery import Machinery
from tartarus.runtimes.microvm.runtime import MicrovmRuntime

_TENANT = "uid-0"
_RUNS = 10
_CLONES = 20
_MIB = 1024**2


async def machines(_home: Path) -> list[Row]:
    """From create to the first answer of a command; a warm first result; PSS of twenty."""
    async with running_node() as node:
        try:
            machinery = await _machinery(node)
        except IsolationUnavailable as error:
            print(f"no microVMs here: {error}", file=sys.stderr)
            return []
        how = "KVM" if machinery.accelerator == "kvm" else "TCG"

        async def clone() -> float:
            began = time.perf_counter()
            sandbox = await _replying(node)
            took = (time.perf_counter() - began) * 1e3
            await sandbox.kill()
            return took

        command = ExecSpec(argv=("python3", "-c", PANDAS))
        warm_spec = SandboxSpec(template="python-ds", isolation=Isolation.MICROVM, command=command)

        async def warm() -> float:
            return (await run_once(node, warm_spec, b"45\n"))[0]

        rows = await alternate(
            "microVM restore to first reply",
            {f"tartarus microvm ({how})": clone, "cold boot, to its agent only": machinery.try_one}, _RUNS,
        )  # fmt: skip
        rows += await alternate("first result, python-ds, microVM", {f"tartarus microvm ({how})": warm}, _RUNS)
        return [*rows, *await _memory(node)]


async def _machinery(node: Node) -> Machinery:
    runtime = node._levels.require(Isolation.MICROVM)
    assert isinstance(runtime, MicrovmRuntime)
    return await runtime._open()


async def _replying(node: Node) -> Sandbox:
    sandbox = await node.create(_TENANT, SandboxSpec(isolation=Isolation.MICROVM))
    process = await sandbox.exec(ExecSpec(argv=("true",)))
    await process.wait()
    return sandbox


async def _memory(node: Node) -> list[Row]:
    before = _memory_of(os.getpid())["Rss"]
    sandboxes = [await _replying(node) for _ in range(_CLONES)]
    try:
        monitors = [_memory_of(sandbox.guest.pid) for sandbox in sandboxes]
        beside = (_memory_of(os.getpid())["Rss"] - before) / _CLONES
    finally:
        for sandbox in sandboxes:
            await sandbox.kill()
    bench = f"microVM memory, {_CLONES} clones after a first reply"
    return [
        Row(bench, "each (PSS)", "MiB", [one["Pss"] / _MIB for one in monitors]),
        Row(bench, "each, of the memory all share", "MiB", [one["Pss_Shmem"] / _MIB for one in monitors]),
        Row(bench, "each, our own beside QEMU", "MiB", [max(0.0, beside / _MIB)], "growth of the daemon"),
    ]


def _memory_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines()[1:]
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
