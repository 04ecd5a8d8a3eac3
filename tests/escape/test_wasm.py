"""What a hostile module, or a hostile compiler, tries at the WASM level. The level's other attacks are the container's.

wasmtime answers first; what is native here (`guest`) is what someone would have who had found a hole in it.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.node.conftest import TENANT, node, run, state_dir, store
from tests.wasm import modules
from tests.wasm.conftest import RunModule, add, run_module

from tartarus.model.errors import ModuleNotFound, ModuleRefused, NotExecutable
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, ResourceRequest, Resources, SandboxSpec, Wasm
from tartarus.model.states import State
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.runtimes.base import Guest, GuestRequest

__all__ = ["node", "run", "run_module", "state_dir", "store"]

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root")]
DIRECTORIES = 3  # ., /work and /tmp


@contextlib.asynccontextmanager
async def idle(node: Node, **spec: object) -> AsyncIterator[Sandbox]:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=Isolation.WASM, **spec))  # type: ignore[arg-type]
    try:
        yield sandbox
    finally:
        await sandbox.kill()


async def said(sandbox: Sandbox, *argv: str) -> tuple[bytes, int]:
    """All that a command prints, and its status as a shell shows it."""
    process = await sandbox.exec(ExecSpec(argv=argv))
    printed = b""
    while (piece := await process.read()) is not None:
        printed += piece[1]
    return printed, (await process.wait()).shell_status


@pytest.mark.parametrize("path", [
    "../etc/passwd", "/etc/passwd", "/../etc/passwd", "../../../../../proc/self/environ", "sub/../../etc/passwd",
    "./../work/../etc/passwd", "/proc/self/root/etc/passwd", "../opt/tartarus/wasm/module.cwasm",
])  # fmt: skip
async def test_no_path_leads_out_of_the_directories_that_it_was_given(run_module: RunModule, path: str) -> None:
    ran = await run_module(modules.OPEN, path)
    assert ran.out.startswith(b"errno ")
    assert ran.out.count(b"errno ") == DIRECTORIES


# Makes the link "link" to ../etc/passwd, and tries "abs" to /etc/passwd and "hard" as another name of the first's end.
LINK = modules.program(
    """(drop (call $path_symlink (i32.const 1030) (i32.const 13) (i32.const 3) (i32.const 1060) (i32.const 4)))
       (drop (call $path_symlink (i32.const 1080) (i32.const 11) (i32.const 3) (i32.const 1064) (i32.const 3)))
       (drop (call $path_link (i32.const 3) (i32.const 1) (i32.const 1030) (i32.const 13) (i32.const 3)
         (i32.const 1068) (i32.const 4)))""",
    modules.data(1030, "../etc/passwd"), modules.data(1060, "linkabs hard"), modules.data(1080, "/etc/passwd"),
)  # fmt: skip


async def test_no_link_that_it_makes_leads_out(node: Node) -> None:
    async with idle(node) as sandbox:
        await sandbox.files.write("/work/link.wasm", LINK)
        await sandbox.files.write("/work/open.wasm", modules.OPEN)
        await said(sandbox, "/work/link.wasm")
        made = {info.path.rpartition("/")[2] for info in await sandbox.files.list("/work")}
        assert "link" in made
        assert not made & {"abs", "hard"}
        for name in ("link", "abs", "hard"):
            out, _ = await said(sandbox, "/work/open.wasm", name)
            assert out.count(b"errno ") == DIRECTORIES


async def test_no_link_in_a_mount_leads_out(run_module: RunModule, tmp_path: Path) -> None:
    (tmp_path / "relative").symlink_to("../../../../../etc/passwd")
    (tmp_path / "absolute").symlink_to("/etc/passwd")
    mounts = (Mount(source=str(tmp_path), target="/data"),)
    for name in ("relative", "absolute"):
        assert b"root" not in (await run_module(modules.OPEN, name, mounts=mounts)).out


GREEDY = modules.program(
    """(local $got i32)
       (loop $again
         (local.set $got (memory.grow (i32.const 256)))
         (if (i32.ne (local.get $got) (i32.const -1))
           (then
             (memory.fill (i32.mul (local.get $got) (i32.const 65536)) (i32.const 1) (i32.const 16777216))
             (br $again))))
       (call $write (i32.const 1) (i32.const 1024) (i32.const 5))""",
    modules.data(1024, "full\\n"),
)


async def test_memory_ends_where_the_sandbox_s_does_and_the_module_is_told(run_module: RunModule) -> None:
    ran = await run_module(GREEDY, resources=ResourceRequest(memory_bytes=128 * 1024**2))
    assert (ran.out, ran.record.exit_code) == (b"full\n", 0)


@pytest.mark.parametrize("fields", [
    "(memory 65536)", "(memory 1) (memory 65536)", "(memory i64 0x40000000)", "(table 0xffffffff funcref)",
    "(table 20000000 externref)",
], ids=["memory", "second memory", "64-bit memory", "table", "externref table"])  # fmt: skip
async def test_what_asks_for_too_much_at_once_is_refused(run_module: RunModule, fields: str) -> None:
    ran = await run_module(modules.assemble(f'(module {fields} (func (export "_start")))'))
    assert ran.record.exit_code == 126
    assert ran.record.state is State.FAILED


async def test_many_memories_end_at_the_cgroup(run_module: RunModule) -> None:
    memories = "".join(f"(memory $m{number} 1600)" for number in range(8))
    fill = "".join(f"(memory.fill $m{number} (i32.const 0) (i32.const 1) (i32.const 104857600))" for number in range(8))
    bomb = modules.assemble(f'(module {memories} (func (export "_start") {fill}))')
    ran = await run_module(bomb, resources=ResourceRequest(memory_bytes=256 * 1024**2))
    assert ran.record.message == "killed: the memory limit was reached"


async def test_a_table_that_grows_and_grows_is_told_no(run_module: RunModule) -> None:
    grow = '(module (table 1 funcref) (func (export "_start") (local $n i32) (loop $again (br_if $again (i32.ne'
    grow += " (table.grow 0 (ref.null func) (i32.const 65536)) (i32.const -1))))))"
    assert (await run_module(modules.assemble(grow))).record.exit_code == 0


@pytest.mark.parametrize(("body", "why"), [
    ("(call $_start)", b"call stack exhausted"), ("unreachable", b"unreachable"),
    ("(drop (i32.load (i32.const -4)))", b"out of bounds memory access"),
    ("(drop (i32.div_s (i32.const 1) (i32.const 0)))", b"divide by zero"),
    ("(call_indirect (i32.const 9))", b"undefined element"),
])  # fmt: skip
async def test_a_trap_is_told_and_is_no_crash(run_module: RunModule, body: str, why: bytes) -> None:
    text = f'(module (memory (export "memory") 1) (table 1 funcref) (func $_start (export "_start") {body}))'
    ran = await run_module(modules.assemble(text))
    assert (ran.record.exit_code, ran.record.exit_signal) == (134, None)
    assert why in ran.err


DESCRIPTORS = modules.program(
    """(local $n i32)
       (loop $again
         (local.set $n (i32.add (local.get $n) (i32.const 1)))
         (if (i32.eqz (call $path_open (i32.const 4) (i32.const 1) (i32.const 1024) (i32.const 1) (i32.const 1)
               (i64.const 6) (i64.const 6) (i32.const 0) (i32.const 80)))
           (then (br_if $again (i32.lt_u (local.get $n) (i32.const 200000))))))
       (call $write (i32.const 1) (i32.const 1028) (i32.const 5))""",
    modules.data(1024, "f"), modules.data(1028, "full\\n"),
)  # fmt: skip


async def test_descriptors_end_and_the_next_command_has_its_own(node: Node) -> None:
    async with idle(node) as sandbox:
        await sandbox.files.write("/work/open.wasm", DESCRIPTORS)
        await sandbox.files.write("/work/hello.wasm", modules.HELLO)
        first, _ = await said(sandbox, "/work/open.wasm")
        assert first in {b"full\n", b""}  # without any left it can't even write, and ends
        assert await said(sandbox, "/work/hello.wasm") == (b"hello\n", 7)


@pytest.mark.parametrize("count", [0, 1, 0x00FFFFFF, 0x7FFFFFFF, -1])
async def test_no_count_of_events_to_wait_for_is_too_much(run_module: RunModule, count: int) -> None:
    # Zeros are subscriptions to a clock that has run out; the list ends at the memory's end.
    poll = f"(drop (call $poll_oneoff (i32.const 2048) (i32.const 65536) (i32.const {count}) (i32.const 1024)))"
    ran = await run_module(modules.program(poll), timeout_s=20.0)
    assert ran.record.state in {State.SUCCEEDED, State.FAILED}
    assert ran.record.exit_code in {0, 134}


async def test_no_socket_is_to_be_had(run_module: RunModule) -> None:
    body = "".join(
        f"(if (i32.eqz (call $sock_accept (i32.const {fd}) (i32.const 0) (i32.const 80))) (then unreachable))"
        for fd in range(12)
    )
    assert (await run_module(modules.program(body))).record.exit_code == 0


async def test_mutated_modules_are_refused_or_run_and_the_sandbox_lives_on(node: Node) -> None:
    source = random.Random(20261121)
    async with idle(node, timeout_s=120.0) as sandbox:
        for number in range(60):
            mutant = bytearray(modules.OPEN if number % 2 else modules.SPEAKING)
            for _ in range(source.randint(1, 8)):
                mutant[source.randrange(8, len(mutant))] = source.randrange(256)
            await sandbox.files.write("/work/mutant.wasm", bytes(mutant))
            process = await sandbox.exec(ExecSpec(argv=("/work/mutant.wasm", "x"), timeout_s=5.0))
            while await process.read() is not None:
                pass
            status = await process.wait()
            assert status.signal in {0, 9}, mutant.hex()
        await sandbox.files.write("/work/hello.wasm", modules.HELLO)
        assert await said(sandbox, "/work/hello.wasm") == (b"hello\n", 7)


async def test_compiled_code_is_never_taken_from_a_tenant(node: Node, state_dir: Path) -> None:
    digest = await add(node, modules.HELLO)
    (code,) = state_dir.glob(f"cache/tenants/{TENANT}/modules/*{digest}/tree/opt/tartarus/wasm/module.cwasm")
    with pytest.raises(ModuleRefused):
        await add(node, code.read_bytes())
    async with idle(node) as sandbox:
        await sandbox.files.write("/work/code.wasm", code.read_bytes())
        out, status = await said(sandbox, "/work/code.wasm")
        assert b"no WebAssembly module" in out
        assert status == 126


async def test_nobody_else_can_reach_compiled_code(node: Node, state_dir: Path) -> None:
    await add(node, modules.HELLO)
    assert (state_dir / "cache" / "tenants" / TENANT).stat().st_mode & 0o077 == 0


async def test_what_a_sandbox_writes_over_its_code_is_its_own(node: Node) -> None:
    wasm = Wasm(module=await add(node, modules.HELLO))
    async with idle(node, wasm=wasm) as sandbox:
        with contextlib.suppress(Exception):
            await sandbox.files.write("/opt/tartarus/wasm/module.cwasm", b"poison")
        with contextlib.suppress(Exception):
            await sandbox.files.write("/opt/tartarus/runner.py", b"poison")
        async with idle(node, wasm=wasm) as other:
            assert await said(other, "x") == (b"hello\n", 7)


async def test_damaged_code_is_not_run(node: Node, state_dir: Path) -> None:
    digest = await add(node, modules.CAT)
    (code,) = state_dir.glob(f"cache/tenants/{TENANT}/modules/*{digest}/tree/opt/tartarus/wasm/module.cwasm")
    poisoned = bytearray(code.read_bytes())
    poisoned[len(poisoned) // 2] ^= 1
    code.write_bytes(poisoned)
    node.modules.forget()  # as a daemon that starts
    with pytest.raises(ModuleNotFound, match="damaged"):
        await node.create(TENANT, SandboxSpec(wasm=Wasm(module=digest), command=ExecSpec(argv=("x",))))
    assert await add(node, modules.CAT) == digest


@contextlib.asynccontextmanager
async def guest(node: Node) -> AsyncIterator[Guest]:
    """A guest of this level, to be asked for what the node would never ask of it: what a hole in wasmtime gives."""
    levels = node._levels
    runtime = levels.require(Isolation.WASM)
    rootfs = await node.modules.rootfs(TENANT, await node._offers.host(), None)
    snapshot, _ = await node._pool.get(rootfs, Isolation.WASM, warm=True)
    request = GuestRequest(id="attack-0000000000000001", hostname="attack", resources=Resources())
    made = await runtime.clone(snapshot, request, warm=True)
    try:
        await made.ready()
        yield made
    finally:
        await made.destroy()


@pytest.mark.needs("landlock")
async def test_nothing_native_can_be_started(node: Node) -> None:
    from tartarus.guest.channel import GuestExec

    async with guest(node) as held:
        await held.channel.write("/work/own", Path("/bin/true").read_bytes(), mode=0o755)
        for program in ("/bin/sh", "/usr/bin/python3", "/work/own", "/lib64/ld-linux-x86-64.so.2"):
            if os.path.exists(program) or program == "/work/own":
                with pytest.raises(NotExecutable):
                    await held.channel.exec(GuestExec(argv=(program,))).started()
