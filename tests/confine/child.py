"""Run things in a forked child: a program of ours, then calls under whatever it set up.

The executor here is the tests' own, the third beside agent/program.c and runner.py, so that builders are
tested without either.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import signal
import struct
import traceback
from typing import TYPE_CHECKING, Any

from tartarus.guest.program import Program
from tartarus.guest.syscalls import number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_OP = struct.Struct("<BBHiiI6B2x6Q")


class StepFailed(Exception):
    """A step of the program failed in the child."""


def call(name: str | int, *args: int | bytes | ctypes.Array[ctypes.c_char]) -> tuple[int, int]:
    """Make a raw system call: (result, errno)."""
    nr = name if isinstance(name, int) else number(name)
    plain = [ctypes.c_ulong(arg & (2**64 - 1)) if isinstance(arg, int) else arg for arg in args]
    ctypes.set_errno(0)
    result = _libc.syscall(ctypes.c_long(nr), *plain)
    return result, ctypes.get_errno() if result < 0 else 0


def error_of(name: str | int, *args: int | bytes) -> int:
    """The errno a raw call fails with; 0 when it succeeds."""
    return call(name, *args)[1]


def execute(program: Program, fds: Sequence[int] = ()) -> None:
    """Run a program in this process. Raises StepFailed at the first step that fails."""
    encoded = bytearray(program.encode())
    _magic, _version, count, blob_len = struct.unpack_from("<4sHHI", encoded)
    start = 12 + count * _OP.size
    blob = (ctypes.c_char * blob_len).from_buffer(encoded, start)
    base = ctypes.addressof(blob)
    for index in range(count):
        kind, _flags, ok, nr, store_at, step, *rest = _OP.unpack_from(encoded, 12 + index * _OP.size)
        tags, values = rest[:6], rest[6:]
        if kind == 1:
            struct.pack_into("<Q", encoded, start + values[1], base + values[0])
            continue
        args = []
        for tag, value in zip(tags, values, strict=True):
            loaded = struct.unpack_from("<i", encoded, start + value)[0] if tag == 3 else 0
            args.append((value, base + value, fds[value] if tag == 2 else 0, loaded)[tag])
        result, error = call(nr, *args)
        if error and error != ok:
            raise StepFailed(f"{program.steps[step]}: {errno.errorcode[error]}")
        if not error and store_at >= 0:
            struct.pack_into("<i", encoded, start + store_at, result)


def in_child(work: Callable[[], Any], *, setup: Callable[[Program], None] | None = None) -> Any:
    """What `work` returns in a forked child that first ran the program which `setup` builds.

    Raises AssertionError with the child's traceback if it failed, or the signal that killed it.
    """
    program = Program()
    if setup is not None:
        setup(program)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            execute(program)
            answer = pickle.dumps((True, work()))
        except BaseException:  # noqa: BLE001 - whatever it was, the parent reports it
            answer = pickle.dumps((False, traceback.format_exc()))
        while answer:
            answer = answer[os.write(writer, answer) :]
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert not os.WIFSIGNALED(status), f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    fine, value = pickle.loads(answer)
    assert fine, value
    return value
