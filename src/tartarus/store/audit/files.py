"""What lies in a log's directory, and how its parts are read."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import zstandard

from tartarus.store.audit.entries import MAX_LINE

HASH_BYTES = 32
_NOTE = re.compile(rb"(?:[^\n]+\n){3,6}\n(?:\xe2\x80\x94 [^\n]+\n)+\n")
_TAIL_BYTES = 1024**2


def segments(log: Path) -> list[Path]:
    """A log's segments, the oldest first."""
    found = [*log.glob("entries-*.jsonl"), *log.glob("entries-*.jsonl.zst")]
    whole = {path.name.removesuffix(".zst"): path for path in sorted(found, key=lambda path: path.suffix == ".jsonl")}
    return [whole[name] for name in sorted(whole)]


def segment_name(start: int) -> str:
    """The name of the segment that begins with an entry."""
    return f"entries-{start:012d}.jsonl"


def start_of(segment: Path) -> int:
    """The sequence of its first entry. Raises ValueError."""
    return int(segment.name.split("-", 1)[1].split(".", 1)[0])


def lines_of(segment: Path, *, torn: bool = False) -> Iterator[bytes]:
    """Its lines, without their ends. With `torn`, a last line without an end is left out: it is being written.

    Raises ValueError for a line that is too long or has no end, zstandard.ZstdError and OSError.
    """
    if segment.suffix != ".zst" and not segment.exists():
        segment = segment.with_name(f"{segment.name}.zst")  # it was packed meanwhile
    with segment.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw) if segment.suffix == ".zst" else raw
        with io.BufferedReader(stream) as file:
            while line := file.readline(MAX_LINE):
                if not line.endswith(b"\n"):
                    if torn and len(line) < MAX_LINE:
                        return
                    raise ValueError("a line without an end")
                yield line[:-1]


class Leaves:
    """The stored hashes of all entries, by sequence; those of entries that were let go, too.

    Read in blocks, not mapped: the writer may cut the file at any moment.
    """

    _BLOCK = 1024

    def __init__(self, path: Path) -> None:
        self._file: io.FileIO | None = None
        self._at, self._block, self._count = -1, b"", 0
        with contextlib.suppress(FileNotFoundError):
            self._file = io.FileIO(path)
            self._count = os.fstat(self._file.fileno()).st_size // HASH_BYTES

    def __enter__(self) -> Leaves:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        """Raises ValueError when it was cut off meanwhile."""
        assert self._file is not None
        at, within = divmod(index, self._BLOCK)
        if at != self._at:
            size = self._BLOCK * HASH_BYTES
            self._at, self._block = at, os.pread(self._file.fileno(), size, at * size)
        found = self._block[HASH_BYTES * within : HASH_BYTES * (within + 1)]
        if len(found) < HASH_BYTES:
            raise ValueError(f"the hash of entry {index} is gone")
        return found


def notes_of(path: Path) -> tuple[list[bytes], int]:
    """The signed notes of a file of checkpoints, and how many of its bytes belong to none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    found = [match.group()[:-1] for match in _NOTE.finditer(content)]
    return found, len(content) - sum(len(note) + 1 for note in found)


def last_notes(path: Path) -> list[bytes]:
    """The newest notes of a file of checkpoints: as many as a segment can have, and more."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            content = file.read()
    except FileNotFoundError:
        return []
    found = [match.group()[:-1] for match in _NOTE.finditer(content)]
    return found if size <= _TAIL_BYTES else found[1:]  # the first one may be cut


def cut_torn_note(path: Path) -> None:
    """Cut off what a crash left of a note at a file's end."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        size = os.fstat(fd).st_size
        begin = max(0, size - MAX_LINE)
        tail = os.pread(fd, MAX_LINE, begin)
        ends = [match.end() for match in _NOTE.finditer(tail)]
        if tail and (not ends or ends[-1] != len(tail)):
            os.ftruncate(fd, begin + (ends[-1] if ends else 0))
            os.fsync(fd)
    finally:
        os.close(fd)


def cut_torn_line(segment: Path) -> None:
    """Cut off what a crash left of a line at a segment's end."""
    fd = os.open(segment, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        tail = os.pread(fd, MAX_LINE, max(0, size - MAX_LINE))
        if tail and not tail.endswith(b"\n"):
            os.ftruncate(fd, size - len(tail) + tail.rfind(b"\n") + 1)
            os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, content: bytes) -> None:
    """Write every byte. Raises OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
