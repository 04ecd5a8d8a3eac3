"""Attacks by using up: processes, memory, disk, descriptors, output."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from tests.escape.arena import HURRY_S, LIMITS, Arena, finish, line_of
from tests.escape.attack import inside, shipped, staged
from tests.escape.kit import ESCAPED, WORLD, asked, call, outcome

from tartarus.model.errors import GuestFailed
from tartarus.model.sandbox import ExecSpec, Isolation, Reason, SandboxRecord
from tartarus.model.states import State

_MIB = 1024 * 1024


async def _to_its_end(arena: Arena, level: Isolation, program: str) -> SandboxRecord:
    """Run a program as a sandbox's own command, and return the record of how that ended."""
    sandbox = await arena.sandbox(level, command=ExecSpec(argv=("python3", "-c", program)), timeout_s=60.0)
    assert sandbox.main is not None
    # Where a whole guest is killed for its memory, nobody is left to say how its command ended.
    with contextlib.suppress(GuestFailed):
        await finish(sandbox.main)
    return await sandbox.wait()


def _of(record: SandboxRecord) -> str:
    return f"{record.state.value}, {record.reason.value if record.reason else 'no reason'}"


def _fork_bomb() -> None:
    while True:
        outcome(os.fork)


@staged(
    "resources/fork-bomb", tries="fork without end", container="timed_out, timeout", process="timed_out, timeout",
    note="The limit of processes holds it; the time limit ends it, with nothing left.",
)  # fmt: skip
async def fork_bomb(arena: Arena, level: Isolation) -> str:
    command = ExecSpec(argv=("python3", "-c", shipped(_fork_bomb) + "\n_fork_bomb()"))
    sandbox = await arena.sandbox(level, command=command, timeout_s=HURRY_S.get(level, 1.0))
    record = await sandbox.wait()
    return _of(record)


@inside(
    "resources/processes", tries="have more processes and threads than the limit", container="EAGAIN", process="EAGAIN"
)
def processes() -> dict[str, str]:
    def fill() -> str:
        for _ in range(200):
            try:
                if os.fork() == 0:
                    signal.pause()
            except OSError as failure:
                return errno.errorcode[failure.errno or 0]
        return ESCAPED

    answer = fill()

    def thread() -> str:
        try:
            threading.Thread(target=signal.pause, daemon=True).start()
        except RuntimeError:
            return "EAGAIN"
        return ESCAPED

    found = {"processes": answer, "a thread more": thread()}
    # Only those that this one may: itself it must not, and the neighbours are not its children.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    return found


def _memory_bomb() -> None:
    held = []
    while True:
        held.append(bytearray(b"x" * (8 << 20)))


@staged(
    "resources/memory-bomb", tries="take all memory", container="failed, resource_limit",
    process="failed, resource_limit|failed, completed",
    note="At process level each process has a limit of its own too, and then sees its allocation fail.",
    needs=("cgroups",),
)  # fmt: skip
async def memory_bomb(arena: Arena, level: Isolation) -> str:
    return _of(await _to_its_end(arena, level, shipped(_memory_bomb) + "\n_memory_bomb()"))


def _children_bomb() -> None:
    for _ in range(8):
        if os.fork() == 0:
            held = []
            while True:
                held.append(bytearray(b"x" * (4 << 20)))
    statuses = [os.wait()[1] for _ in range(8)]
    sys.exit(3 if statuses else 0)


@staged(
    "resources/memory-of-many", tries="take all memory with many processes, each small", container="failed, completed|failed, resource_limit",
    process="failed, completed|failed, resource_limit",
)  # fmt: skip
async def memory_of_many(arena: Arena, level: Isolation) -> dict[str, str]:
    before = _available()
    record = await _to_its_end(arena, level, shipped(_children_bomb) + "\n_children_bomb()")
    return {"end": _of(record), "host": "failed, completed" if before - _available() < 2048 * _MIB else ESCAPED}


def _bomb_with_the_agent_first() -> None:
    agent = 1 if os.getpid() < 1000 else os.getppid()
    outcome(_write, f"/proc/{agent}/oom_score_adj", "1000")
    held = []
    while True:
        held.append(bytearray(b"x" * (8 << 20)))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


@staged(
    "resources/memory-bomb-at-agent", tries="take all memory, and have the guest agent killed for it", container="failed, resource_limit",
    needs=("cgroups",),
)  # fmt: skip
async def memory_bomb_at_agent(arena: Arena, level: Isolation) -> str:
    return _of(await _to_its_end(arena, level, shipped(_bomb_with_the_agent_first) + "\n_bomb_with_the_agent_first()"))


