"""Attacks on the end: processes, files and groups that try to outlive their sandbox, and a hurt guest agent.

What is left is looked for after every attack; each of these says only how the sandbox ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from tests.escape.arena import HURRY_S, Arena, finish, line_of
from tests.escape.attack import shipped, staged
from tests.escape.bait import Twin
from tests.escape.host import changes
from tests.escape.kit import WORLD, outcome

from tartarus.model.errors import TartarusError
from tartarus.model.sandbox import ExecSpec, Isolation
from tartarus.model.states import State
from tartarus.node.sandbox import Sandbox


def _detach() -> None:
    """Leave processes that have left their session, ignore every signal, and are nobody's children."""
    # So few that the limit of processes does not matter.
    for index in range(6):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in set(range(1, 65)) - {9, 19, 32, 33}:
                    signal.signal(number, signal.SIG_IGN)
                ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no signal at the parent's death
                if index % 2:
                    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # and its own orphans come to it
                    os.fork()
                os.closerange(0, 3)
                while True:
                    signal.pause()
            os._exit(0)
        os.wait()
    os.write(1, b"detached\n")
    sys.stdin.readline()


async def _ended(sandbox: Sandbox) -> str:
    record = await asyncio.wait_for(sandbox.wait(), 20)
    return record.state.value


@staged(
    "leftovers/daemons",
    tries="leave processes that detached themselves and ignore every signal",
    container="killed",
    process="killed",
)
async def daemons(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    await line_of(await arena.start(sandbox, shipped(_detach) + "\n_detach()\n"))
    await sandbox.kill()
    return await _ended(sandbox)


@staged(
    "leftovers/daemons-of-command", tries="detach processes and let the sandbox's own command end", container="succeeded",
    process="succeeded",
)  # fmt: skip
async def daemons_of_command(arena: Arena, level: Isolation) -> str:
    command = ExecSpec(argv=("python3", "-c", shipped(_detach) + "\n_detach()\n"))
    sandbox = await arena.sandbox(level, command=command)
    assert sandbox.main is not None
    await finish(sandbox.main)
    return await _ended(sandbox)


def _storm() -> None:
    """Fork for ever: every process forks, so that killing them one by one never ends."""
    os.write(1, b"storm\n")
    while True:
        try:
            if os.fork() == 0:
                os.setsid()
        except OSError:
            os.sched_yield()
        else:
            if os.getpid() % 3 == 0:
                os._exit(0)


@staged("leftovers/storm", tries="fork faster than it is killed", container="killed", process="killed")
async def storm(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    await line_of(await arena.start(sandbox, shipped(_storm) + "\n_storm()\n"))
    await sandbox.kill()
    return await _ended(sandbox)


@staged(
    "leftovers/paused", tries="be frozen when it is ended", container="killed", process="killed", needs=("cgroups",)
)
async def paused(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    await line_of(await arena.start(sandbox, shipped(_detach) + "\n_detach()\n"))
    await sandbox.pause()
    await sandbox.kill()
    return await _ended(sandbox)


def _bury() -> None:
    """Make a tree that is hard to remove: deep, closed, with names that trip programs up."""
    top = os.getcwd()
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(top)
    for name in ("-rf", " ", "\n", "*", "a" * 255, "\udcff\udcfe", "..."):
        os.mkdir(name)
        with open(os.path.join(name, "file"), "w"):
            pass
    os.makedirs("closed/inner")
    with open("closed/inner/file", "w"):
        pass
    os.symlink("/", "closed/root")
    os.symlink("..", "closed/up")
    os.mkfifo("closed/fifo")
    os.chmod("closed/inner", 0)
    os.chmod("closed", 0)
    os.chmod(".", 0)
    os.write(1, b"buried\n")
    sys.stdin.readline()


@staged(
    "leftovers/buried-files",
    tries="leave files too deep, closed or odd to be removed",
    container="killed",
    process="killed",
)
async def buried_files(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    await line_of(await arena.start(sandbox, shipped(_bury) + "\n_bury()\n"))
    await sandbox.kill()
    return await _ended(sandbox)


def _kill() -> None:
    os.write(1, b"attacking\n")
    outcome(os.kill, WORLD["target"], WORLD["number"])
    signal.pause()


async def _hurt(arena: Arena, level: Isolation, number: int, target: int | None = None) -> str:
    """Hurt the agent, with detached processes around and a twin outside that must not be hurt."""
    sandbox = await arena.sandbox(level, timeout_s=HURRY_S.get(level, 1.0))
    twin = Twin(Path(f"/proc/{sandbox.guest.pid}").stat().st_uid, arena.bait.secret)
    try:
        before = twin.state()
        await line_of(await arena.start(sandbox, shipped(_detach) + "\n_detach()\n"))
        world = await arena.world(sandbox)
        world |= {"number": int(number), "target": world["agent"] if target is None else target}
        start = "\nWORLD.update(json.loads(sys.stdin.readline()))\n_kill()\n"
        # With the agent goes the channel that would have told that the attack began.
        with contextlib.suppress(TartarusError):
            await line_of(await arena.start(sandbox, shipped(_kill) + start, world=world))
        answer = await _ended(sandbox)
        assert not changes(before, twin.state()), "a process outside was hurt"
    finally:
        twin.close()
    return answer


@staged(
    "guest/kill-agent", tries="kill the guest agent", container="timed_out", process="lost|timed_out",
    note="In a container the kernel keeps the signal from it, and the sandbox lives on to its time limit.",
)  # fmt: skip
async def kill_agent(arena: Arena, level: Isolation) -> str:
    return await _hurt(arena, level, signal.SIGKILL)


@staged(
    "guest/stop-agent",
    tries="stop the guest agent, so that it can't end the sandbox",
    container="timed_out",
    process="timed_out",
)
async def stop_agent(arena: Arena, level: Isolation) -> str:
    return await _hurt(arena, level, signal.SIGSTOP)


@staged(
    "guest/kill-everybody",
    tries="kill every process that it may signal, at once (-1)",
    container="timed_out",
    process="lost|timed_out",
)
async def kill_everybody(arena: Arena, level: Isolation) -> str:
    return await _hurt(arena, level, signal.SIGKILL, -1)


@staged(
    "guest/stop-everybody",
    tries="stop every process that it may signal, at once (-1)",
    container="timed_out",
    process="timed_out",
)
async def stop_everybody(arena: Arena, level: Isolation) -> str:
    return await _hurt(arena, level, signal.SIGSTOP, -1)


@staged(
    "guest/kill-group", tries="signal its own process group (0), in the hope that the agent is in it", container="timed_out",
    process="timed_out",
)  # fmt: skip
async def kill_group(arena: Arena, level: Isolation) -> str:
    return await _hurt(arena, level, signal.SIGKILL, 0)


@staged(
    "leftovers/many",
    tries="start and end many sandboxes at once, to leave something of one of them",
    container="killed",
    process="killed",
)
async def many(arena: Arena, level: Isolation) -> dict[str, str]:
    sandboxes = await asyncio.gather(*(arena.sandbox(level) for _ in range(4)))
    await asyncio.gather(*(arena.start(sandbox, shipped(_detach) + "\n_detach()\n") for sandbox in sandboxes))
    await asyncio.gather(*(sandbox.kill() for sandbox in sandboxes))
    found = {sandbox.record.id: await _ended(sandbox) for sandbox in sandboxes}
    return found if set(found.values()) != {State.KILLED.value} else {"all": State.KILLED.value}
