"""Starting a sandbox at a level to see whether that works."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from tartarus.guest.wasm import PROBE
from tartarus.model.errors import GuestFailed
from tartarus.model.modules import ModuleInfo
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec, Wasm
from tartarus.node.auditing import EXEMPT
from tartarus.node.sandbox import Sandbox

Create = Callable[[str, SandboxSpec], Awaitable[Sandbox]]
Compile = Callable[[str, bytes], Awaitable[ModuleInfo]]


async def prove_level(create: Create, compile_module: Compile, isolation: Isolation) -> None:
    """Start one; at the WASM level, compile and run a module. Raises what goes wrong."""
    spec = SandboxSpec(isolation=isolation, timeout_s=30.0)
    if isolation is not Isolation.WASM:
        await (await create(EXEMPT, spec)).kill()
        return
    module = await compile_module(EXEMPT, PROBE)
    spec = msgspec.structs.replace(spec, command=ExecSpec(argv=("probe",)), wasm=Wasm(module=module.digest))
    ended = await (await create(EXEMPT, spec)).wait()
    if ended.exit_code != 0:
        raise GuestFailed("a module did not run to its end", why=ended.message or f"it gave {ended.exit_code}")
