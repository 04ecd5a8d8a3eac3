"""What modules and components do at the WASM level: all that a command does elsewhere."""

from __future__ import annotations

import asyncio
import signal

import pytest
from tests.node.conftest import TENANT, Run, finish

from tartarus.model.errors import InvalidRequest, ModuleNotFound, ModuleRefused, Unsupported
from tartarus.model.forking import ForkRequest
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, ResourceRequest, SandboxSpec, Wasm
from tartarus.model.states import State
from tartarus.node.service import Node

from . import modules
from .conftest import RunModule, add

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root")]


async def test_a_module_prints_and_exits_with_its_status(run_module: RunModule) -> None:
    ran = await run_module(modules.HELLO)
    assert (ran.out, ran.record.exit_code) == (b"hello\n", 7)
    assert ran.record.state is State.FAILED


async def test_it_gets_its_arguments(run_module: RunModule) -> None:
    ran = await run_module(modules.ARGUMENTS, "one", "zwei ö", "")
    assert ran.out == "prog.wasm\0one\0zwei ö\0\0".encode()


async def test_it_gets_the_sandbox_s_variables_and_none_of_the_host_s(run_module: RunModule) -> None:
    ran = await run_module(modules.ENVIRONMENT, env={"LEVEL": "wasm"})
    assert sorted(ran.out.split(b"\0")) == [b"", b"HOME=/work", b"LEVEL=wasm"]


async def test_input_is_streamed_through_it(run_module: RunModule) -> None:
    sent = bytes(range(256)) * 2048
    assert (await run_module(modules.CAT, stdin=sent)).out == sent


@pytest.mark.parametrize(("data", "code", "out"), [
    (modules.component(0), 0, b""), (modules.component(1), 1, b""),
    (modules.EXITING, 1, b""), (modules.SPEAKING, 0, b"spoken\n"),
])  # fmt: skip
async def test_a_component_of_the_command_world_runs(run_module: RunModule, data: bytes, code: int, out: bytes) -> None:
    ran = await run_module(data)
    assert (ran.out, ran.err, ran.record.exit_code) == (out, b"", code)


async def test_a_file_in_the_sandbox_is_run_by_its_path(node: Node) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=Isolation.WASM))
    await sandbox.files.write("/work/hello.wasm", modules.HELLO)
    for path in ("/work/hello.wasm", "hello.wasm", "./hello.wasm"):
        process = await sandbox.exec(ExecSpec(argv=(path,)))
        assert await process.read() == (1, b"hello\n")
        assert (await process.wait()).code == 7
    process = await sandbox.exec(ExecSpec(argv=("missing.wasm",)))
    assert await process.read() == (2, b"tartarus: missing.wasm: missing.wasm: No such file or directory\n")
    assert (await process.wait()).code == 127
    await sandbox.kill()


async def test_another_module_runs_beside_the_sandbox_s_own(node: Node) -> None:
    spec = SandboxSpec(command=ExecSpec(argv=("loop",)), wasm=Wasm(module=await add(node, modules.LOOP)))
    sandbox = await node.create(TENANT, spec)
    await sandbox.files.write("/work/hello.wasm", modules.HELLO)
    process = await sandbox.exec(ExecSpec(argv=("/work/hello.wasm",)))
    assert await process.read() == (1, b"hello\n")
    await sandbox.kill()


async def test_a_mounted_directory_is_seen(run: Run, run_module: RunModule, tmp_path) -> None:
    (tmp_path / "hello.wasm").write_bytes(modules.HELLO)
    (tmp_path / "note").write_bytes(b"from the host")
    mounts = (Mount(source=str(tmp_path), target="/data", read_only=True),)
    assert (await run(Isolation.AUTO, "/data/hello.wasm", mounts=mounts)).out == b"hello\n"
    ran = await run_module(modules.OPEN, "note", mounts=mounts)
    assert ran.out.count(b"from the host") == 1  # of ., /work, /tmp and /data


async def test_a_signal_ends_it(node: Node) -> None:
    spec = SandboxSpec(command=ExecSpec(argv=("loop",)), wasm=Wasm(module=await add(node, modules.LOOP)))
    sandbox = await node.create(TENANT, spec)
    await sandbox.kill(signal=signal.SIGTERM)
    assert (await sandbox.wait()).exit_signal == signal.SIGTERM


async def test_its_time_limit_ends_it(run_module: RunModule) -> None:
    assert (await run_module(modules.LOOP, timeout_s=0.3)).record.state is State.TIMED_OUT


async def test_it_is_paused_and_goes_on(node: Node) -> None:
    spec = SandboxSpec(command=ExecSpec(argv=("loop",)), wasm=Wasm(module=await add(node, modules.LOOP)))
    sandbox = await node.create(TENANT, spec)
    await sandbox.pause()
    before = (await sandbox.stats()).cpu_usec
    await asyncio.sleep(0.05)
    assert (await sandbox.stats()).cpu_usec == before
    await sandbox.resume()
    while (await sandbox.stats()).cpu_usec == before:
        await asyncio.sleep(0.01)
    await sandbox.kill()


