"""A machine's memory as a file without a name, which its clones map privately and nobody can ever write again.

The seal is what keeps clones apart: QEMU opens the file for writing even to map it privately, so a monitor that
its guest took over could otherwise write into the memory that all clones start from.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tartarus.guest import sealing
from tartarus.model.errors import GuestFailed

_ATTEMPTS = 1000
_GROUP = 1024 * 1024
_ZEROS = bytes(_GROUP)
_PIECE = 8 * 1024 * 1024
_FEW_PIECES = 4
_THREADS = 2


def create(size: int) -> int:
    """A descriptor of new, empty memory of `size` bytes."""
    fd = os.memfd_create("tartarus-machine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, 0o666)  # the monitor opens it again, as a user of its own
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Make it unchangeable. Raises GuestFailed while something still maps it for writing."""
    try:
        sealing.seal(fd, _ATTEMPTS)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise GuestFailed("a machine's memory can't be sealed", why="something still writes to it") from None


def sealed(name: str, content: bytes) -> int:
    """A descriptor of these bytes, which monitors, having users of their own, can open through it, and not change."""
    fd = os.memfd_create(f"tartarus-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def allocated(fd: int) -> int:
    """Bytes of it that hold something."""
    return os.fstat(fd).st_blocks * 512


def copy_data(source: int, target: int) -> None:
    """Copy what a sparse file holds to another of the same size, holes left holes; by two threads if it is much."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    pieces = list(_pieces(source, size))
    if len(pieces) <= _FEW_PIECES:
        for start, end in pieces:
            _copy_piece(source, target, start, end)
        return
    with ThreadPoolExecutor(_THREADS, "machine-copy") as threads:
        for _ in threads.map(lambda piece: _copy_piece(source, target, *piece), pieces):
            pass


def read_ahead(fd: int) -> None:
    """Have what a file on disk holds read in the background."""
    for start, end in _pieces(fd, os.fstat(fd).st_size):
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_WILLNEED)


def _pieces(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover what the file holds."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        while start < at:
            end = min(at, start + _PIECE)
            yield start, end
            start = end


def _copy_piece(source: int, target: int, start: int, end: int) -> None:
    # Opened anew: sendfile writes where the descriptor stands, and descriptors that are copies stand together.
    own = os.open(f"/proc/self/fd/{target}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.lseek(own, start, os.SEEK_SET)
        while start < end:
            copied = os.sendfile(own, source, start, end - start)
            if copied == 0:
                raise GuestFailed("a sparse file shrank while it was copied")
            start += copied
    finally:
        os.close(own)


def digest(fd: int) -> str:
    """A digest of a sparse file's content: the same whether its zeros are holes or not."""
    size = os.fstat(fd).st_size
    found = hashlib.sha256(size.to_bytes(8))
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // _GROUP * _GROUP
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        group = os.pread(fd, _GROUP, at)
        if group != _ZEROS[: len(group)]:
            found.update(at.to_bytes(8))
            found.update(group)
        at += _GROUP
    return found.hexdigest()
