"""What each level says it can do is what it does: docs/capabilities.md is written from these words."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import pytest

from tartarus.guest.wasm import PROBE
from tartarus.model.errors import TartarusError, Unsupported
from tartarus.model.library import CreateSnapshot
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, SandboxSpec, Wasm
from tartarus.node.levels import KINDS
from tartarus.node.service import Node

from .conftest import TENANT

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root")]
LEVELS = [
    Isolation.PROCESS, Isolation.CONTAINER, pytest.param(Isolation.GVISOR, marks=pytest.mark.needs("runsc")),
    Isolation.WASM,
]  # fmt: skip


def test_every_level_is_in_the_table() -> None:
    assert {kind.isolation for kind in KINDS} == set(Isolation) - {Isolation.AUTO}


@pytest.mark.parametrize("isolation", LEVELS)
async def test_on_a_host_that_lacks_nothing_it_can_do_what_the_table_says(node: Node, isolation: Isolation) -> None:
    runtime = node._levels.require(isolation)
    best, here = type(runtime).best, runtime.capabilities()
    assert msgspec.structs.replace(here, missing=best.missing, how=best.how) == best


async def spec_of(node: Node, isolation: Isolation) -> SandboxSpec:
    """A sandbox without a command."""
    if isolation is not Isolation.WASM:
        return SandboxSpec(isolation=isolation)
    return SandboxSpec(isolation=isolation, wasm=Wasm(module=(await node.modules.compile(TENANT, PROBE)).digest))


@pytest.mark.parametrize("isolation", LEVELS)
async def test_what_it_can_do_works_and_what_it_can_t_is_refused(
    node: Node, isolation: Isolation, tmp_path: Path
) -> None:
    can = node._levels.require(isolation).capabilities()
    spec = await spec_of(node, isolation)
    with contextlib.nullcontext() if can.mounts else pytest.raises(Unsupported):
        mounted = msgspec.structs.replace(spec, mounts=(Mount(source=str(tmp_path), target="/data"),))
        await (await node.create(TENANT, mounted)).kill()
    sandbox = await node.create(TENANT, spec)
    try:
        if can.pause:
            await sandbox.pause()
            await sandbox.resume()
        with contextlib.nullcontext() if can.contexts else pytest.raises(Unsupported):
            await sandbox.close_context(await sandbox.open_context())
        if can.terminals:
            process = await sandbox.exec(ExecSpec(argv=("true",), tty=True))
            while await process.read() is not None:
                pass
            assert (await process.wait()).code == 0
        with contextlib.nullcontext() if can.keeps_files else pytest.raises(TartarusError):
            made = await node.library.snapshots.create(TENANT, CreateSnapshot(sandbox=sandbox.record.id))
            await node.library.snapshots.delete(TENANT, made.id)
    finally:
        await sandbox.kill()
