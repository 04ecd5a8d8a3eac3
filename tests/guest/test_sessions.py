"""A session that stands still and goes on: with the same host end, with another one, with some of its streams."""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal
import time
from pathlib import Path

import msgspec
import pytest

from tartarus.guest.channel import GuestChannel
from tartarus.guest.process import GuestProcess, ProcessState
from tartarus.guest.protocol import ToGuest
from tartarus.guest.session import SessionState
from tartarus.model.errors import GuestFailed, InvalidState

from .conftest import Agent, command, output_of, shell

pytestmark = pytest.mark.anyio
COUNT = "i=0; while [ $i -lt {n} ]; do echo line $i; i=$((i+1)); done"


def stored(state: SessionState) -> SessionState:
    """As it comes back from where it was kept."""
    return msgspec.json.decode(msgspec.json.encode(state), type=SessionState)


async def meet_again(guest: GuestChannel, state: SessionState) -> GuestChannel:
    """Another host end for the same agent, as after a restore; the old one is without a guest."""
    fresh = guest.unplug()
    await fresh.open(stored(state))
    await fresh.ready()
    return fresh


async def test_a_quiet_session_goes_on_by_itself(guest: GuestChannel) -> None:
    process = guest.exec(shell(COUNT.format(n=20_000)))
    await process.started()
    for _ in range(5):
        state = await guest.quiesce()
        assert guest.is_quiet
        assert [stream.opened_by for stream in state.streams] in ([ToGuest.EXEC], [])
        guest.go_on()
        await guest.ping()
    out, _ = await output_of(process)
    assert out == b"".join(b"line %d\n" % number for number in range(20_000))


async def test_what_is_asked_meanwhile_waits(guest: GuestChannel, tmp_path: Path) -> None:
    process = guest.exec(command("cat", stdin=True))
    await process.started()
    await guest.quiesce()
    writing = asyncio.create_task(process.write_stdin(b"later"))
    reading = asyncio.create_task(output_of(process))
    making = asyncio.create_task(guest.mkdir(str(tmp_path / "made")))
    running = guest.exec(shell("echo hello"))
    await asyncio.sleep(0.05)
    assert guest.calls_waiting
    assert not (tmp_path / "made").exists()
    assert not reading.done()
    guest.go_on()
    await writing
    process.close_stdin()
    await making
    assert (await reading)[0] == b"later"
    assert (await output_of(running))[0] == b"hello\n"


async def test_another_host_end_carries_every_stream_on(guest: GuestChannel, agent: Agent, tmp_path: Path) -> None:
    """In one daemon: the streams' other ends outlive the guest they talked to."""
    talking = guest.exec(command("cat", stdin=True))
    telling = guest.exec(shell(COUNT.format(n=50_000)))
    watch = guest.watch(str(tmp_path))
    await watch.ready()
    (tmp_path / "big").write_bytes(bytes(range(256)) * 40_000)
    read = guest.read(str(tmp_path / "big"))
    content = bytearray(await anext(read))
    await talking.write_stdin(b"one ")
    state = await guest.quiesce()
    fresh = await meet_again(guest, state)
    await fresh.fixup(entropy=b"x" * 32)
    begun_meanwhile = guest.exec(shell("echo begun; cat", stdin=True))
    writing = [
        asyncio.create_task(talking.write_stdin(b"two")),
        asyncio.create_task(begun_meanwhile.write_stdin(b"fed")),
    ]
    await asyncio.sleep(0)
    guest.plug(fresh)
    guest.go_on()
    await asyncio.gather(*writing)
    talking.close_stdin()
    begun_meanwhile.close_stdin()
    async for piece in read:
        content += piece
    assert bytes(content) == bytes(range(256)) * 40_000
    assert (await output_of(talking))[0] == b"one two"
    assert (await output_of(begun_meanwhile))[0] == b"begun\nfed"
    assert (await output_of(telling))[0] == b"".join(b"line %d\n" % number for number in range(50_000))
    assert (await anext(watch)).path.endswith("big")
    assert (await guest.exec(shell("exit 3")).wait()).code == 3


async def test_a_new_daemon_takes_a_command_over(guest: GuestChannel) -> None:
    """Nothing of the old end is there but what was written down."""
    process = guest.exec(shell(f"read a; {COUNT.format(n=60_000)}; read b; echo $a $b >&2; exit 5", stdin=True))
    pid, _ = await process.started()
    await process.write_stdin(b"first\n")
    before = bytearray()
    while len(before) < 200_000:
        piece = await process.read()
        assert piece is not None
        before += piece[1]
    state = await guest.quiesce()
    kept = msgspec.json.decode(msgspec.json.encode(process.state()), type=ProcessState)
    fresh = await meet_again(guest, state)
    again = GuestProcess.restored(fresh, kept)
    fresh.go_on("detach")
    assert await again.started() == (pid, False)
    await again.write_stdin(b"second\n")
    out, err = await output_of(again)
    assert bytes(before) + out == b"".join(b"line %d\n" % number for number in range(60_000))
    assert err == b"first second\n"
    assert (await again.wait()).code == 5
    fresh.close()


