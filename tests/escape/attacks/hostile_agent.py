"""Attacks on the daemon by a guest agent that somebody replaced: hostile frames on the channel to the host.

The real agent can't be replaced from inside (see guest/*). Here the host is made to start another program in
its place, in a real sandbox, so that everything behind the agent is tried as if it could.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.escape.arena import Arena, line_of
from tests.escape.attack import shipped, staged
from tests.escape.kit import ESCAPED, WORLD, call

from tartarus.guest.protocol import ToHost
from tartarus.model.errors import TartarusError
from tartarus.model.sandbox import ExecSpec, Isolation

_MIB = 1024 * 1024
_MARK = b"TARTARUS-SCRIPT\0"
_ROOM = 1 << 18
_READY = struct.pack("<III", 1, 1, 2)
_FOREVER = 0xFFFF_FFFF


def _frame(
    kind: int, stream: int = 0, payload: bytes = b"", *, flags: int = 0, zero: int = 0, length: int | None = None
) -> bytes:
    return struct.pack("<IBBHI", len(payload) if length is None else length, kind, flags, zero, stream) + payload


@functools.cache
def _program() -> bytes:
    source = Path(__file__).with_name("hostile_agent.c")
    with tempfile.TemporaryDirectory() as place:
        built = Path(place) / "hostile"
        subprocess.run(
            ["cc", "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(built), str(source)], check=True
        )
        return built.read_bytes()


def _saying(said: bytes, rounds: int) -> int:
    """A memory file of the hostile agent with this script."""
    program = bytearray(_program())
    at = program.index(_MARK)
    # A proper greeting is sent by itself, when the host greets; what is none is all sent then.
    greeting = len(_HELLO) if said.startswith(_HELLO) else len(said)
    struct.pack_into("<III", program, at + len(_MARK), greeting, len(said), rounds)
    start = at + len(_MARK) + 12
    program[start : start + len(said)] = said
    fd = os.memfd_create("hostile", 0x10)
    os.write(fd, program)
    os.fchmod(fd, 0o555)
    return fd


@contextmanager
def _replaced(arena: Arena, level: Isolation, said: bytes, rounds: int) -> Iterator[None]:
    """For a while, sandboxes of this level are started with the hostile agent."""
    assert len(said) <= _ROOM
    runtime = arena.node._levels.runtimes[level]
    real, fake = runtime._agent_fd, _saying(said, rounds)  # type: ignore[attr-defined]
    runtime._agent_fd = fake  # type: ignore[attr-defined]
    try:
        yield
    finally:
        runtime._agent_fd = real  # type: ignore[attr-defined]
        os.close(fake)


async def _start(arena: Arena, level: Isolation) -> str:
    """Start a sandbox whose agent is hostile and use it; what came of it."""
    try:
        sandbox = await arena.sandbox(level)
    except TartarusError:
        return "refused"
    try:
        process = await sandbox.exec(ExecSpec(argv=("true",)))
        await process.started()
        while await process.read() is not None:
            pass
        await process.wait()
    except TartarusError:
        return "ended"
    finally:
        await sandbox.kill()
    return ESCAPED


async def _try(arena: Arena, level: Isolation, said: bytes, rounds: int = 1) -> str:
    with _replaced(arena, level, said, rounds):
        return await asyncio.wait_for(_start(arena, level), 2)


_HELLO = _frame(ToHost.READY, 0, _READY)
_STARTED = _frame(ToHost.STARTED, 1, struct.pack("<II", 5, 0))
_EXIT = struct.pack("<IIQQQ", 0, 0, 0, 0, 0)


@staged(
    "hostile-agent/frames", tries="break the protocol in every part: lengths, types, order, streams, values", container="refused|ended",
    process="refused|ended", needs=("cc",),
)  # fmt: skip
async def frames(arena: Arena, level: Isolation) -> dict[str, str]:
    scripts = {
        "nothing but rubbish": bytes(range(256)) * 64,
        "a length of 4 GiB": _frame(ToHost.READY, 0, b"", length=0xFFFF_FFFF),
        "a length above the limit": _HELLO + _frame(ToHost.STDOUT, 1, b"", length=(1 << 20) + 1),
        "an unknown type": _HELLO + _frame(0xEE, 1, b"x"),
        "the host's own type": _HELLO + _frame(0x10, 1, b"x"),
        "flags that do not exist": _HELLO
        + _frame(ToHost.STARTED, 1, struct.pack("<II", 5, 0), flags=0x80, zero=0xFFFF),
        "another version": _frame(ToHost.READY, 0, struct.pack("<III", 99, 1, 0)),
        "a short greeting": _frame(ToHost.READY, 0, b"x"),
        "two greetings": _HELLO + _HELLO + _STARTED,
        "a failed boot after the greeting": _HELLO + _frame(ToHost.BOOT_FAILED, 0, struct.pack("<II", 1, 1)),
        "a failed boot with a wild step": _frame(ToHost.BOOT_FAILED, 0, struct.pack("<II", 0xFFFF_FFFF, 0xFFFF_FFFF)),
        "a stream that was never opened": _HELLO + _frame(ToHost.STDOUT, 77, b"x"),
        "output before the start": _HELLO + _frame(ToHost.STDOUT, 1, b"x"),
        "an exit before the start": _HELLO + _frame(ToHost.EXIT, 1, _EXIT),
        "an exit that can't be": _HELLO + _STARTED + _frame(ToHost.EXIT, 1, struct.pack("<IIQQQ", 999, 999, 0, 0, 0)),
        "a short exit": _HELLO + _STARTED + _frame(ToHost.EXIT, 1, b"x"),
        "an error after the start": _HELLO + _STARTED + _frame(ToHost.ERROR, 1, struct.pack("<II", 2, 0)),
        "an error with a wild string": _HELLO + _frame(ToHost.ERROR, 1, struct.pack("<II", 2, 0x7FFF_FFFF)),
        "input granted beyond the window": _HELLO
        + _STARTED
        + _frame(ToHost.STDIN_CREDIT, 1, struct.pack("<I", 0xFFFF_FFFF)),
        "a file's answer to a command": _HELLO + _frame(ToHost.RESULT, 1, b"x" * 100),
        "an event for a command": _HELLO + _frame(ToHost.EVENT, 1, struct.pack("<I", 3) + b"abc"),
    }
    # First that it is this agent that speaks: what an honest one would send must work.
    assert await _try(arena, level, _HELLO + _STARTED + _frame(ToHost.EXIT, 1, _EXIT)) == ESCAPED
    return {name: await _try(arena, level, said) for name, said in scripts.items()}


@staged(
    "hostile-agent/error-number", tries="answer a command with an error number that no errno has", container="refused|ended",
    process="refused|ended", needs=("cc",),
)  # fmt: skip
async def error_number(arena: Arena, level: Isolation) -> str:
    return await _try(arena, level, _HELLO + _frame(ToHost.ERROR, 1, struct.pack("<II", 0xFFFF_FFFF, 0)))


@staged(
    "hostile-agent/floods", tries="fill the daemon's memory: output beyond its credit, empty frames, answers nobody asked for, without end",
    container="bounded", process="bounded", needs=("cc",),
)  # fmt: skip
async def floods(arena: Arena, level: Isolation) -> dict[str, str]:
    data = _frame(ToHost.STDOUT, 1, b"x" * 65536)
    scripts = {
        "output": _HELLO + _STARTED + data * 3,
        "empty output": _HELLO + _STARTED + _frame(ToHost.STDOUT, 1, b"") * 8000,
        "answers to pings": _HELLO + _frame(ToHost.PONG, 0, b"x" * 64) * 2000,
        "frames of an ended command": _HELLO
        + _STARTED
        + _frame(ToHost.EXIT, 1, _EXIT)
        + _frame(ToHost.STDERR, 1, b"x" * 60000) * 3,
    }
    found = {}
    for name, said in scripts.items():
        before = _resident()
        with _replaced(arena, level, said, _FOREVER):
            sandbox = None
            try:
                sandbox = await arena.sandbox(level)
                process = await sandbox.exec(ExecSpec(argv=("true",)))
                # A reader that takes what comes, until the host has had enough of this guest or half a second passed.
                await asyncio.wait_for(_take_everything(process), 0.5)
            except (TartarusError, TimeoutError):
                pass
            finally:
                if sandbox is not None:
                    await asyncio.wait_for(sandbox.kill(), 20)
        found[name] = "bounded" if _resident() - before < 48 * _MIB else ESCAPED
    return found


async def _take_everything(process: object) -> None:
    while await process.read() is not None:  # type: ignore[attr-defined]
        pass


@staged(
    "hostile-agent/lies", tries="make the daemon signal or trust processes that are not the sandbox's", container="ended|refused|signalled nobody",
    process="ended|refused|signalled nobody", needs=("cc",),
)  # fmt: skip
async def lies(arena: Arena, level: Isolation) -> dict[str, str]:
    found = {}
    for name, pid in (("the daemon", os.getpid()), ("init", 1), ("everybody", 0xFFFF_FFFF), ("its group", 0)):
        said = _HELLO + _frame(ToHost.STARTED, 1, struct.pack("<II", pid, 0))
        with _replaced(arena, level, said, 1):
            try:
                sandbox = await arena.sandbox(level)
            except TartarusError:
                found[name] = "refused"
                continue
            process = await sandbox.exec(ExecSpec(argv=("true",)))
            try:
                await asyncio.wait_for(process.started(), 5)
                process.signal(15)
                process.signal(9, True)
                # The host never signals by that number itself: it asks the agent to. We are still here.
                found[name] = "signalled nobody"
            except TartarusError:
                found[name] = "ended"
            await asyncio.wait_for(sandbox.kill(), 20)
    return found


def _speak() -> None:
    """As root of its own machine: take the agent's channel from it, and say what the host wants to hear said."""
    agent = call("pidfd_open", 1, 0)
    channel = -1
    for number in range(3, 32):
        with contextlib.suppress(OSError):
            fd = call("pidfd_getfd", agent, number, 0)
            if "vport" in os.readlink(f"/proc/self/fd/{fd}"):
                channel = fd
    os.write(1, b"taken\n" if channel >= 0 else b"nothing to take\n")
    sys.stdin.readline()
    said, rounds = bytes.fromhex(WORLD["said"]), WORLD["rounds"]
    while rounds:
        rest = said
        while rest:
            try:
                rest = rest[os.write(channel, rest) :]
            except BlockingIOError:
                time.sleep(0.001)
        rounds -= 1
    time.sleep(20)


