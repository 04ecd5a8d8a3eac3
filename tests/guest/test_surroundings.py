"""Where the agent finds itself: old kernels, filters, a hidden /proc, a pid namespace of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel, channel_pair
from tartarus.model.errors import FileFailed

from .conftest import command, descendants, output_of, shell

pytestmark = pytest.mark.anyio
WITHOUT = Path(__file__).with_name("without.py")
MISSING = "openat2,close_range,splice,renameat2,pidfd_open,clone3,faccessat2,statx,getrandom"
Start = Callable[..., Awaitable[tuple[GuestChannel, subprocess.Popen[bytes]]]]


@pytest.fixture
async def start(agent_binary_path: Path) -> AsyncIterator[Start]:
    """Starts an agent behind a command prefix."""
    started: list[tuple[subprocess.Popen[bytes], GuestChannel]] = []

    async def begin(
        *prefix: str | Path, options: tuple[str, ...] = ("--shared-pids",)
    ) -> tuple[GuestChannel, subprocess.Popen[bytes]]:
        host, guest = channel_pair()
        with guest:
            process = subprocess.Popen(
                [*prefix, agent_binary_path, "agent", f"--channel={guest.fileno()}", *options],
                pass_fds=[guest.fileno()],
            )
        channel = GuestChannel(host)
        started.append((process, channel))
        await channel.open()
        return channel, process

    yield begin
    for process, channel in started:
        channel.close()
        left = descendants(process.pid)
        process.wait(timeout=30)
        assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]


async def test_calls_that_the_kernel_or_a_filter_lacks(start: Start, tmp_path: Path) -> None:
    guest, _ = await start(sys.executable, WITHOUT, MISSING)
    assert await output_of(guest.exec(shell("echo out; cat >&2; exit", stdin=False))) == (b"out\n", b"")
    process = guest.exec(command("head", "-c", "20000000", "/dev/urandom"))
    assert len((await output_of(process))[0]) == 20_000_000
    with pytest.raises(FileFailed):
        await guest.write(f"{tmp_path}/a/b", b"x")
    await guest.write(f"{tmp_path}/a/b", b"content", parents=True, exclusive=True)
    with pytest.raises(FileFailed, match="exists"):
        await guest.write(f"{tmp_path}/a/b", b"other", exclusive=True)
    assert [piece async for piece in guest.read(f"{tmp_path}/a/b")] == [b"content"]
    assert [entry.path for entry in await guest.list(f"{tmp_path}/a")] == [f"{tmp_path}/a/b"]
    await guest.remove(f"{tmp_path}/a", recursive=True)
    assert list(tmp_path.iterdir()) == []


async def test_descriptors_above_ours_are_closed_without_close_range(start: Start) -> None:
    again = f"[{sys.executable!r}, *sys.argv[1:]]"
    leaky = f"import os, sys; os.dup2(2, 77); os.set_inheritable(77, True); os.execv({sys.executable!r}, {again})"
    guest, process = await start(sys.executable, "-c", leaky, WITHOUT, "close_range")
    await guest.ready()
    assert "77" not in os.listdir(f"/proc/{process.pid}/fd")
    assert (await guest.exec(command("true")).wait()).code == 0


@pytest.mark.needs("landlock")
async def test_a_hidden_proc(start: Start) -> None:
    guest, process = await start(sys.executable, WITHOUT, "proc")
    tree = guest.exec(shell("(setsid sh -c 'trap \"\" TERM HUP; sleep 1000; sleep 1000' &) ; sleep 1000 & echo up"))
    assert await tree.read() == (1, b"up\n")
    await tree.wait()
    polite = guest.exec(shell("trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.01; done"))
    assert await polite.read() == (1, b"ready\n")
    left = descendants(process.pid)
    assert len(left) >= 3
    await guest.shutdown(0.3)
    assert (await output_of(polite))[0] == b"bye\n"
    process.wait(timeout=30)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]


@pytest.mark.needs("user-namespaces")
class TestOwnPids:
    UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")

    async def test_the_agent_is_the_first_process(self, start: Start) -> None:
        guest, _ = await start(*self.UNSHARE, options=())
        assert (await guest.ready()).pid == 1
        process = guest.exec(shell("(sleep 0.01 &); kill -TERM 1; kill -KILL 1; echo $PPID"))
        assert (await output_of(process))[0] == b"1\n"
        assert (await guest.exec(command("true")).wait()).code == 0

    async def test_its_end_is_everybodys_end(self, start: Start) -> None:
        guest, process = await start(*self.UNSHARE, options=())
        stubborn = guest.exec(shell("trap '' TERM; (setsid sleep 1000 &); echo up; while :; do sleep 0.01; done"))
        assert await stubborn.read() == (1, b"up\n")
        left = descendants(process.pid)
        assert len(left) >= 3
        guest.close()
        process.wait(timeout=30)
        while [pid for pid in left if Path(f"/proc/{pid}").exists()]:
            await asyncio.sleep(0)

    async def test_shutdown(self, start: Start) -> None:
        guest, _ = await start(*self.UNSHARE, options=())
        polite = guest.exec(shell("trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.01; done"))
        assert await polite.read() == (1, b"ready\n")
        await guest.shutdown(20)
        assert (await output_of(polite))[0] == b"bye\n"


def test_usage(agent_binary_path: Path) -> None:
    for arguments in (
        [],
        ["agent"],
        ["agent", "--channel=x"],
        ["agent", "--channel=-1"],
        ["agent", "--what"],
        ["what"],
    ):
        done = subprocess.run([str(agent_binary_path), *arguments], capture_output=True, check=False)
        assert done.returncode == 64
        assert done.stderr


def test_a_channel_that_is_none(agent_binary_path: Path) -> None:
    done = subprocess.run([agent_binary_path, "agent", "--channel=77", "--shared-pids"], check=False)
    assert done.returncode == 125
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        argv = [str(agent_binary_path), "agent", f"--channel={theirs.fileno()}", "--shared-pids"]
        assert subprocess.run(argv, pass_fds=[theirs.fileno()], check=False).returncode == 0
