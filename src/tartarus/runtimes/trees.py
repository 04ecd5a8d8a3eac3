"""Removing a directory that untrusted code filled: of any depth, with any modes, and never through a link.

`shutil.rmtree` needs a stack frame and a descriptor for each level, so a guest that nests directories a few
thousand deep would be left behind, or end the clean-up of everything else with a RecursionError.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

_MOST_NAMES = 4096
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> bool:
    """Remove `path` and everything below it; whether it is gone. Nothing that lies elsewhere is touched.

    What is nested deeper than one level is first moved up to the top, so that two levels are open at a time.
    """
    try:
        top = _open(str(path), None)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        names = itertools.count()
        while True:
            directories = _unlink_files(top)
            removed = [_remove_flat(top, name, names) for name in directories]
            if not any(removed):
                break
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


def _open(name: str, above: int | None) -> int:
    """Open a directory that may forbid even its owner to look into it."""
    handle = os.open(name, os.O_PATH | _DIRECTORY, dir_fd=above)
    try:
        entrance = f"/proc/self/fd/{handle}"
        with contextlib.suppress(PermissionError):
            os.chmod(entrance, 0o700)
        return os.open(entrance, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(handle)


def _unlink_files(directory: int) -> list[str]:
    """Remove what is no directory; the names of the directories, of very many the first.

    One by one as they are read: a list of all that a guest has put into one directory may be larger than memory.
    """
    found: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if len(found) < _MOST_NAMES:
                    found.append(entry.name)
                continue
            with contextlib.suppress(OSError):
                os.unlink(entry.name, dir_fd=directory)
    return found


def _remove_flat(top: int, name: str, names: itertools.count[int]) -> bool:
    """Move the directories in `name` up beside it, then remove it; whether anything came of that."""
    moved = False
    with contextlib.suppress(OSError):
        directory = _open(name, top)
        try:
            for inner in _unlink_files(directory):
                with contextlib.suppress(OSError):
                    os.close(_open(inner, directory))  # a move changes the "..", which takes its owner's write right
                    moved |= _move_up(inner, directory, top, names)
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=top)
        return True
    return moved


def _move_up(name: str, directory: int, top: int, names: itertools.count[int]) -> bool:
    for number in itertools.islice(names, 1000):  # the guest may have taken some of the names
        with contextlib.suppress(OSError):
            os.rename(name, f".removed-{number}", src_dir_fd=directory, dst_dir_fd=top)
            return True
    return False


def tree_bytes(path: Path, most: int = 20_000) -> int:
    """Bytes allocated to the files below `path`; counting stops after `most` entries, and at paths too long to open."""
    total = 0
    pending = [str(path)]
    while pending and most > 0:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in itertools.islice(entries, most):
                most -= 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total
