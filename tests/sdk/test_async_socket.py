"""The async client's socket: waiting, cancelling, hanging up."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest

from tartarus.sdk.async_socket import AsyncSocket

pytestmark = pytest.mark.anyio


@pytest.fixture
async def ends() -> AsyncIterator[tuple[AsyncSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    stream = AsyncSocket(ours)
    yield stream, theirs
    stream.close()
    theirs.close()


async def test_a_wait_cancelled_in_the_turn_in_which_data_arrives(ends):
    stream, peer = ends
    for _ in range(20):  # anyio's own stream fails this
        async with anyio.create_task_group() as group:
            group.start_soon(stream.receive, 10)
            await anyio.wait_all_tasks_blocked()
            peer.send(b"x")
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        with anyio.move_on_after(0.01):  # taken by the cancelled call or still there: either way the stream goes on
            assert await stream.receive(10) == b"x"


async def test_much_both_ways(ends):
    stream, peer = ends
    data = bytes(range(256)) * 20_000
    received = bytearray()

    def echo() -> None:
        left = len(data)
        while left:
            part = peer.recv(65536)
            left -= len(part)
            peer.sendall(part)

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, echo)
        group.start_soon(stream.send, data)
        while len(received) < len(data):
            received += await stream.receive(65536)
    assert received == data


async def test_the_peer_hangs_up(ends):
    stream, peer = ends
    peer.close()
    assert await stream.receive(10) == b""
    with pytest.raises(OSError, match="Broken pipe"):
        await stream.send(b"x")


async def test_closing_wakes_whoever_waits(ends):
    stream, _ = ends
    async with anyio.create_task_group() as group:
        group.start_soon(stream.receive, 10)
        await anyio.wait_all_tasks_blocked()
        stream.close()
        stream.close()


async def test_a_queue_that_is_full(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(0)
    with listener:
        first = await AsyncSocket.connect(str(tmp_path / "s"))
        second: list[AsyncSocket] = []

        async def connect() -> None:
            second.append(await AsyncSocket.connect(str(tmp_path / "s")))

        async with anyio.create_task_group() as group:
            group.start_soon(connect)
            await anyio.lowlevel.checkpoint()
            accepted = [listener.accept()[0]]
        accepted.append(listener.accept()[0])
        for stream in (first, *second):
            stream.close()
        for peer in accepted:
            peer.close()


async def test_nobody_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        await AsyncSocket.connect(str(tmp_path / "s"))
