"""Sparse files in groups: finding what they hold, and its digests, as fast as two threads read and hash.

The standard library's SHA-256 is used and not a quicker hash: where the processor has instructions for it (all that
were made since 2017 or so) it does some 1.5 GB/s for each thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tartarus.images.memory.manifest import GROUP, MAP_ENTRY

_SPAN = 256 * GROUP
"""What one thread takes at a time."""
_THREADS = 2
_ZEROS = bytes(GROUP)


def content_map(fd: int) -> bytes:
    """The map of a file: number and SHA-256 of each group that is not all zeros."""
    spans = list(_spans(fd, os.fstat(fd).st_size))
    if len(spans) < 2:
        return b"".join(_map_of(fd, *span) for span in spans)
    with ThreadPoolExecutor(_THREADS, "memory-digest") as threads:
        return b"".join(threads.map(lambda span: _map_of(fd, *span), spans))


def is_zero(group: bytes) -> bool:
    """Whether all its bytes are 0."""
    return group == (_ZEROS if len(group) == GROUP else bytes(len(group)))


def write_group(fd: int, number: int, group: bytes) -> None:
    """Put a group into its place."""
    at, view = number * GROUP, memoryview(group)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def read_group(fd: int, number: int, size: int) -> bytes:
    """Read a group; shorter where the file ends."""
    return os.pread(fd, size, number * GROUP)


def _map_of(fd: int, start: int, end: int) -> bytes:
    found = []
    for number in range(start, end):
        group = read_group(fd, number, GROUP)
        if not is_zero(group):
            found.append(MAP_ENTRY.pack(number, hashlib.sha256(group).digest()))
    return b"".join(found)


def _spans(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of groups, (first, after the last), that cover all that holds data."""
    at = 0
    while at < size:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        hole = os.lseek(fd, data, os.SEEK_HOLE)
        first, last = data // GROUP, -(-hole // GROUP)
        step = _SPAN // GROUP
        for start in range(first, last, step):
            yield start, min(start + step, last)
        at = last * GROUP  # a group that two extents share belongs to the first
