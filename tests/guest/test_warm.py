"""The hand-off to a warm runner, and what happens when the runner is not what it should be."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel, channel_pair

from .conftest import command, descendants, output_of, shell

pytestmark = pytest.mark.anyio
RUNNER = Path(__file__).with_name("fake_runner.py")
Start = Callable[..., Awaitable[GuestChannel]]


@pytest.fixture
async def start(agent_binary_path: Path) -> AsyncIterator[Start]:
    """Starts an agent beside a runner of the named behaviour."""
    started: list[tuple[subprocess.Popen[bytes], GuestChannel]] = []

    async def begin(behaviour: str, *arguments: str) -> GuestChannel:
        host, guest = channel_pair()
        with guest:
            process = subprocess.Popen(
                [sys.executable, RUNNER, agent_binary_path, str(guest.fileno()), behaviour, *arguments],
                pass_fds=[guest.fileno()],
            )
        channel = GuestChannel(host)
        started.append((process, channel))
        await channel.open()
        return channel

    yield begin
    for process, channel in started:
        channel.close()
        left = descendants(process.pid)
        assert process.wait(timeout=30) == 0
        assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]


async def test_the_runner_becomes_the_program(start: Start) -> None:
    guest = await start("once")
    assert (await guest.ready()).warm_runner
    process = guest.exec(command("python3", "-c", "pass", warm=True, once=True))
    assert (await process.started())[1] is True
    assert (await output_of(process))[0].startswith(b"warm ")
    status = await process.wait()
    assert status.code == 9
    assert status.peak_memory_bytes > 0
    assert await output_of(guest.exec(command("echo", "cold", warm=True))) == (b"cold\n", b"")


async def test_the_runner_forks_for_each(start: Start) -> None:
    guest = await start("forks")
    processes = [guest.exec(command("python3", warm=True)) for _ in range(5)]
    for process in processes:
        assert (await process.started())[1] is True
        assert await output_of(process) == (b"forked\n", b"")
        assert (await process.wait()).code == 3


async def test_signals_reach_warm_programs(start: Start) -> None:
    guest = await start("sleeps")
    process = guest.exec(command("python3", warm=True, once=True))
    process.signal(signal.SIGTERM)
    assert (await process.wait()).signal == signal.SIGTERM


async def test_a_program_outlives_its_runner(start: Start) -> None:
    guest = await start("dies_after_fork")
    process = guest.exec(command("python3", warm=True))
    assert await output_of(process) == (b"orphan\n", b"")
    assert (await process.wait()).code == 5


async def test_a_request_larger_than_the_socket_takes(start: Start) -> None:
    guest = await start("once")
    process = guest.exec(command("python3", *["x" * 100_000] * 9, warm=True, once=True))
    out, _ = await output_of(process)
    assert int(out.split()[1]) > 900_000


async def test_signals_before_the_start_are_kept(start: Start, tmp_path: Path) -> None:
    guest = await start("slow", str(tmp_path / "go"))
    process = guest.exec(command("python3", warm=True, once=True))
    process.signal(signal.SIGURG)
    await guest.ping()
    (tmp_path / "go").touch()
    assert await output_of(process) == (b"late\n", b"")


@pytest.mark.parametrize(
    "behaviour", ["refuses", "dies", "dies_when_asked", "nonsense", "names_pid_1", "loses_child"]
)  # fmt: skip
async def test_what_can_not_run_warm_runs_cold(start: Start, behaviour: str) -> None:
    guest = await start(behaviour)
    processes = [guest.exec(shell("cat; exit 4", warm=True, stdin=True)) for _ in range(3)]
    for process in processes:
        await process.write_stdin(b"input")
        process.close_stdin()
        assert await output_of(process) == (b"input", b"")
        assert (await process.started())[1] is False
        assert (await process.wait()).code == 4
        if behaviour == "loses_child":
            break  # it answers no more: the others wait for it


async def test_a_runner_can_not_name_a_stranger_as_the_program(start: Start) -> None:
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        guest = await start("names_stranger", str(stranger.pid))
        process = guest.exec(shell("echo cold", warm=True))
        await process.started()
        process.signal(signal.SIGKILL)
        process.signal(signal.SIGKILL, group=True)
        await guest.ping()
        stranger.terminate()
        assert stranger.wait() == -signal.SIGTERM


async def test_a_runner_that_reads_nothing_stalls_nobody_else(start: Start) -> None:
    guest = await start("never_reads")
    stuck = guest.exec(command("python3", *["x" * 100_000] * 9, warm=True))
    assert await output_of(guest.exec(command("echo", "cold"))) == (b"cold\n", b"")
    assert not stuck._started.done()


async def test_cold_programs_inherit_nothing_of_the_runner(start: Start) -> None:
    guest = await start("refuses")
    out, _ = await output_of(guest.exec(command("ls", "-1", "/proc/self/fd", warm=True)))
    assert set(out.decode().split()) <= {"0", "1", "2", "3"}
