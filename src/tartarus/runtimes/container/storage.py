"""A sandbox's own storage as a detached mount that the host keeps a hand on: what it changed can be read while it runs.

The guest attaches the mount by descriptor and puts its overlay's upper directory there (`u`). The host's
descriptor keeps the storage alive until it is closed, whatever became of the guest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from enum import Enum
from pathlib import Path

from tartarus.guest.syscalls import number
from tartarus.model.errors import GuestFailed, NoSpace
from tartarus.model.sandbox import Resources


class Storage(Enum):
    """Where a guest's own storage comes from: passed by the host, staged with its nursery, or mounted by itself."""

    PASSED = "passed"
    STAGED = "staged"
    OWN = "own"


UPPER, WORK = "u", "w"
_AT_EMPTY_PATH = 0x1000
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _OPEN_TREE_CLONE = 1, 1, 1
_SET_STRING, _CREATE = 1, 6
_ATTR_NOSUID, _ATTR_NODEV = 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    done = int(_libc.syscall(number(name), *arguments))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return done


def inodes_for(resources: Resources) -> int:
    """How many files a sandbox may have on a disk of that size."""
    return max(4096, min(1 << 20, resources.disk_bytes // 8192))


def tmpfs(size_bytes: int, inodes: int, owner: int) -> int:
    """A new tmpfs of that size, whose root belongs to host id `owner`. Raises NoSpace or GuestFailed."""
    try:
        context = _call("fsopen", b"tmpfs", _FSOPEN_CLOEXEC)
        try:
            for key, value in (
                (b"size", size_bytes), (b"nr_inodes", inodes), (b"mode", "755"), (b"uid", owner), (b"gid", owner)
            ):  # fmt: skip
                _call("fsconfig", context, _SET_STRING, key, str(value).encode(), 0)
            _call("fsconfig", context, _CREATE, None, None, 0)
            return _call("fsmount", context, _FSMOUNT_CLOEXEC, _ATTR_NOSUID | _ATTR_NODEV)
        finally:
            os.close(context)
    except OSError as error:
        raise _explained(error) from error


def directory(path: Path) -> int:
    """A host directory as storage: as large as its disk. Raises NoSpace or GuestFailed."""
    try:
        source = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            tree = _call("open_tree", source, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)
        finally:
            os.close(source)
        request = struct.pack("<QQQQ", _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
        try:
            _call("mount_setattr", tree, b"", _AT_EMPTY_PATH, request, len(request))
        except BaseException:
            os.close(tree)
            raise
    except OSError as error:
        raise _explained(error) from error
    return tree


def used_bytes(storage: int) -> int:
    """What of a tmpfs is in use."""
    found = os.fstatvfs(storage)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _explained(error: OSError) -> NoSpace | GuestFailed:
    why = f"{error.filename}: {error.strerror}"
    if error.errno in {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC}:
        return NoSpace("no room for the sandbox's storage", why=why, fix="stop some sandboxes and try again")
    return GuestFailed("the sandbox's storage can't be made", why=why)