def _fill_memory_files() -> None:
    made = []
    while True:
        made.append(os.memfd_create("hoard"))
        os.write(made[-1], b"x" * (16 << 20))


@staged(
    "resources/memory-files", tries="take memory that belongs to no process (memory files)", container="failed, resource_limit",
    process="failed, resource_limit",
    needs=("cgroups",),
)  # fmt: skip
async def memory_files(arena: Arena, level: Isolation) -> str:
    return _of(await _to_its_end(arena, level, shipped(_fill_memory_files) + "\n_fill_memory_files()"))


@inside(
    "resources/disk", tries="write more bytes than the limit, into every place there is", container="ENOSPC|EFBIG", process="EFBIG|EACCES",
    note="At process level the limit is on each file: see resources/disk-of-many.",
)  # fmt: skip
def disk() -> dict[str, str]:
    # A file larger than its limit is also announced by a signal.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(place: str) -> str:
        def attempt() -> None:
            with open(f"{place}/large", "wb", buffering=0) as file:
                for _ in range(64):
                    size = file.write(b"x" * _MIB)
                    if size < _MIB:
                        file.write(b"x" * _MIB)

        return outcome(attempt)

    places = (".", "/tmp", "/var/tmp", "/dev/shm", "/root", "/run")
    found = {}
    for place in places:
        found[place] = fill(place)
        outcome(os.unlink, f"{place}/large")
    found["at once"] = outcome(os.posix_fallocate, os.open("holes", os.O_RDWR | os.O_CREAT), 0, 64 * _MIB)
    return found


@inside(
    "resources/disk-of-many", tries="write more bytes than the limit, in many files", container="ENOSPC", process="written",
    note="A limit of the process level: its files lie in the host's file system, and only each file's size is limited.",
)  # fmt: skip
def disk_of_many() -> str:
    def attempt() -> None:
        for index in range(3):
            with open(f"part{index}", "wb", buffering=0) as file:
                for _ in range(16):
                    if file.write(b"x" * _MIB) < _MIB:
                        raise OSError(errno.ENOSPC, "full")

    return outcome(attempt, succeeded="written" if WORLD["level"] == "process" else ESCAPED)


@inside(
    "resources/files", tries="make more files than the limit", container="ENOSPC", process="written",
    note="At process level the number of files is the host's file system's to limit.",
)  # fmt: skip
def files() -> dict[str, str]:
    # No more than shows it: without a limit these are files of the host.
    held = ESCAPED if WORLD["level"] != "process" else "written"

    def many(make: str) -> str:
        os.mkdir(make)

        def attempt() -> None:
            for index in range(4500):
                path = f"{make}/{index}"
                if make == "files":
                    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
                elif make == "directories":
                    os.mkdir(path)
                else:
                    os.symlink("x", path)

        answer = outcome(attempt, succeeded=held)
        for entry in os.scandir(make):
            (os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)
        return answer

    return {kind: many(kind) for kind in ("files", "directories", "symlinks")}


@inside("resources/descriptors", tries="open more files than the limit", container="EMFILE", process="EMFILE")
def descriptors() -> dict[str, str]:
    def fill() -> None:
        for _ in range(70000):
            os.open("/dev/null", os.O_RDONLY)

    import resource

    found = {"soft limit": outcome(fill)}
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found["hard limit"] = outcome(fill) if hard <= 65536 else ESCAPED
    os.closerange(3, 70000)
    return found


@inside(
    "resources/address-space",
    tries="reserve and lock what memory the machine has",
    container="ENOMEM",
    process="ENOMEM",
)
def address_space() -> dict[str, str]:
    def grab() -> None:
        address = call("mmap", 0, 1 << 36, 3, 0x4022, -1, 0)
        call("mlock", address, 1 << 36)

    return {
        "lock a large area": outcome(grab).replace("EPERM", "ENOMEM"),
        "every address": asked("mmap", 0, 1 << 47, 3, 0x4022, -1, 0),
    }


def _flood() -> None:
    piece = b"x" * 65536
    while True:
        os.write(1, piece)


