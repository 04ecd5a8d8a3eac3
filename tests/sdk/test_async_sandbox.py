"""The async client against the real daemon, on asyncio; the same work as its blocking twin, many at once."""

from __future__ import annotations

import os

import anyio
import pytest

from tartarus import AsyncSandbox
from tartarus.model.errors import CommandNotFound, FileFailed, SandboxNotFound, TimeLimit
from tartarus.model.states import State
from tartarus.sdk import AsyncClient, CodeFailed, CommandFailed, CommandTimedOut

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("home")]


@pytest.fixture
async def sbx(home, anyio_backend):
    async with AsyncSandbox.create(timeout_s=120) as made:
        yield made


async def test_both_ways_to_make_one():
    sandbox = await AsyncSandbox.create()
    assert (await sandbox.run(["echo", "hi"])).stdout == "hi\n"
    await AsyncSandbox.kill(sandbox.id)
    assert (await sandbox.wait(30)).state is State.KILLED
    async with AsyncSandbox.create() as other:
        assert (await other.refresh()).state is State.RUNNING
    assert (await other.wait(30)).state is State.KILLED


async def test_a_cancelled_block_leaves_nothing():
    with anyio.CancelScope() as scope:
        async with AsyncSandbox.create() as sandbox:
            scope.cancel()
            await anyio.sleep_forever()
    assert (await sandbox.wait(30)).state is State.KILLED


async def test_results_and_errors(sbx):
    assert (await sbx.run(["cat"], input=bytes(20_000_000))).stdout_bytes == bytes(20_000_000)
    assert (await sbx.run(["true"], input=bytes(20_000_000))).ok
    with pytest.raises(CommandFailed):
        await sbx.run(["false"], check=True)
    with pytest.raises(CommandNotFound):
        await sbx.run(["no-such-command"])
    with pytest.raises(CommandTimedOut):
        await sbx.run(["sleep", "60"], timeout_s=0.3)
    with pytest.raises(SandboxNotFound):
        await AsyncSandbox.connect("nobody")
    with pytest.raises(TimeLimit):
        await sbx.wait(0.1)


async def test_conversation(sbx):
    async with sbx.start(["cat"], stdin=True) as process:
        chunks = aiter(process)
        await process.write("one\n")
        assert (await anext(chunks)).text == "one\n"
        await process.close_stdin()
        assert (await process.wait()).exit_code == 0
    process = await sbx.start(["sleep", "1000"])
    await process.kill()
    assert (await process.wait()).signal == 9


async def test_one_task_reads_while_another_writes(sbx):
    received = 0
    async with sbx.start(["cat"], stdin=True) as process, anyio.create_task_group() as group:

        async def write() -> None:
            for _ in range(100):
                await process.write(bytes(500_000))
            await process.close_stdin()

        group.start_soon(write)
        async for chunk in process:
            received += len(chunk.data)
    assert received == 50_000_000


async def test_code(sbx):
    await sbx.run_code("x = 20")
    assert (await sbx.run_code("x + 22")).text == "42"
    with pytest.raises(CodeFailed):
        await sbx.run_code("1/0", check=True)
    async with sbx.open_context() as context:
        assert not (await context.run("x")).ok


async def test_files(sbx, tmp_path):
    data = os.urandom(1_000_000)
    await sbx.files.write("/work/a/b", data)
    assert await sbx.files.read("/work/a/b") == data
    (tmp_path / "f").write_bytes(data)
    with (tmp_path / "f").open("rb") as file:
        await sbx.files.write("/work/c", file)
    assert await sbx.files.read("/work/c") == data

    async def pieces():
        yield b"one"
        yield b"two"

    await sbx.files.write("/work/d", pieces())
    assert await sbx.files.read_text("/work/d") == "onetwo"
    assert await sbx.files.exists("/work/d")
    with pytest.raises(FileFailed):
        await sbx.files.read("/nowhere")
    async with sbx.files.watch("/work") as events:
        await sbx.run(["touch", "/work/new"])
        assert (await anext(aiter(events))).path == "/work/new"


async def test_life(sbx):
    await sbx.pause()
    assert sbx.info.state is State.PAUSED
    await sbx.resume()
    assert (await sbx.stats()).memory_bytes > 0
    assert sbx.id in [found.id for found in await AsyncSandbox.list()]
    async with AsyncSandbox.create(command=["sh", "-c", "echo logged; sleep 0.2; echo more"]) as other:
        async with other.attach() as process:
            assert (await process.wait()).exit_code == 0
        assert b"".join([entry.data async for entry in other.logs(follow=True)]) == b"logged\nmore\n"


async def test_many_at_once(sbx):
    async def one(number: int) -> None:
        assert (await sbx.run(["echo", str(number)])).stdout == f"{number}\n"

    async with anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(one, number)


async def test_client():
    client = AsyncClient()
    assert (await client.version()).pid > 0
    assert {"host", "python-ds"} <= {template.id for template in await client.templates()}
    assert any(level.ok for level in await client.levels())