@pytest.mark.parametrize("others", ["detach", "kill"])
async def test_commands_that_nobody_names(guest: GuestChannel, tmp_path: Path, others: str) -> None:
    """Let go, they live on though nobody reads what they write; killed, they are gone with their group."""
    script = f"yes | head -c 3000000; cat; echo done > {tmp_path}/done; sleep 1000 & wait"
    process = guest.exec(shell(script, stdin=True))
    quiet = guest.exec(command("sleep", "1000"))
    pids = [(await process.started())[0], (await quiet.started())[0]]
    watch = guest.watch(str(tmp_path))
    await watch.ready()
    state = await guest.quiesce()
    assert len(state.streams) == 3
    fresh = await meet_again(guest, state)
    fresh.go_on(others)  # type: ignore[arg-type]
    deadline = time.monotonic() + 20
    if others == "kill":
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert not (tmp_path / "done").exists()
    else:
        while not (tmp_path / "done").exists():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert Path(f"/proc/{pids[1]}").exists()
    state = await fresh.quiesce()
    assert [stream.opened_by for stream in state.streams if stream.opened_by != ToGuest.EXEC] == []
    fresh.close()


async def test_a_command_on_a_terminal_is_let_go(guest: GuestChannel, tmp_path: Path) -> None:
    process = guest.exec(shell(f"yes | head -c 300000; echo done > {tmp_path}/done", tty=True))
    await process.started()
    fresh = await meet_again(guest, await guest.quiesce())
    fresh.go_on("detach")
    deadline = time.monotonic() + 20
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    fresh.close()


async def test_a_command_that_ends_meanwhile_says_so_afterwards(guest: GuestChannel, tmp_path: Path) -> None:
    script = f"until [ -e {tmp_path}/now ]; do sleep 0.01; done; echo last words; exit 4"
    process = guest.exec(shell(script))
    pid, _ = await process.started()
    state = await guest.quiesce()
    (tmp_path / "now").touch()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    kept = process.state()
    fresh = await meet_again(guest, state)
    again = GuestProcess.restored(fresh, kept)
    fresh.go_on("kill")
    assert (await output_of(again))[0] == b"last words\n"
    assert (await again.wait()).code == 4
    fresh.close()


async def test_many_times_in_a_row_under_load(guest: GuestChannel) -> None:
    """Bytes in both directions, cut by stands and by new ends at random moments: none is lost, none comes twice."""
    dice = random.Random(7)
    data = dice.randbytes(8_000_000)
    channel = guest
    process = channel.exec(command("cat", stdin=True, window=100_000))
    digest = hashlib.sha256()
    received = 0
    state: ProcessState | None = None

    async def feed() -> None:
        at = 0
        while at < len(data):
            size = dice.randint(1, 90_000)
            await process.write_stdin(data[at : at + size])
            at += size
        process.close_stdin()

    async def take() -> None:
        nonlocal received
        while (piece := await process.read()) is not None:
            digest.update(piece[1])
            received += len(piece[1])

    feeding, taking = asyncio.create_task(feed()), asyncio.create_task(take())
    rounds = 0
    while not taking.done():
        state_now = await channel.quiesce()
        rounds += 1
        if dice.random() < 0.5 or not state_now.streams:
            channel.go_on()
        else:
            state = process.state()
            assert state.stream == state_now.streams[0].id
            channel.plug(await meet_again(channel, state_now))
            channel.go_on()
        await asyncio.sleep(dice.random() / 500)
    await asyncio.gather(feeding, taking)
    assert rounds > 5
    assert (received, digest.digest()) == (len(data), hashlib.sha256(data).digest())


async def test_it_stands_still_once_at_a_time(guest: GuestChannel) -> None:
    await guest.quiesce()
    with pytest.raises(InvalidState, match="already"):
        await guest.quiesce()
    guest.go_on()
    guest.go_on()
    await guest.ping()


async def test_an_agent_that_does_not_answer(guest: GuestChannel, agent: Agent) -> None:
    """It may be frozen. The session goes on when it thaws, and a later request is not answered by the earlier one."""
    await guest.ping()
    agent.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(GuestFailed, match="stand"):
            await guest.quiesce(limit_s=0.1)
        waiting = asyncio.create_task(guest.ping())
        await asyncio.sleep(0.05)
        assert not waiting.done()
    finally:
        agent.process.send_signal(signal.SIGCONT)
    await waiting
    await guest.quiesce()
    guest.go_on()
    assert (await guest.exec(shell("exit 6")).wait()).code == 6


async def test_a_quiet_channel_that_is_closed_fails_what_waits(guest: GuestChannel) -> None:
    process = guest.exec(command("sleep", "1000"))
    await process.started()
    await guest.quiesce()
    old = guest.unplug()
    waiting = [asyncio.create_task(work) for work in (process.read(), guest.stat("/"), guest.ping())]
    await asyncio.sleep(0)
    guest.close()
    old.close()
    for task in waiting:
        with pytest.raises(GuestFailed):
            await task


async def test_shutting_down_a_quiet_guest(guest: GuestChannel) -> None:
    process = guest.exec(shell("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done"))
    assert await process.read() == (1, b"up\n")
    await guest.quiesce()
    await guest.shutdown(10)
    assert (await output_of(process))[0] == b"bye\n"
