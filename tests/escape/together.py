"""Many attacks in one sandbox, one after another, where a sandbox for each would take too long.

`every_one` is shipped into the sandbox like an attack, with the programs of all of them: each runs in a process, a
session and a directory of its own, and what it leaves running is killed before the next one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TOLD = "@told "
_EACH_S = 20.0
_MOST = 1 << 18


def _become(program: str, world: str, said: int) -> None:
    """In a child: the attack, with nothing open but what a command has."""
    os.setsid()
    reader, writer = os.pipe()
    os.write(writer, world.encode() + b"\n")
    os.dup2(reader, 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.closerange(3, 4096)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - another buffer than the parent's
    exec(compile(program, "attack", "exec"), {"__name__": "__main__"})


def _one(name: str, program: str, world: str) -> str:
    directory = name.replace("/", "-")
    os.mkdir(directory)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(directory)
            _become(program, world, writer)
            sys.stdout.flush()
        except BaseException as failure:  # noqa: BLE001 - whatever it was, the host is told
            os.write(2, repr(failure).encode())
        os._exit(0)
    os.close(writer)
    said, until = b"", time.monotonic() + _EACH_S
    while time.monotonic() < until and len(said) < _MOST:
        if select.select([reader], [], [], 0.05)[0]:
            piece = os.read(reader, 65536)
            if not piece:
                break
            said += piece
        elif os.waitpid(pid, os.WNOHANG)[0]:
            pid = 0
            break
    os.close(reader)
    if pid:
        _end(pid)
    return said.decode("utf-8", "replace")


def _end(pid: int) -> None:
    for victim in (-pid, pid):
        try:
            os.kill(victim, signal.SIGKILL)
        except OSError:
            continue
    try:
        os.waitpid(pid, 0)
    except OSError:
        return


def every_one() -> None:
    """Read what there is to do, a line of JSON, and say of each attack what it said."""
    todo: dict[str, Any] = json.loads(sys.stdin.readline())
    for name, program in todo["programs"].items():
        line = TOLD + json.dumps([name, _one(name, program, json.dumps(todo["world"]))])
        os.write(1, line.encode() + b"\n")