@staged(
    "resources/output-unread", tries="write output that nobody reads, to fill the daemon's memory", container="bounded",
    process="bounded",
)  # fmt: skip
async def output_unread(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await arena.sandbox(level)
    before = _resident()
    program = shipped(_flood) + "\n_flood()"
    flooding = [await sandbox.exec(ExecSpec(argv=("python3", "-c", program))) for _ in range(4)]
    for process in flooding:
        await process.started()
    # By the time many small commands were answered over the same channel, all that was granted has come.
    for _ in range(50):
        await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", ":"))))
    grown = _resident() - before
    await sandbox.kill()
    return {"memory": "bounded" if grown < 24 * _MIB else ESCAPED}


@staged(
    "resources/output-logged", tries="write output without end, to fill the disk with the log", container="bounded",
    process="bounded",
)  # fmt: skip
async def output_logged(arena: Arena, level: Isolation) -> str:
    program = "import os\nfor _ in range(640): os.write(1, b'x' * 65536)"
    sandbox = await arena.sandbox(level, command=ExecSpec(argv=("python3", "-c", program)))
    assert sandbox.main is not None
    said = await finish(sandbox.main, limit=0)
    await sandbox.wait()
    kept = sum(path.stat().st_size for path in (arena.settings.state_dir / "logs").glob(f"{sandbox.record.id}*"))
    return "bounded" if said.status.code == 0 and kept < 18 * _MIB else ESCAPED


def _spray() -> None:
    while True:
        os.write(1, b"o")
        os.write(2, b"e")


@staged(
    "resources/output-crumbs", tries="write output one byte at a time on two streams, to fill the daemon's memory with small pieces",
    container="bounded", process="bounded",
)  # fmt: skip
async def output_crumbs(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    before = _resident()
    process = await sandbox.exec(ExecSpec(argv=("python3", "-c", shipped(_spray) + "\n_spray()")))
    await process.started()
    for _ in range(100):
        await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", ":"))))
    grown = _resident() - before
    await sandbox.kill()
    return "bounded" if grown < 48 * _MIB else ESCAPED


def _never_reads() -> None:
    os.write(1, b"ready\n")
    while True:
        time.sleep(3600)


@staged(
    "resources/input-unread", tries="never read its input, to fill the daemon's memory with it", container="bounded",
    process="bounded",
)  # fmt: skip
async def input_unread(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    process = await sandbox.exec(
        ExecSpec(argv=("python3", "-c", shipped(_never_reads) + "\n_never_reads()"), stdin=True)
    )
    await line_of(process)
    before = _resident()
    writing = asyncio.ensure_future(process.write_stdin(bytes(64 * _MIB)))
    for _ in range(20):
        await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", ":"))))
    grown = _resident() - before
    held = not writing.done()
    await sandbox.kill()
    await asyncio.gather(writing, return_exceptions=True)
    # Its own 64 MiB, made above, are part of what grew.
    return "bounded" if held and grown < (64 + 16) * _MIB else ESCAPED


@staged("resources/time", tries="outlive its time limit: ignore every signal, stop itself, start others", container="timed_out, timeout",
        process="timed_out, timeout")  # fmt: skip
async def time_limit(arena: Arena, level: Isolation) -> dict[str, str]:
    programs = {
        "ignore": "import signal, time\nfor n in set(range(1, 65)) - {9, 19, 32, 33}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(3600)",
        "stop": "import os, signal\nos.kill(0, signal.SIGSTOP)",
        "busy": "while True: pass",
    }
    hurry_s = HURRY_S.get(level, 0.3)

    async def end_of(program: str) -> str:
        sandbox = await arena.sandbox(level, command=ExecSpec(argv=("python3", "-c", program)), timeout_s=hurry_s)
        return _of(await sandbox.wait())

    ends = await asyncio.gather(*(end_of(program) for program in programs.values()))
    return dict(zip(programs, ends, strict=True))


@staged(
    "resources/limits-hold", tries="have other limits than were asked for", container="as asked", process="as asked"
)
async def limits_hold(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await arena.sandbox(level)
    stats = await sandbox.stats()
    asked_bytes = LIMITS.memory_bytes
    await sandbox.kill()
    ended = (await sandbox.wait()).state is State.KILLED
    reason = sandbox.record.reason is Reason.USER_REQUEST
    return {
        "memory": "as asked" if stats.memory_limit_bytes == asked_bytes else ESCAPED,
        "end": "as asked" if ended and reason else ESCAPED,
    }


def _resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    return _field(Path("/proc/self/status").read_text(encoding="ascii"), "VmRSS")


def _available() -> int:
    return _field(Path("/proc/meminfo").read_text(encoding="ascii"), "MemAvailable")


def _field(text: str, name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+)", text)
    return int(match.group(1)) * 1024 if match else 0
