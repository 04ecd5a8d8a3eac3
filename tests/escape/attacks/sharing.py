"""Attacks over what a level shares with the host or with other sandboxes: files' watchers and locks, kernel quotas."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

from tests.escape.arena import Arena, line_of
from tests.escape.attack import shipped, staged
from tests.escape.kit import ESCAPED, WORLD, asked, call, outcome

from tartarus.model.sandbox import Isolation

_SIGNAL = 40
_ONE_USER = {
    Isolation.CONTAINER: "all containers of a daemon are one user of the host, by whom alone the kernel counts pipes' pages",
}
_UNSEEN = {
    Isolation.PROCESS: "Landlock does not mediate inotify: names appear of files in directories that file modes leave open",
}


def _watch() -> None:
    watcher = call("inotify_init1", os.O_NONBLOCK)
    answer = outcome(call, "inotify_add_watch", watcher, WORLD["watched"], 0xFFF, succeeded="watching")
    os.write(1, answer.encode() + b"\n")
    sys.stdin.readline()
    seen = outcome(os.read, watcher, 65536, succeeded="events") if answer == "watching" else "nothing"
    os.write(1, (seen if seen == "events" else "nothing").encode() + b"\n")


async def _events(arena: Arena, level: Isolation, watched: str, act: list[str]) -> str:
    sandbox = await arena.sandbox(level)
    world = await arena.world(sandbox) | {"watched": watched}
    start = "\nWORLD.update(json.loads(sys.stdin.readline()))\n_watch()\n"
    process = await arena.start(sandbox, shipped(_watch) + start, world=world)
    await line_of(process)
    subprocess.run(act, check=True, stdout=subprocess.DEVNULL)
    await process.write_stdin(b"\n")
    seen = (await line_of(process)).decode()
    await sandbox.kill()
    return seen


@staged(
    "sharing/watch-programs", tries="watch which programs the host and other sandboxes start (inotify on /usr/bin)", container="nothing",
    process="events",
    note="At process level programs are the host's own files, which whoever may read may watch.",
)  # fmt: skip
async def watch_programs(arena: Arena, level: Isolation) -> str:
    return await _events(arena, level, "/usr/bin", ["/usr/bin/true"])


@staged(
    "sharing/watch-files", tries="watch which files the host's users make in a directory that everybody may list",
    container="nothing", process="nothing", holes=_UNSEEN,
)  # fmt: skip
async def watch_files(arena: Arena, level: Isolation) -> str:
    return await _events(
        arena, level, str(arena.bait.directory), ["/usr/bin/cat", str(arena.bait.directory / "readable")]
    )


def _lock() -> None:
    def lock() -> None:
        fcntl.flock(os.open(WORLD["locked"], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)

    os.write(1, outcome(lock, succeeded="locked").encode() + b"\n")
    sys.stdin.readline()


@staged(
    "sharing/lock-programs", tries="lock a shared program, so that others who lock it wait", container="free", process="busy",
    note="At process level programs are the host's own files, which whoever may read may lock (flock).",
)  # fmt: skip
async def lock_programs(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    world = await arena.world(sandbox) | {"locked": "/usr/bin/env"}
    process = await arena.start(
        sandbox, shipped(_lock) + "\nWORLD.update(json.loads(sys.stdin.readline()))\n_lock()\n", world=world
    )
    await line_of(process)
    with Path("/usr/bin/env").open("rb") as file:
        answer = outcome(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB, succeeded="free")
    await sandbox.kill()
    return "free" if answer == "free" else "busy"


def _hoard() -> None:
    """Take as many of a kind as can be had, say so, and hold them."""
    kind = WORLD["kind"]
    taken = 0
    info = struct.pack("<iii", _SIGNAL, 0, -1) + bytes(116)
    signal.pthread_sigmask(signal.SIG_BLOCK, [_SIGNAL])
    calls = {
        "watchers": lambda: call("inotify_init1", 0),
        "queued signals": lambda: call("rt_sigqueueinfo", os.getpid(), _SIGNAL, info),
        "timers": lambda: call("timer_create", 1, None, bytes(4)),
        "terminals": lambda: os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY),
        "pipe pages": lambda: fcntl.fcntl(os.pipe()[0], 1031, 1 << 20),
    }
    try:
        while taken < 5000:
            calls[kind]()
            taken += 1
    except OSError:
        pass
    os.write(1, f"{taken}\n".encode())
    sys.stdin.readline()


def _want() -> str:
    kind = WORLD["kind"]
    info = struct.pack("<iii", _SIGNAL, 0, -1) + bytes(116)
    signal.pthread_sigmask(signal.SIG_BLOCK, [_SIGNAL])
    answers = {
        "watchers": lambda: asked("inotify_init1", 0),
        "queued signals": lambda: asked("rt_sigqueueinfo", os.getpid(), _SIGNAL, info),
        "timers": lambda: asked("timer_create", 1, None, bytes(4)),
        "terminals": lambda: outcome(os.open, "/dev/ptmx", os.O_RDWR | os.O_NOCTTY),
        "pipe pages": lambda: outcome(fcntl.fcntl, os.pipe()[0], 1031, 1 << 20),
    }
    return "left" if answers[kind]() == ESCAPED else "starved"


async def _after_hoarding(arena: Arena, level: Isolation, kind: str, *, many: int = 1) -> tuple[int, str, str]:
    """(how many one sandbox got, whether another gets one, whether the host does)."""
    hoarders = [await arena.sandbox(level) for _ in range(many)]
    world = await arena.world(hoarders[0]) | {"kind": kind}
    start = "\nWORLD.update(json.loads(sys.stdin.readline()))\n_hoard()\n"
    taken = 0
    for hoarder in hoarders:
        taken = max(taken, int(await line_of(await arena.start(hoarder, shipped(_hoard) + start, world=world))))
    host = subprocess.run(
        [sys.executable, "-c", shipped(_want) + "\nWORLD.update(json.loads(sys.argv[1]))\nprint(_want())\n", _json(world)],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    other = await arena.sandbox(level)
    answer = (await arena.attack(other, shipped(_want) + "\nrun(_want)\n", kind=kind))[""]
    for sandbox in (*hoarders, other):
        await sandbox.kill()
    return taken, answer, host


def _json(world: dict[str, object]) -> str:
    import json

    return json.dumps(world)


@staged(
    "sharing/watchers-of-host", tries="take all file watchers (inotify instances) that the host's root may have", container="left",
    process="left",
    needs=("root",),
)  # fmt: skip
async def watchers_of_host(arena: Arena, level: Isolation) -> str:
    return (await _after_hoarding(arena, level, "watchers"))[2]


@staged(
    "sharing/watchers",
    tries="take all file watchers that other sandboxes may have",
    container="left",
    process="left",
    needs=("root",),
    note="A container has at most a quarter of what the host gives one user (128, as Linux comes); several can take all.",
)
async def watchers(arena: Arena, level: Isolation) -> str:
    return (await _after_hoarding(arena, level, "watchers"))[1]


@staged(
    "sharing/signals",
    tries="queue so many signals that other sandboxes and the host can queue none",
    container="left",
    process="left",
    needs=("root",),
)
async def signals(arena: Arena, level: Isolation) -> dict[str, str]:
    _, other, host = await _after_hoarding(arena, level, "queued signals")
    return {"another sandbox": other, "host": host}


@staged(
    "sharing/timers",
    tries="make so many timers that other sandboxes and the host can make none",
    container="left",
    process="left",
    needs=("root",),
)
async def timers(arena: Arena, level: Isolation) -> dict[str, str]:
    _, other, host = await _after_hoarding(arena, level, "timers")
    return {"another sandbox": other, "host": host}


@staged(
    "sharing/terminals",
    tries="take all pseudo-terminals of the machine",
    container="bounded",
    process="bounded",
    needs=("root",),
    holes={Isolation.PROCESS: "its terminals are those of the host, and nothing counts how many one sandbox opens"},
)
async def terminals(arena: Arena, level: Isolation) -> dict[str, str]:
    taken, other, host = await _after_hoarding(arena, level, "terminals")
    # The machine has 4096: what one sandbox may take must be a small part of that.
    return {
        "how many": "bounded" if taken <= 256 else ESCAPED,
        "another": "bounded" if other == host == "left" else ESCAPED,
    }


@staged(
    "sharing/pipes",
    tries="take all the pages that the kernel gives one user for pipes",
    container="left",
    process="left",
    needs=("root",),
    holes=_ONE_USER,
)
async def pipes(arena: Arena, level: Isolation) -> dict[str, str]:
    _, other, host = await _after_hoarding(arena, level, "pipe pages")
    return {"another sandbox": other, "host": host}


@staged(
    "sharing/user-namespace", tries="be one user, to the kernel's counters, with other sandboxes or with what made them",
    container="own",
)  # fmt: skip
async def user_namespace(arena: Arena, level: Isolation) -> str:
    sandboxes = [await arena.sandbox(level) for _ in range(6)]  # more than are made ahead
    spaces = set()
    for sandbox in sandboxes:
        pid = sandbox.guest.pid
        spaces.add(os.readlink(f"/proc/{pid}/ns/user"))
        maker = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[1]
        spaces.add(os.readlink(f"/proc/{maker}/ns/user"))
    for sandbox in sandboxes:
        await sandbox.kill()
    return "own" if len(spaces) == len(sandboxes) + 1 else "shared"


@staged(
    "sharing/keys",
    tries="use up the kernel keys that a user may have, by being started often",
    container="none taken",
    process="none taken",
)
async def keys(arena: Arena, level: Isolation) -> str:
    def taken(uid: int) -> int:
        lines = Path("/proc/key-users").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.split(":")[0].strip() == str(uid))

    # Another daemon's sandboxes may have the same user and come and go: one quiet look is enough.
    for _ in range(5):
        first = await arena.sandbox(level)
        uid = Path(f"/proc/{first.guest.pid}").stat().st_uid
        before = taken(uid)
        others = [await arena.sandbox(level) for _ in range(4)]
        fresh = {Path(f"/proc/{item.guest.pid}").stat().st_uid for item in others} - {uid}
        grown = taken(uid) - before + sum(taken(number) for number in fresh)
        for sandbox in (first, *others):
            await sandbox.kill()
        if grown <= 0:
            return "none taken"
    return ESCAPED
