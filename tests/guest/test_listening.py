"""An agent whose channel is accepted from a listening socket, and accepted anew when it was lost (machines on vsock)."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel, GuestExec

pytestmark = pytest.mark.anyio


@pytest.fixture
async def place(agent_binary_path: Path, tmp_path: Path) -> AsyncIterator[str]:
    """Where an agent listens; it must live until the end."""
    path = str(tmp_path / "agent.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        listening.setblocking(False)
        process = subprocess.Popen(
            [agent_binary_path, "agent", f"--listen={listening.fileno()}", "--shared-pids"],
            pass_fds=(listening.fileno(),), env={},
        )  # fmt: skip
    yield path
    assert process.poll() is None
    process.kill()
    process.wait()


async def connect(path: str) -> GuestChannel:
    """A host that greets."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    channel = GuestChannel(sock)
    await channel.open()
    await channel.ready()
    return channel


async def said(channel: GuestChannel, *argv: str) -> bytes:
    """What a command prints."""
    process = channel.exec(GuestExec(argv=argv, env={"PATH": os.defpath}))
    text = b""
    while (piece := await process.read()) is not None:
        text += piece[1]
    await process.wait()
    return text


async def test_a_host_that_comes_back_is_served_anew(place: str) -> None:
    """What an earlier one left under way is gone."""
    for number in range(3):
        channel = await connect(place)
        channel.exec(GuestExec(argv=("/bin/sleep", "1000"), env={}))
        assert await said(channel, "/bin/echo", str(number)) == b"%d\n" % number
        channel.close()


async def test_a_host_that_breaks_off_in_the_middle_of_frames(place: str) -> None:
    """Half a frame from it, and much output on the way to it: neither reaches the next one."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(place)
        sock.send(b"\x05\x00\x00")
    first = await connect(place)
    flood = first.exec(GuestExec(argv=("/usr/bin/yes",), env={}))
    await flood.read()
    first.close()
    second = await connect(place)
    assert await said(second, "/bin/echo", "clean") == b"clean\n"
    second.close()


async def test_a_host_that_has_not_greeted_is_sent_nothing(place: str) -> None:
    """However long it takes: the output of what an earlier one began would be of streams it never opened."""
    first = await connect(place)
    flood = first.exec(GuestExec(argv=("/usr/bin/yes",), env={}))
    await flood.read()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(place)
        await asyncio.wait_for(asyncio.shield(first.closed), 10)
        sock.setblocking(False)
        await asyncio.sleep(0.2)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.setblocking(True)
        channel = GuestChannel(sock.dup())
    await channel.open()
    await channel.ready()
    assert await said(channel, "/bin/echo", "clean") == b"clean\n"
    channel.close()


async def test_the_newest_host_counts(place: str) -> None:
    """As when a monitor broke the connection, and the machine has not noticed yet."""
    first = await connect(place)
    second = await connect(place)
    await asyncio.wait_for(asyncio.shield(first.closed), 10)
    assert await said(second, "/bin/echo", "mine") == b"mine\n"
    second.close()


async def test_a_host_that_speaks_nonsense_ends_the_agent(agent_binary_path: Path, tmp_path: Path) -> None:
    """A broken protocol is no lost connection."""
    path = str(tmp_path / "agent.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        listening.setblocking(False)
        process = subprocess.Popen(
            [agent_binary_path, "agent", f"--listen={listening.fileno()}", "--shared-pids"],
            pass_fds=(listening.fileno(),), env={},
        )  # fmt: skip
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.send(b"\xff" * 64)
        await asyncio.to_thread(process.wait, 20)
