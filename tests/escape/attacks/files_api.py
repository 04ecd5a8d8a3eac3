"""Attacks on the host's file operations (read, write, list, move, remove, watch) from the sandbox they work in."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator

from tests.escape.arena import Arena, finish, line_of
from tests.escape.attack import shipped, staged
from tests.escape.kit import ESCAPED, WORLD

from tartarus.model.errors import FileFailed, TartarusError
from tartarus.model.sandbox import ExecSpec, Isolation
from tartarus.node.commands import Process
from tartarus.node.sandbox import Sandbox

_ROUNDS = 150


def _exchange(first: str, second: str) -> None:
    import ctypes

    ctypes.CDLL(None).renameat2(-100, first.encode(), -100, second.encode(), 2)


def _swap() -> None:
    os.mkdir("spot")
    with open("spot/readable", "w") as file:
        file.write("own")
    os.symlink(WORLD["outside"], "link")
    os.write(1, b"swapping\n")
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for _ in range(100):
            _exchange("spot", "link")


async def _swapping(arena: Arena, level: Isolation) -> tuple[Sandbox, str, Process]:
    """A sandbox in which `spot` is now a directory of its own, now a symlink to the bait."""
    sandbox = await arena.sandbox(level)
    world = await arena.world(sandbox) | {"outside": str(arena.bait.directory)}
    start = "\nWORLD.update(json.loads(sys.stdin.readline()))\n_swap()\n"
    process = await arena.start(sandbox, shipped(_swap) + start, world=world)
    await line_of(process)
    home = (await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "pwd"))))).out.decode().strip()
    return sandbox, home, process


async def _read(sandbox: Sandbox, path: str) -> bytes:
    return b"".join([piece async for piece in sandbox.files.read(path, limit=4096)])


@staged(
    "files-api/read-race", tries="swap a directory for a symlink to outside while the host reads below it", container="own",
    process="own",
)  # fmt: skip
async def read_race(arena: Arena, level: Isolation) -> str:
    sandbox, home, _ = await _swapping(arena, level)
    seen = set()
    for _ in range(_ROUNDS):
        try:
            seen.add(await _read(sandbox, f"{home}/spot/readable"))
        except FileFailed:
            continue
    await sandbox.kill()
    return "own" if seen <= {b"own"} else ESCAPED


@staged(
    "files-api/write-race", tries="swap a directory for a symlink to outside while the host writes, makes and moves below it",
    container="own", process="own",
)  # fmt: skip
async def write_race(arena: Arena, level: Isolation) -> str:
    # The bait tells, afterwards, whether anything came there.
    sandbox, home, _ = await _swapping(arena, level)
    for index in range(_ROUNDS):
        for work in (
            sandbox.files.write(f"{home}/spot/writable", b"from the host"),
            sandbox.files.write(f"{home}/spot/writable", b"more", append=True),
            sandbox.files.mkdir(f"{home}/spot/made{index}"),
            sandbox.files.move(f"{home}/spot/writable", f"{home}/spot/moved"),
        ):
            try:
                await work
            except FileFailed:
                continue
    await sandbox.kill()
    return "own"


@staged(
    "files-api/remove-race", tries="swap a directory for a symlink to outside while the host removes it, all below it",
    container="own", process="own",
)  # fmt: skip
async def remove_race(arena: Arena, level: Isolation) -> str:
    sandbox, home, _ = await _swapping(arena, level)
    for _ in range(_ROUNDS // 3):
        for path in (f"{home}/spot/inner", f"{home}/spot/readable", f"{home}/spot"):
            try:
                await sandbox.files.remove(path, recursive=True)
            except FileFailed:
                continue
        try:
            await sandbox.files.write(f"{home}/spot/readable", b"own", parents=True)
        except FileFailed:
            continue
    await sandbox.kill()
    return "own"


async def _failure(work: object) -> str:
    try:
        await asyncio.wait_for(work, 10)  # type: ignore[arg-type]
    except FileFailed:
        return "refused"
    except TimeoutError:
        return "hangs"
    return ESCAPED


@staged(
    "files-api/paths", tries="have the host's own operations lead outside: absolute, by .. and by symlink", container="refused|own",
    process="refused",
)  # fmt: skip
async def paths(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await arena.sandbox(level)
    bait = str(arena.bait.directory)
    home = (
        (await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", f"ln -s {bait} out; pwd")))))
        .out.decode()
        .strip()
    )
    found = {}
    for name, place in (("absolute", bait), ("dots", "/.." * 40 + bait), ("symlink", f"{home}/out")):
        found[f"read, {name}"] = await _failure(_read(sandbox, f"{place}/readable"))
        found[f"list, {name}"] = await _failure(sandbox.files.list(place))
        found[f"write, {name}"] = await _failure(sandbox.files.write(f"{place}/writable", b"x"))
        found[f"append, {name}"] = await _failure(sandbox.files.write(f"{place}/writable", b"x", append=True))
        found[f"make, {name}"] = await _failure(sandbox.files.mkdir(f"{place}/made"))
        found[f"move, {name}"] = await _failure(sandbox.files.move(f"{place}/readable", f"{home}/taken"))
        found[f"remove, {name}"] = await _failure(sandbox.files.remove(f"{place}/readable"))
        found[f"remove all, {name}"] = await _failure(sandbox.files.remove(f"{place}/inner", recursive=True))
    found["read, its own magic link"] = await _failure(_read(sandbox, f"/proc/{os.getpid()}/root{bait}/readable"))
    await sandbox.kill()
    return found


@staged(
    "files-api/special-files", tries="have the host's operations wait for ever, or run away, at odd files", container="refused|empty",
    process="refused|empty",
)  # fmt: skip
async def special_files(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await arena.sandbox(level)
    script = "mkfifo fifo; ln -s loop loop; mkdir dir; ln -s fifo tofifo; ln -s /proc/self/fd/0 tofd; ln -s /dev/zero tozero; pwd"
    home = (await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", script))))).out.decode().strip()
    found = {}
    for name in ("fifo", "tofifo", "loop", "dir", "tozero"):
        found[f"read {name}"] = await _failure(_read(sandbox, f"{home}/{name}"))
    for name in ("fifo", "loop", "dir", "tofifo"):
        found[f"append {name}"] = await _failure(sandbox.files.write(f"{home}/{name}", b"x", append=True))
    for path in ("/dev/zero", "/dev/tty", "/dev/ptmx", "/proc/kmsg", "/dev/random"):
        answer = await _failure(_read(sandbox, path))
        # A machine has a log of its own.
        found[f"read {path}"] = "own" if level is Isolation.MICROVM and path == "/proc/kmsg" else answer
    # Whatever it met, the agent must still serve.
    said = await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "echo alive"))))
    found["afterwards"] = "refused" if said.out == b"alive\n" else ESCAPED
    await sandbox.kill()
    return found


@staged(
    "files-api/set-id",
    tries="have the host make files that run as their owner",
    container="refused|plain",
    process="refused|plain",
)
async def set_id(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await arena.sandbox(level)
    home = (await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "pwd"))))).out.decode().strip()
    found = {}
    for mode in (0o4755, 0o2755, 0o6777):
        for name, work in (
            ("file", sandbox.files.write(f"{home}/file{mode}", b"x", mode=mode)),
            ("directory", sandbox.files.mkdir(f"{home}/dir{mode}", mode=mode)),
        ):
            answer = "refused"
            try:
                await work
            except FileFailed:
                pass
            else:
                path = f"{home}/{'file' if name == 'file' else 'dir'}{mode}"
                answer = "plain" if not (await sandbox.files.stat(path)).mode & 0o6000 else ESCAPED
            found[f"{name} {mode:o}"] = answer
    await sandbox.kill()
    return found


@staged(
    "files-api/deep-tree",
    tries="exhaust the agent or the host with a tree of some thousand levels",
    container="gone",
    process="gone",
)
async def deep_tree(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    program = "import os\nprint(os.getcwd(), flush=True)\nfor _ in range(2500):\n os.mkdir('d'); os.chdir('d')"
    home = (await finish(await sandbox.exec(ExecSpec(argv=("python3", "-c", program))))).out.decode().strip()
    await sandbox.files.list(f"{home}/d")
    await sandbox.files.remove(f"{home}/d", recursive=True)
    gone = not [entry for entry in await sandbox.files.list(home) if entry.path.endswith("/d")]
    await sandbox.kill()
    return "gone" if gone else ESCAPED


def _flood_directory() -> None:
    os.mkdir("watched")
    os.write(1, os.getcwd().encode() + b"\n")
    sys.stdin.readline()
    for index in range(20000):
        os.close(os.open(f"watched/{index % 500}-{'n' * 200}", os.O_CREAT | os.O_WRONLY))
        if index % 500 == 499:
            for entry in os.scandir("watched"):
                os.unlink(entry.path)


@staged(
    "files-api/watch-flood", tries="cause more events than the host reads, to fill the daemon's memory", container="bounded",
    process="bounded",
)  # fmt: skip
async def watch_flood(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    process = await arena.start(sandbox, shipped(_flood_directory) + "\n_flood_directory()\n")
    home = (await line_of(process)).decode()
    watch = sandbox.files.watch(f"{home}/watched")
    await watch.ready()
    await process.write_stdin(b"\n")
    await finish(process)
    waiting = 0
    async for _event in _until_quiet(aiter(watch)):
        waiting += 1
    await sandbox.kill()
    return "bounded" if 0 < waiting <= 5000 else ESCAPED


async def _until_quiet(events: AsyncIterator[object]) -> AsyncIterator[object]:
    while True:
        try:
            yield await asyncio.wait_for(anext(events), 0.5)
        except (TimeoutError, StopAsyncIteration, TartarusError):
            return


@staged(
    "files-api/watch-host",
    tries="have the host's own watch lead outside",
    container="refused",
    process="refused",
    holes={Isolation.PROCESS: "as sharing/watch-files: the agent has no more walls than its guest"},
)
async def watch_host(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    answer = await _failure(sandbox.files.watch(str(arena.bait.directory)).ready())
    await sandbox.kill()
    return answer


def _names() -> None:
    names = ["\n", "\x1b[2J", "-rf", "a\udcff", "x" * 255, "\u202e", " ", "*"]
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    os.write(1, json.dumps([os.getcwd(), len(names)]).encode() + b"\n")


@staged("files-api/odd-names", tries="confuse the host's listing by names", container="listed", process="listed")
async def odd_names(arena: Arena, level: Isolation) -> str:
    sandbox = await arena.sandbox(level)
    said = await finish(await sandbox.exec(ExecSpec(argv=("python3", "-c", shipped(_names) + "\n_names()\n"))))
    home, count = json.loads(said.out)
    entries = [entry for entry in await sandbox.files.list(home) if entry.kind == "file"]
    plain = all(entry.path.startswith(home + "/") and "/" not in entry.path[len(home) + 1 :] for entry in entries)
    await sandbox.kill()
    return "listed" if plain and len(entries) >= count else ESCAPED
