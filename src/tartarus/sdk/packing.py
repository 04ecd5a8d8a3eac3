"""Directories as streams of tar, and files as they are: what an upload sends.

Members are made one by one, so that nothing larger than a piece is held; links stay links, and what is neither file,
directory nor link is left out. The daemon takes none of it on trust.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, Protocol

from tartarus.model.errors import FileFailed
from tartarus.model.library import Step, StepProgress, StepState

CHUNK_BYTES = 256 * 1024
Ignore = Callable[[str], bool]
"""Whether a path below the directory, such as ``src/a.py``, is to be left out."""


class Parts(Protocol):
    """What an upload sends: its bytes, and perhaps a path, by which its size is found out."""

    @property
    def path(self) -> str:
        """A file's path, or nothing."""

    def parts(self) -> Iterator[bytes]:
        """The bytes. What it raises ends the upload, of which nothing stays."""


class Payload(NamedTuple):
    """What is uploaded: a file as it is, or a directory as a tar. `owners`: with its owners, else root's."""

    path: str
    owners: bool = False
    ignore: Ignore | None = None

    def parts(self) -> Iterator[bytes]:
        """The bytes. Raises FileFailed for what can't be read."""
        try:
            if self.path == "-":
                with open(0, "rb", buffering=0, closefd=False) as stdin:
                    yield from _pieces(stdin)
            elif os.path.isdir(self.path):
                yield from _gathered(_tar(self.path, self.owners, self.ignore))
            else:
                with open(self.path, "rb", buffering=0) as file:
                    yield from _pieces(file)
        except OSError as error:
            name = error.filename if isinstance(error.filename, str) else self.path
            raise FileFailed(f"can't read {name}", why=error.strerror or str(error)) from error


class Sending:
    """Tells of an upload as it goes on: `passed` for each piece, and `over` at its end."""

    _EVERY_BYTES = 1024**2

    def __init__(self, payload: Parts, tell: Callable[[StepProgress], object] | None) -> None:
        self._tell = tell
        self._sent = self._told = 0
        self._total: int | None = None
        if os.path.isfile(payload.path):
            self._total = os.path.getsize(payload.path)

    def passed(self, part: bytes) -> bytes:
        """A piece is on its way; returned as it is."""
        self._sent += len(part)
        if self._sent - self._told >= self._EVERY_BYTES:
            self._told = self._sent
            self._say(StepState.UPDATED)
        return part

    def over(self) -> None:
        """All of it is there."""
        self._say(StepState.DONE)

    def _say(self, state: StepState) -> None:
        if self._tell is not None:
            self._tell(StepProgress(Step.UPLOAD, state, bytes_done=self._sent, bytes_total=self._total))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(CHUNK_BYTES):
        yield piece


def _gathered(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in larger pieces: thousands of small files are not thousands of system calls."""
    held = bytearray()
    for part in parts:
        held += part
        if len(held) >= CHUNK_BYTES:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _tar(top: str, owners: bool, ignore: Ignore | None) -> Iterator[bytes]:
    made: set[str] = set()
    links: dict[tuple[int, int], str] = {}
    for path, name, info in _walk(top, "", ignore is not None):
        if name and ignore is not None and ignore(name):
            continue
        # What is kept of a directory that is left out still needs its place.
        parents = name.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = "/".join(parents[:depth])
            if parent not in made:
                made.add(parent)
                yield _head(parent, os.lstat(os.path.join(top, parent)), owners)
        if stat.S_ISDIR(info.st_mode):
            if name and name not in made:
                made.add(name)
                yield _head(name, info, owners)
        elif stat.S_ISLNK(info.st_mode):
            yield _head(name, info, owners, kind=tarfile.SYMTYPE, target=os.readlink(path))
        elif stat.S_ISREG(info.st_mode):
            first = links.get((info.st_dev, info.st_ino))
            if owners and info.st_nlink > 1 and first is not None:
                yield _head(name, info, owners, kind=tarfile.LNKTYPE, target=first)
                continue
            links[info.st_dev, info.st_ino] = name
            yield from _file(path, name, owners)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _walk(directory: str, below: str, everything: bool) -> Iterator[tuple[str, str, os.stat_result]]:
    """Every entry, parents first, in the names' order; never through a symbolic link."""
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = f"{below}/{entry.name}" if below else entry.name
        info = entry.stat(follow_symlinks=False)
        yield entry.path, name, info
        if stat.S_ISDIR(info.st_mode):
            yield from _walk(entry.path, name, everything)


def _file(path: str, name: str, owners: bool) -> Iterator[bytes]:
    # It may have become something else since it was looked at: a FIFO must not hold us up, nor a link lead us on.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(fd, "rb", buffering=0) as opened:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise FileFailed(f"can't read {path}", why="it changed meanwhile", fix="try again")
        yield _head(name, info, owners, size=info.st_size)
        left = info.st_size
        while left:
            piece = opened.read(min(left, CHUNK_BYTES))
            if not piece:
                raise FileFailed(f"can't read {path}", why="it became shorter meanwhile", fix="try again")
            left -= len(piece)
            yield piece
        yield bytes(-info.st_size % tarfile.BLOCKSIZE)


def _head(
    name: str, info: os.stat_result, owners: bool, *, kind: bytes = b"", target: str = "", size: int = 0
) -> bytes:
    member = tarfile.TarInfo(name)
    member.type = kind or (tarfile.DIRTYPE if stat.S_ISDIR(info.st_mode) else tarfile.REGTYPE)
    member.mode = stat.S_IMODE(info.st_mode)
    member.linkname = target
    member.size = size
    member.mtime = int(info.st_mtime)
    if owners:
        member.uid, member.gid = info.st_uid, info.st_gid
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
