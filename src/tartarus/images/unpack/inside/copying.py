"""Copying a layer directory: what a sandbox changed, as a layer of its own."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from tartarus.images.unpack.inside.cursor import DIRECTORY, Cursor, Parts
from tartarus.images.unpack.inside.extract import OPAQUE
from tartarus.images.unpack.inside.trees import Entry, Sink, Taker, Xattrs, take
from tartarus.images.unpack.limits import Limits


def copy(source: int, target: str, limits: Limits, *, owners: bool, times: bool) -> dict[str, Any]:
    """Copy the tree of an open directory into an empty one; `owners`: whether ids can be set."""
    copier = Copier(os.open(target, DIRECTORY), owners=owners)
    facts = take(source, limits, copier, times=times)
    copier.finish()
    return facts


class Copier(Taker):
    """Writes what it is handed below `root`, an empty directory that nobody else writes to."""

    def __init__(self, root: int, *, owners: bool) -> None:
        self._cursor = Cursor(root)
        self._sources = Cursor(root)
        self._owners = owners
        self._directories: list[tuple[Parts, os.stat_result]] = []

    def directory(self, entry: Entry, xattrs: Xattrs, *, opaque: bool) -> None:
        """Make it; owner, mode and time come last."""
        if entry.parts:
            os.mkdir(entry.name, 0o700, dir_fd=self._cursor.to(entry.parts[:-1]))
        made = self._cursor.to(entry.parts)
        set_attributes(made, xattrs)
        if opaque:
            os.setxattr(made, OPAQUE, b"y")
        self._directories.append((entry.parts, entry.status))

    def file(self, entry: Entry, xattrs: Xattrs, fill: Callable[[Sink], None]) -> None:
        """Copy it, holes as holes."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(entry.name, flags, 0o600, dir_fd=self._cursor.to(entry.parts[:-1]))
        try:
            fill(lambda data, at: _write_at(fd, data, at))
            os.ftruncate(fd, entry.status.st_size)
            set_attributes(fd, xattrs)
            settle(fd, entry.status, owners=self._owners)
        finally:
            os.close(fd)

    def symlink(self, entry: Entry, target: bytes) -> None:
        """Make it, whatever it points to."""
        directory = self._cursor.to(entry.parts[:-1])
        os.symlink(target, entry.name, dir_fd=directory)
        self._own(directory, entry)

    def hard_link(self, entry: Entry, first: Parts) -> None:
        """Link to the copy of the first name."""
        os.link(
            first[-1],
            entry.name,
            src_dir_fd=self._sources.to(first[:-1]),
            dst_dir_fd=self._cursor.to(entry.parts[:-1]),
            follow_symlinks=False,
        )

    def special(self, entry: Entry) -> None:
        """Make a pipe or a whiteout."""
        directory = self._cursor.to(entry.parts[:-1])
        if entry.is_whiteout:
            os.mknod(entry.name, stat.S_IFCHR, 0, dir_fd=directory)
            return
        os.mkfifo(entry.name, 0o600, dir_fd=directory)
        os.chmod(entry.name, stat.S_IMODE(entry.status.st_mode), dir_fd=directory)
        self._own(directory, entry)

    def _own(self, directory: int, entry: Entry) -> None:
        status = entry.status
        if self._owners:
            os.chown(entry.name, status.st_uid, status.st_gid, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISLNK(status.st_mode):
                os.chmod(entry.name, stat.S_IMODE(status.st_mode), dir_fd=directory)
        os.utime(entry.name, ns=(status.st_mtime_ns, status.st_mtime_ns), dir_fd=directory, follow_symlinks=False)

    def finish(self) -> None:
        """Give the directories their owners, modes and times."""
        for parts, status in self._directories:
            settle(self._cursor.to(parts), status, owners=self._owners)
        self._cursor.close()
        self._sources.close()


def settle(fd: int, status: os.stat_result, *, owners: bool) -> None:
    """Give an open file or directory the owner, mode and time in `status`."""
    if owners:
        os.fchown(fd, status.st_uid, status.st_gid)
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
    os.utime(fd, ns=(status.st_mtime_ns, status.st_mtime_ns))


def set_attributes(fd: int, xattrs: Xattrs) -> None:
    """Set every attribute."""
    for name, value in xattrs.items():
        os.setxattr(fd, name, value)


def _write_at(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
