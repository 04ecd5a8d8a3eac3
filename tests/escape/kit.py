"""What every attack has at hand inside the sandbox. Its text is shipped in front of the attack's (see `attack.py`).

Standard library only, Python 3.9 and later, because it runs on the template's interpreter. `run` is the frame
of every attack: it reads the world (what the host prepared and where) from standard input, makes the attempt
and prints one verdict line. An attack that fails by itself prints none, and then does not count as held.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

WORLD: dict[str, Any] = {}
ESCAPED = "escaped"
VERDICT = "@verdict "
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_AT_FDCWD = -100


def call(name: str | int, *args: Any) -> int:
    """A raw system call, by name or number. Raises OSError as the kernel answers, ENOSYS for a name without a number.

    Integers are passed as they are (64 bits), text and bytes as pointers; ctypes objects by reference.
    """
    number = WORLD["numbers"].get(name, -1) if isinstance(name, str) else name
    plain: list[Any] = []
    for arg in args:
        if arg is None or isinstance(arg, int):
            plain.append(ctypes.c_ulong((arg or 0) & 0xFFFF_FFFF_FFFF_FFFF))
        elif isinstance(arg, (str, bytes)):
            plain.append(ctypes.c_char_p(arg.encode() if isinstance(arg, str) else arg))
        else:
            plain.append(ctypes.byref(arg))
    ctypes.set_errno(0)
    result = int(_libc.syscall(ctypes.c_long(number), *plain))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def told(attempt: Callable[..., Any], *args: Any, succeeded: str = ESCAPED) -> tuple[str, Any]:
    """The errno's name that an attempt failed with and None, or `succeeded` and what it returned."""
    try:
        value = attempt(*args)
    except OSError as failure:
        # One number has two names, and which one Python gives depends on its version.
        name = errno.errorcode.get(failure.errno or 0, str(failure.errno))
        return name.replace("ENOTSUP", "EOPNOTSUPP"), None
    return succeeded, value


def outcome(attempt: Callable[..., object], *args: Any, succeeded: str = ESCAPED) -> str:
    """The errno's name that an attempt failed with, or `succeeded`."""
    return told(attempt, *args, succeeded=succeeded)[0]


def asked(name: str | int, *args: Any) -> str:
    """The errno's name that a raw call fails with, or that it escaped."""
    return outcome(call, name, *args)


def opened(path: str, flags: int = os.O_RDONLY, succeeded: str = ESCAPED) -> str:
    """What opening a path gives; whatever is opened is closed again."""
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    return outcome(lambda: os.close(os.open(path, flags)), succeeded=succeeded)


def content(path: str, size: int = 65536) -> bytes:
    """The beginning of a file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)


def secret_of(path: str) -> str:
    """Whether a file that may exist tells anything: 'empty' when it reads as nothing, else that it escaped."""
    answer, said = told(content, path, succeeded="empty")
    return ESCAPED if said and said.strip() else answer


def wrote(path: str, data: bytes) -> str:
    """What writing to an existing path gives. One that stands in for a masked file takes all and keeps nothing."""

    def attempt() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_rdev == os.makedev(1, 3):
                raise OSError(errno.EROFS, "masked")
            os.write(fd, data)
        finally:
            os.close(fd)

    return outcome(attempt)


def in_child(attempt: Callable[[], str]) -> str:
    """Make an attempt in a forked child: its answer, or the name of the signal that killed it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, attempt().encode())
        except BaseException as failure:  # noqa: BLE001 - whatever it was, the parent reports it
            os.write(writer, repr(failure).encode())
        os._exit(0)
    os.close(writer)
    said = b""
    while piece := os.read(reader, 65536):
        said += piece
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return said.decode()


def machine_code(code: bytes) -> Callable[[], int]:
    """Instructions as a function, in memory below 4 GiB (32-bit code can reach it)."""
    mmap, mprotect = _libc.mmap, _libc.mprotect
    mmap.restype = ctypes.c_void_p
    mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap(None, 4096, 3, 0x22 | 0x40, -1, 0)
    ctypes.memmove(page, code, len(code))
    mprotect(page, 4096, 5)
    function: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_long)(page)
    return function


def run(attempt: Callable[[], str | dict[str, str]]) -> None:
    """Read the world, make the attempt, print the verdict."""
    WORLD.update(json.loads(sys.stdin.readline()))
    answers = attempt()
    sys.stdout.flush()
    line = VERDICT + json.dumps(answers if isinstance(answers, dict) else {"": answers})
    os.write(1, b"\n" + line.encode() + b"\n")