@staged(
    "hostile-agent/from-inside", tries="as root of its machine take the agent's channel (pidfd_getfd) and speak in its stead",
)  # fmt: skip
async def from_inside(arena: Arena, level: Isolation) -> dict[str, str]:
    said = {
        "rubbish": (bytes(range(256)) * 4, 1),
        "a length of 4 GiB": (_frame(ToHost.RESULT, 1, b"", length=0xFFFF_FFFF), 1),
        "a second greeting": (_HELLO, 1),
        "an end of everybody": (b"".join(_frame(ToHost.EXIT, number, _EXIT) for number in range(1, 9)), 1),
        "output without end": (_frame(ToHost.STDOUT, 2, b"x" * 65536), 1 << 20),
        "kills without number": (_frame(ToHost.EXIT, 2, _EXIT + struct.pack("<I", 0xFFFF_FFFF)), 1 << 20),
    }
    start = "\nWORLD.update(json.loads(sys.stdin.readline()))\n_speak()\n"
    found = {}
    for name, (bytes_, rounds) in said.items():
        sandbox = await arena.sandbox(level)
        world = await arena.world(sandbox) | {"said": bytes_.hex(), "rounds": rounds}
        process = await arena.start(sandbox, shipped(_speak) + start, world=world)
        assert await line_of(process) == b"taken"
        before = _resident()
        # Of a program in its own machine a guest may say what it likes; all else ends it.
        believed = name in {"an end of everybody", "kills without number"}
        try:
            await process.write_stdin(b"\n")
            await asyncio.wait_for(process.wait(), 30)
        except TartarusError:
            believed = True
        found[name] = "held" if believed and _resident() - before < 48 * _MIB else ESCAPED
        await sandbox.kill()
    return found


def _resident() -> int:
    match = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(match.group(1)) * 1024 if match else 0
