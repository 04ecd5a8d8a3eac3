"""Opening what lies in a layer, and nothing else: openat2(2) below a directory that is held open.

For whoever looks into directories that an image filled. The kernel itself refuses a path that goes over a symbolic
link, out of the directory or into a mount, so there is no race to lose and no path to check.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
from typing import Any

_OPAQUE = "user.overlay.opaque"
# openat2(2) has this number on every architecture (unistd.h: all from 424 on). Linux 5.6; overlays in user
# namespaces, on which everything here stands, came with 5.11.
_OPENAT2 = 437
_NO_XDEV, _NO_SYMLINKS, _BENEATH = 0x01, 0x04, 0x08


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: str, flags: int = os.O_PATH) -> int:
    """Open `path` below the directory `root`; a symbolic link at its end is opened itself (with O_PATH).

    Raises OSError as open(2) does, ELOOP for a link and EXDEV for a mount on the way, and ValueError for what can be no
    path.
    """
    encoded = os.fsencode(path.lstrip("/")) or b"."
    if b"\0" in encoded:
        raise ValueError("a NUL byte in a path")
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    if not flags & os.O_PATH:
        flags |= os.O_NONBLOCK
    how = _How(flags, 0, _BENEATH | _NO_SYMLINKS | _NO_XDEV)
    number = _syscall()(_OPENAT2, root, encoded, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    if number < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return int(number)


def is_whiteout(status: os.stat_result) -> bool:
    """Whether it hides what lower layers have of its name."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(directory: int) -> bool:
    """Whether the directory, open in any way, hides what lower layers have in it."""
    try:
        # By this way, since a descriptor made with O_PATH has no fgetxattr(2).
        return os.getxattr(f"/proc/self/fd/{directory}", _OPAQUE) == b"y"
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
            return False
        raise


@functools.cache
def _syscall() -> Any:
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call
