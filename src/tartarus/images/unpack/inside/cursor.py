"""Walking a directory tree by descriptors, one name at a time: no path is ever resolved by the kernel."""

from __future__ import annotations

import os
from collections.abc import Callable

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Parts = tuple[bytes, ...]
Missing = Callable[[int, Parts, OSError], None]
"""Called with (directory, path, error) where the path's last name, in that directory, can't be opened as one; makes
it one, or raises."""


class Cursor:
    """Descriptors of the directories from `root` down to one of them; moving to a neighbour reopens little."""

    def __init__(self, root: int) -> None:
        self._fds = [root]
        self._names: list[bytes] = []

    def to(self, parts: Parts, missing: Missing | None = None) -> int:
        """The descriptor of the directory `parts` below the root, valid until the next move.

        Raises OSError for what is no directory, unless `missing` makes it one. Links are not followed.
        """
        names, fds = self._names, self._fds
        common = 0
        for ours, theirs in zip(names, parts, strict=False):
            if ours != theirs:
                break
            common += 1
        self._up_to(common)
        for name in parts[common:]:
            try:
                fd = os.open(name, DIRECTORY, dir_fd=fds[-1])
            except OSError as error:
                if missing is None:
                    raise
                missing(fds[-1], (*names, name), error)
                fd = os.open(name, DIRECTORY, dir_fd=fds[-1])
            fds.append(fd)
            names.append(name)
        return fds[-1]

    def leave(self, parts: Parts) -> None:
        """Let go of the directory `parts` and of what is below it, because it is about to be removed."""
        if tuple(self._names[: len(parts)]) == parts:
            self._up_to(len(parts) - 1)

    def close(self) -> None:
        """Let go of all but the root, which is the caller's."""
        self._up_to(0)

    def _up_to(self, depth: int) -> None:
        while len(self._names) > depth:
            os.close(self._fds.pop())
            self._names.pop()


def remove(directory: int, parts: Parts, gone: Callable[[Parts], None]) -> None:
    """Remove what `directory` has under the last name of `parts`, and all below it when it is a directory.

    `gone` is called with the path of each directory that was removed.
    """
    name = parts[-1]
    try:
        os.unlink(name, dir_fd=directory)
        return
    except IsADirectoryError:
        pass
    inside = os.open(name, DIRECTORY, dir_fd=directory)
    try:
        for entry in os.listdir(inside):
            remove(inside, (*parts, os.fsencode(entry)), gone)
    finally:
        os.close(inside)
    os.rmdir(name, dir_fd=directory)
    gone(parts)
