"""Commands: output, input, exit, signals, terminals, refusals."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel
from tartarus.model.errors import CommandNotFound, GuestFailed, InvalidRequest, NotExecutable

from .conftest import ENV, Agent, command, output_of, shell

pytestmark = pytest.mark.anyio


async def test_greeting(guest: GuestChannel, agent: Agent) -> None:
    ready = await guest.ready()
    assert (ready.version, ready.pid, ready.warm_runner) == (1, agent.pid, False)


async def test_output_streams_stay_apart_and_the_exit_code_comes_through(guest: GuestChannel) -> None:
    process = guest.exec(shell("echo out; echo err >&2; exit 7"))
    assert await output_of(process) == (b"out\n", b"err\n")
    status = await process.wait()
    assert (status.code, status.signal, status.shell_status) == (7, 0, 7)


async def test_usage_is_reported(guest: GuestChannel) -> None:
    status = await guest.exec(shell("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")).wait()
    assert status.user_ms + status.system_ms > 0
    assert status.peak_memory_bytes > 100_000


async def test_the_environment_is_exactly_the_one_given(guest: GuestChannel) -> None:
    process = guest.exec(command("/usr/bin/env"))
    out, _ = await output_of(process)
    assert dict(line.split("=", 1) for line in out.decode().splitlines()) == ENV


async def test_working_directory(guest: GuestChannel, tmp_path: Path) -> None:
    out, _ = await output_of(guest.exec(command("pwd", cwd=str(tmp_path))))
    assert out.decode().strip() == str(tmp_path)


async def test_the_program_is_searched_in_its_own_path(guest: GuestChannel, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    spec = command("tool")
    assert isinstance(spec.env, dict)
    with pytest.raises(CommandNotFound):
        await guest.exec(spec).started()
    out, _ = await output_of(guest.exec(type(spec)(argv=("tool",), env={"PATH": f"/nowhere:{tmp_path}"})))
    assert out == b"found\n"


async def test_no_descriptor_of_the_agent_is_inherited(guest: GuestChannel) -> None:
    out, _ = await output_of(guest.exec(command("ls", "-1", "/proc/self/fd")))
    assert set(out.decode().split()) <= {"0", "1", "2", "3"}  # 3 is ls reading the directory


async def test_signals_are_back_to_normal_in_programs(guest: GuestChannel) -> None:
    out, _ = await output_of(guest.exec(command("grep", "-E", "^Sig(Blk|Ign|Pnd)", "/proc/self/status")))
    assert {int(line.split()[1], 16) for line in out.decode().splitlines()} == {0}


async def test_each_command_leads_a_session_of_its_own(guest: GuestChannel) -> None:
    process = guest.exec(command("cat", "/proc/self/stat"))
    pid, _ = await process.started()
    out, _ = await output_of(process)
    group, session = out.decode().rpartition(")")[2].split()[2:4]
    assert (int(group), int(session)) == (pid, pid)


async def test_input_reaches_the_program_and_ends(guest: GuestChannel) -> None:
    process = guest.exec(command("cat", stdin=True))
    await process.write_stdin(b"one ")
    await process.write_stdin(b"two")
    process.close_stdin()
    assert await output_of(process) == (b"one two", b"")


async def test_without_input_programs_read_end_of_file(guest: GuestChannel) -> None:
    process = guest.exec(command("cat"))
    assert await output_of(process) == (b"", b"")
    with pytest.raises(InvalidRequest):
        await guest.exec(command("sleep", "100")).write_stdin(b"x")


async def test_much_input_both_ways(guest: GuestChannel) -> None:
    data = bytes(range(256)) * 20_000
    process = guest.exec(command("cat", stdin=True))

    async def feed() -> None:
        await process.write_stdin(data)
        process.close_stdin()

    feeding = asyncio.create_task(feed())
    out, _ = await output_of(process)
    await feeding
    assert out == data


async def test_input_that_nobody_reads_is_held_back_and_dropped_at_the_end(guest: GuestChannel) -> None:
    process = guest.exec(shell("read line; echo got $line", stdin=True))
    writing = asyncio.create_task(process.write_stdin(b"first\n" + bytes(4 * 1024 * 1024)))
    assert await output_of(process) == (b"got first\n", b"")
    await writing


async def test_input_for_a_program_that_closed_its_end_does_not_block(guest: GuestChannel) -> None:
    process = guest.exec(shell("exec 0<&-; echo closed; sleep 1000", stdin=True))
    assert await process.read() == (1, b"closed\n")
    await process.write_stdin(bytes(4 * 1024 * 1024))
    process.signal(signal.SIGKILL)
    assert (await process.wait()).signal == signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGUSR1])
async def test_signals_end_programs(guest: GuestChannel, number: int) -> None:
    process = guest.exec(command("sleep", "1000"))
    process.signal(number)
    status = await process.wait()
    assert (status.code, status.signal, status.shell_status) == (0, number, 128 + number)


async def test_a_signal_to_the_group_reaches_children(guest: GuestChannel, agent: Agent) -> None:
    process = guest.exec(shell("sleep 1000 & echo ready; wait"))
    assert await process.read() == (1, b"ready\n")
    process.signal(signal.SIGTERM, group=True)
    assert await process.read() is None
    assert (await process.wait()).signal == signal.SIGTERM
    await guest.ping()


async def test_signals_that_do_not_exist_do_nothing(guest: GuestChannel) -> None:
    process = guest.exec(command("cat", stdin=True))
    for number in (0, 65, 4_000_000_000):
        process.signal(number)
    process.close_stdin()
    assert (await process.wait()).code == 0


async def test_the_end_does_not_wait_for_grandchildren_that_hold_the_output(guest: GuestChannel) -> None:
    process = guest.exec(shell("sleep 1000 & echo done"))
    assert await output_of(process) == (b"done\n", b"")
    assert (await process.wait()).code == 0


async def test_what_was_written_before_the_end_is_not_lost(guest: GuestChannel) -> None:
    process = guest.exec(shell("sleep 1000 & head -c 60000 /dev/zero"))
    out, _ = await output_of(process)
    assert len(out) == 60000


async def test_output_is_binary_safe_and_complete(guest: GuestChannel) -> None:
    size = 64 * 1024 * 1024
    process = guest.exec(command("head", "-c", str(size), "/dev/urandom"))
    total = 0
    while (piece := await process.read()) is not None:
        total += len(piece[1])
    assert total == size


async def test_unread_output_is_held_back_in_the_sandbox(guest: GuestChannel) -> None:
    window = 256 * 1024
    process = guest.exec(command("cat", "/dev/zero", window=window))
    await process.started()

    def held() -> int:
        return sum(len(data) for _, data in process._output)

    while held() < window:
        await guest.ping()
    for _ in range(20):
        await guest.exec(command("true")).wait()
    assert held() == window
    process.signal(signal.SIGKILL)
    assert (await output_of(process))[0].strip(b"\0") == b""


async def test_a_stalled_stream_does_not_stall_others(guest: GuestChannel) -> None:
    stalled = guest.exec(command("cat", "/dev/zero"))
    out, _ = await output_of(guest.exec(command("echo", "through")))
    assert out == b"through\n"
    stalled.signal(signal.SIGKILL)
    await output_of(stalled)


async def test_many_at_once(guest: GuestChannel) -> None:
    processes = [guest.exec(shell(f"echo {number}; exit {number}")) for number in range(60)]
    for number, process in enumerate(processes):
        assert await output_of(process) == (f"{number}\n".encode(), b"")
        assert (await process.wait()).code == number


async def test_a_stolen_pipe_stalls_nothing(guest: GuestChannel) -> None:
    """A program may open its own output through /proc and read what the agent was about to take."""
    thief = guest.exec(shell("cat /proc/self/fd/1 >/dev/null & cat /dev/zero & sleep 1000"))
    await thief.started()
    for _ in range(200):
        assert await thief.read() is not None
    out, _ = await output_of(guest.exec(command("echo", "alive")))
    assert out == b"alive\n"
    thief.signal(signal.SIGKILL, group=True)
    await output_of(thief)


class TestRefusals:
    async def test_missing_command(self, guest: GuestChannel) -> None:
        for name in ("no-such-command", "/no/such/command", "/etc/passwd/x"):
            process = guest.exec(command(name))
            with pytest.raises(CommandNotFound):
                await process.started()
            with pytest.raises(CommandNotFound):
                await process.wait()
            with pytest.raises(CommandNotFound):
                await process.read()

    async def test_not_executable(self, guest: GuestChannel, tmp_path: Path) -> None:
        plain = tmp_path / "plain"
        plain.write_text("text")
        with pytest.raises(NotExecutable):
            await guest.exec(command(str(plain))).started()
        plain.chmod(0o755)
        with pytest.raises(NotExecutable):
            await guest.exec(command(str(plain))).started()
        with pytest.raises(NotExecutable):
            await guest.exec(command(str(tmp_path))).started()

    async def test_missing_interpreter(self, guest: GuestChannel, tmp_path: Path) -> None:
        script = tmp_path / "script"
        script.write_text("#!/no/such/interpreter\n")
        script.chmod(0o755)
        with pytest.raises(NotExecutable, match="interpreter"):
            await guest.exec(command(str(script))).started()
        spec = type(command("x"))(argv=("script",), env={"PATH": str(tmp_path)})
        with pytest.raises(NotExecutable, match="interpreter"):
            await guest.exec(spec).started()

    async def test_missing_working_directory(self, guest: GuestChannel) -> None:
        with pytest.raises(InvalidRequest, match="working directory"):
            await guest.exec(command("true", cwd="/no/such/place")).started()

    async def test_arguments_the_kernel_refuses(self, guest: GuestChannel) -> None:
        with pytest.raises(InvalidRequest):
            await guest.exec(command("echo", "x" * 200_000)).started()
        with pytest.raises(InvalidRequest):
            await guest.exec(command("")).started()
        with pytest.raises(InvalidRequest):
            await guest.exec(command("echo", "nul\0byte")).started()

    async def test_the_longest_arguments_it_takes(self, guest: GuestChannel) -> None:
        words = ("x" * 100_000,) * 15
        out, _ = await output_of(guest.exec(command("echo", *words)))
        assert len(out) == 15 * 100_001

    async def test_afterwards_all_is_well(self, guest: GuestChannel, agent: Agent) -> None:
        with pytest.raises(CommandNotFound):
            await guest.exec(command("no-such-command")).started()
        assert (await guest.exec(command("true")).wait()).code == 0
        assert agent.descendants() == set()


class TestTerminal:
    async def test_it_is_one(self, guest: GuestChannel) -> None:
        process = guest.exec(shell("test -t 0 && test -t 1 && test -t 2 && stty size", tty=True, rows=30, cols=100))
        assert await output_of(process) == (b"30 100\r\n", b"")

    async def test_resize_is_signalled(self, guest: GuestChannel) -> None:
        process = guest.exec(shell("trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done", tty=True))
        assert await process.read() == (1, b"ready\r\n")
        process.resize(50, 132)
        assert await output_of(process) == (b"50 132\r\n", b"")

    async def test_end_of_input(self, guest: GuestChannel) -> None:
        process = guest.exec(command("cat", tty=True))
        await process.write_stdin(b"line\n")
        process.close_stdin()
        assert await output_of(process) == (b"line\r\nline\r\n", b"")
        assert (await process.wait()).code == 0

    async def test_control_c_interrupts_the_foreground(self, guest: GuestChannel) -> None:
        process = guest.exec(
            shell("trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.01; done", tty=True)
        )
        assert await process.read() == (1, b"ready\r\n")
        await process.write_stdin(b"\x03")
        out, _ = await output_of(process)
        assert b"interrupted" in out
        assert (await process.wait()).code == 3

    async def test_all_output_arrives_before_the_end(self, guest: GuestChannel) -> None:
        out, _ = await output_of(guest.exec(shell("seq 1 5000", tty=True)))
        assert out.split() == [str(n).encode() for n in range(1, 5001)]


async def test_orphans_are_reaped(guest: GuestChannel, agent: Agent) -> None:
    await guest.exec(shell("for i in 1 2 3 4 5; do (sh -c 'exit 0' &) ; done")).wait()
    while agent.descendants(zombies=True):
        await guest.ping()


async def test_nothing_to_do_costs_nothing(guest: GuestChannel, agent: Agent, tmp_path: Path) -> None:
    """With every kind of stream open and idle, the agent sleeps: nothing wakes it but what the host asks."""

    def wakes() -> int:
        lines = Path(f"/proc/{agent.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    processes = [guest.exec(command("sleep", "1000", stdin=True)), guest.exec(command("cat", tty=True))]
    processes.append(guest.exec(shell("exec >&- 2>&-; sleep 1000", tty=True)))
    processes.append(guest.exec(command("cat", "/dev/zero")))
    await processes[0].write_stdin(bytes(200_000))
    watch = guest.watch(str(tmp_path), recursive=True)
    await watch.ready()
    for process in processes:
        await process.started()
    while sum(len(data) for _, data in processes[3]._output) < processes[3].spec.window:
        await guest.ping()
    await guest.exec(command("sleep", "0.2")).wait()
    before = wakes()
    await guest.exec(command("sleep", "0.2")).wait()
    assert wakes() - before < 40
    for process in processes:
        process.signal(signal.SIGKILL, group=True)
    await watch.aclose()


class TestEnds:
    async def test_closing_kills_everything(self, guest: GuestChannel, agent: Agent) -> None:
        process = guest.exec(
            shell("(setsid sh -c 'trap \"\" TERM HUP; sleep 1000; sleep 1000' &) ; sleep 1000 & echo up")
        )
        assert await process.read() == (1, b"up\n")
        await process.wait()
        assert len(agent.descendants()) >= 2
        guest.close()
        agent.process.wait(timeout=30)  # noqa: ASYNC251, RUF100 - the loop has nothing else to do
        assert agent.descendants() == set()

    async def test_a_fork_bomb_ends_too(self, guest: GuestChannel, agent: Agent) -> None:
        bomb = "ulimit -u 1000; f() { sleep 0.01; f & f & wait; }; f 2>/dev/null"
        # Root is above that limit, and the host's other tests need processes, too.
        whose = ("setpriv", "--reuid=64123", "--regid=64123", "--clear-groups") if os.getuid() == 0 else ()
        process = guest.exec(command(*whose, "sh", "-c", bomb))
        await process.started()
        while len(agent.descendants()) < 30:
            await guest.ping()
        guest.close()
        agent.process.wait(timeout=60)
        assert agent.descendants() == set()

    async def test_shutdown_lets_programs_finish(self, guest: GuestChannel) -> None:
        process = guest.exec(shell("trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.01; done"))
        assert await process.read() == (1, b"ready\n")
        await guest.shutdown(20)
        assert guest.closed.done()
        assert (await output_of(process))[0] == b"bye\n"
        assert (await process.wait()).code == 4

    async def test_shutdown_waits_until_all_was_said(self, guest: GuestChannel) -> None:
        process = guest.exec(shell("trap 'head -c 5000000 /dev/zero; exit 4' TERM; echo; while :; do sleep 0.01; done"))
        assert await process.read() == (1, b"\n")
        ending = asyncio.create_task(guest.shutdown(60))
        assert len((await output_of(process))[0]) == 5_000_000
        assert (await process.wait()).code == 4
        await ending

    async def test_shutdown_does_not_wait_for_the_stubborn(self, guest: GuestChannel, agent: Agent) -> None:
        process = guest.exec(shell("trap '' TERM; echo ready; while :; do sleep 0.01; done"))
        assert await process.read() == (1, b"ready\n")
        await guest.shutdown(0.05)
        with pytest.raises(GuestFailed):
            await process.wait()
        agent.process.wait(timeout=30)
        assert agent.descendants() == set()

    async def test_stop_tells_when_nobody_is_left(self, guest: GuestChannel) -> None:
        process = guest.exec(shell("trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.01; done"))
        assert await process.read() == (1, b"ready\n")
        assert await guest.stop(signal.SIGTERM, 20)
        assert (await output_of(process))[0] == b"bye\n"
        assert (await process.wait()).code == 4
        assert (await output_of(guest.exec(command("echo", "alive"))))[0] == b"alive\n"

    async def test_stop_reaches_those_that_stand_still_or_were_orphaned(self, guest: GuestChannel) -> None:
        process = guest.exec(shell("(setsid sh -c 'echo up; kill -STOP $$; sleep 1000' &) ; sleep 1000"))
        assert await process.read() == (1, b"up\n")
        assert await guest.stop(signal.SIGTERM, 20)

    async def test_stop_says_that_somebody_is_left(self, guest: GuestChannel) -> None:
        process = guest.exec(shell("trap '' TERM INT; echo ready; while :; do sleep 0.01; done"))
        assert await process.read() == (1, b"ready\n")
        first = asyncio.create_task(guest.stop(signal.SIGTERM, 60))
        await asyncio.sleep(0)
        assert not await guest.stop(signal.SIGINT, 0.05)
        assert not await first
        assert await guest.stop(signal.SIGKILL, 20)
        assert (await process.wait()).signal == signal.SIGKILL

    async def test_death_of_the_agent_is_noticed(self, guest: GuestChannel, agent: Agent) -> None:
        process = guest.exec(command("sleep", "1000"))
        pid, _ = await process.started()
        agent.process.kill()
        with pytest.raises(GuestFailed):
            await process.wait()
        with pytest.raises(GuestFailed):
            await guest.exec(command("true")).started()
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
            await asyncio.sleep(0)
        agent.process.wait()
        agent.process.returncode = 0
