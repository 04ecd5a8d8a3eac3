"""Which processes a frozen sandbox has, as this host's kernel says."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence

import msgspec

MOST_PROCESSES = 1024
_MOST_ARGUMENTS = 4096
_LIMIT_S = 5.0


class ProcessFacts(msgspec.Struct, frozen=True):
    """One process. Names and arguments are its own words, made readable: nothing in them is to be believed."""

    pid: int
    parent: int
    state: str
    name: str
    arguments: str = ""
    executable: str = ""


class ProcessList(msgspec.Struct, frozen=True):
    """`total` may be more than are listed; `cut_short`: a process kept its words from being read."""

    total: int
    processes: tuple[ProcessFacts, ...]
    cut_short: bool = False


async def processes_of(pids: Sequence[int]) -> ProcessList:
    """What is known of these. A process may make the reading of its arguments wait for ever: then they are left out.

    Hence a thread of its own, which then waits for ever in its place, and holds nothing back at the daemon's end.
    """
    found: list[ProcessFacts] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> None:
        for pid in pids[:MOST_PROCESSES]:
            facts = _facts(pid)
            if facts is not None:
                found.append(facts)
        loop.call_soon_threadsafe(done.set)

    threading.Thread(target=read, name="quarantine-processes", daemon=True).start()
    try:
        await asyncio.wait_for(done.wait(), _LIMIT_S)
    except TimeoutError:
        return ProcessList(len(pids), tuple(found), cut_short=True)
    return ProcessList(len(pids), tuple(found))


def _facts(pid: int) -> ProcessFacts | None:
    try:
        stat = _read(f"/proc/{pid}/stat")
        # "pid (name) state parent …": the name may hold anything, so it ends at the last parenthesis.
        name = stat[stat.index(b"(") + 1 : stat.rindex(b")")]
        state, parent = stat[stat.rindex(b")") + 2 :].split()[:2]
        arguments = _read(f"/proc/{pid}/cmdline").rstrip(b"\0").replace(b"\0", b" ")
    except (OSError, ValueError):
        return None
    try:
        executable = os.readlink(os.fsencode(f"/proc/{pid}/exe"))
    except OSError:
        executable = b""
    return ProcessFacts(
        pid, int(parent), state.decode("ascii", "replace"), readable(name), readable(arguments), readable(executable)
    )


def readable(words: bytes) -> str:
    """Foreign words as text that no terminal obeys."""
    text = words[:_MOST_ARGUMENTS].decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64 * 1024)
    finally:
        os.close(fd)