async def test_a_fork_has_its_files_and_its_module(node: Node) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(wasm=Wasm(module=await add(node, modules.OPEN))))
    await sandbox.channel.write("/work/note", b"kept")
    forked = await node.fork(TENANT, sandbox.record.id, ForkRequest(count=2))
    for child in forked.children:
        assert child.sandbox is not None
        copy = node.live(TENANT, child.sandbox.id)
        assert copy.record.isolation is Isolation.WASM
        process = await copy.exec(ExecSpec(argv=("open", "note")))
        assert await process.read() is not None
        await copy.kill()
    await sandbox.kill()


async def test_fuel_ends_it_with_a_trace(run_module: RunModule) -> None:
    ran = await run_module(modules.LOOP, fuel=100_000)
    assert ran.record.exit_code == 134
    assert b"all fuel consumed" in ran.err
    assert (await run_module(modules.HELLO, fuel=100_000)).out == b"hello\n"


async def test_a_command_s_time_limit_interrupts_what_runs_on_fuel(node: Node) -> None:
    wasm = Wasm(module=await add(node, modules.LOOP), fuel=2**62)
    sandbox = await node.create(TENANT, SandboxSpec(wasm=wasm))
    process = await sandbox.exec(ExecSpec(argv=("loop",), timeout_s=0.2))
    said = await process.read()
    assert said is None or b"interrupt" in said[1]  # the host's own limit may come first
    assert (await process.wait()).shell_status in {134, 137}
    await sandbox.kill()


async def test_no_two_starts_draw_the_same_random_numbers(node: Node) -> None:
    wasm = Wasm(module=await add(node, modules.RANDOM))
    drawn = set()
    for _ in range(4):
        sandbox = await node.create(TENANT, SandboxSpec(wasm=wasm, command=ExecSpec(argv=("random",))))
        drawn.add((await finish(sandbox)).out)
        await asyncio.sleep(0.2)  # the next one is a spare, which has rehearsed
    sandbox = await node.create(TENANT, SandboxSpec(wasm=wasm))
    for _ in range(4):
        process = await sandbox.exec(ExecSpec(argv=("random",)))
        said = b""
        while (piece := await process.read()) is not None:
            said += piece[1]
        drawn.add(said)
    await sandbox.kill()
    assert {len(numbers) for numbers in drawn} == {32}
    assert len(drawn) == 8


async def test_a_module_is_compiled_once(node: Node) -> None:
    digest = await add(node, modules.HELLO)
    first = await node.modules.find(TENANT, digest)
    assert await add(node, modules.HELLO) == digest
    assert first.size_bytes == len(modules.HELLO)
    assert first.kind == "module"


async def test_one_tenant_s_module_is_not_another_s(node: Node) -> None:
    digest = await add(node, modules.HELLO)
    with pytest.raises(ModuleNotFound):
        await node.modules.find("uid-4711", digest)
    with pytest.raises(ModuleNotFound):
        await node.create("uid-4711", SandboxSpec(command=ExecSpec(argv=("x",)), wasm=Wasm(module=digest)))


@pytest.mark.parametrize(("data", "why"), [
    (b"", "first bytes"), (b"(module)", "text format"), (b"\x7fELF" + bytes(60), "first bytes"),
    (b"\0asm\1\0\0\0\xff", "malformed section"), (b"\0asm\r\0\1\0\xff\xff", "malformed section"),
])  # fmt: skip
async def test_what_is_no_module_is_refused(node: Node, data: bytes, why: str) -> None:
    with pytest.raises(ModuleRefused, match=why):
        await add(node, data)


async def test_a_library_is_no_command(run_module: RunModule) -> None:
    ran = await run_module(modules.assemble('(module (func (export "add") (result i32) (i32.const 1)))'))
    assert ran.record.exit_code == 126
    assert b"exports no _start" in ran.err


async def test_an_import_that_nobody_has_is_told(run_module: RunModule) -> None:
    ran = await run_module(modules.assemble('(module (import "env" "system" (func)) (func (export "_start")))'))
    assert ran.record.exit_code == 126
    assert b"env::system" in ran.err


async def test_what_the_level_has_not_is_refused(node: Node) -> None:
    digest = await add(node, modules.HELLO)
    with pytest.raises(Unsupported, match="runs at the wasm level"):
        await node.create(TENANT, SandboxSpec(isolation=Isolation.CONTAINER, wasm=Wasm(module=digest)))
    sandbox = await node.create(TENANT, SandboxSpec(wasm=Wasm(module=digest)))
    with pytest.raises(Unsupported, match="no code contexts"):
        await sandbox.open_context()
    await sandbox.kill()
    with pytest.raises(InvalidRequest, match="pids"):
        await node.create(TENANT, SandboxSpec(wasm=Wasm(module=digest), resources=ResourceRequest(pids=4)))


async def test_only_a_module_s_name_makes_auto_choose_this_level(run: Run) -> None:
    assert (await run(Isolation.AUTO, "true")).record.isolation is not Isolation.WASM
    ran = await run(Isolation.AUTO, "gone.wasm")
    assert ran.record.isolation is Isolation.WASM
    assert ran.record.exit_code == 127
