"""Programs of others as our children: each with an owner, a deadline, a bound on what it writes, and a reaper."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from tartarus.compat.engines import STDERR, STDOUT, shown
from tartarus.model.errors import EngineFailed

_PIECE = 256 * 1024
_MAX_COMPLAINT = 4096
# The program dies with us (PR_SET_PDEATHSIG), also when we are killed between its start and this line.
_TIED_TO_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
OnOutput = Callable[[int, bytes], None]


def tied(argv: Sequence[str]) -> list[str]:
    """A command line for the same program that is killed when this process ends."""
    return [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *argv]


def ended(process: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """A child of ours is asked to end, then made to, and reaped."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _started(argv: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        tied(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _pieces(process: subprocess.Popen[bytes], what: str, until: float, stall_s: float) -> Iterator[tuple[int, bytes]]:
    """What it writes to either stream, until both are closed."""
    assert process.stdout is not None
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, STDOUT)
        selector.register(process.stderr, selectors.EVENT_READ, STDERR)
        while selector.get_map():
            left = min(until - time.monotonic(), stall_s)
            ready = selector.select(left) if left > 0 else []
            if not ready:
                raise EngineFailed(f"{what} did not answer in time", fix="see whether the engine hangs")
            for key, _ in ready:
                piece = os.read(key.fd, _PIECE)
                if piece:
                    yield key.data, piece
                else:
                    selector.unregister(key.fileobj)


def followed(argv: Sequence[str], on_output: OnOutput, *, timeout_s: float) -> int:
    """Run a program and be told what it writes; its exit status. Raises EngineFailed when it takes too long."""
    with _started(argv) as process:
        for number, piece in _pieces(process, argv[0], time.monotonic() + timeout_s, timeout_s):
            on_output(number, piece)
        return process.wait(10.0)


def bounded(argv: Sequence[str], *, most_bytes: int, timeout_s: float) -> tuple[int, bytes, bytes]:
    """Run a program to its end: its status, and what it wrote. Raises EngineFailed for too much and too long."""
    written = {STDOUT: bytearray(), STDERR: bytearray()}

    def keep(number: int, piece: bytes) -> None:
        written[number] += piece
        if len(written[number]) > most_bytes:
            raise EngineFailed(f"{argv[0]} wrote too much", why=f"more than {most_bytes} bytes")

    status = followed(argv, keep, timeout_s=timeout_s)
    return status, bytes(written[STDOUT]), bytes(written[STDERR])


@contextlib.contextmanager
def streamed(argv: Sequence[str], what: str, *, timeout_s: float, stall_s: float) -> Iterator[Iterator[bytes]]:
    """A program's standard output, as it comes. Its failure is raised at the end, as EngineFailed."""
    with _started(argv) as process:
        yield _stream(process, what, time.monotonic() + timeout_s, stall_s)


def _stream(process: subprocess.Popen[bytes], what: str, until: float, stall_s: float) -> Iterator[bytes]:
    complaint = b""
    for number, piece in _pieces(process, what, until, stall_s):
        if number == STDOUT:
            yield piece
        else:
            complaint = (complaint + piece)[-_MAX_COMPLAINT:]
    if process.wait(10.0) != 0:
        last = complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise EngineFailed(f"{what} failed", why=shown(last, 400))
