"""The WASM level is tried on a real node, as the others are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.node.conftest import TENANT, Ran, finish, node, run, state_dir, store

from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec, Wasm
from tartarus.node.service import Node

__all__ = ["node", "run", "state_dir", "store"]

RunModule = Callable[..., Awaitable[Ran]]


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def add(node: Node, data: bytes, tenant: str = TENANT) -> str:
    """Send a module; returns its digest."""
    upload = await node.library.uploads.put(tenant, chunks(data))
    return (await node.modules.add(tenant, upload.id)).digest


@pytest.fixture
def run_module(node: Node) -> RunModule:
    """A function that sends a module and runs one command line of it to its end."""

    async def run_one(
        data: bytes, *argv: str, stdin: bytes | None = None, fuel: int | None = None, **spec: object
    ) -> Ran:
        wasm = Wasm(module=await add(node, data), fuel=fuel)
        command = ExecSpec(argv=("prog.wasm", *argv), stdin=stdin is not None)
        asked = SandboxSpec(command=command, wasm=wasm, **spec)  # type: ignore[arg-type]
        sandbox = await node.create(TENANT, asked)
        if stdin is not None and sandbox.main is not None:
            await sandbox.main.write_stdin(stdin)
            sandbox.main.close_stdin()
        ran = await finish(sandbox)
        assert ran.record.isolation is Isolation.WASM
        return ran

    return run_one
