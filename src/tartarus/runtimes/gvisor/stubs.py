"""Telling runsc's processes apart, as the host sees them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from tartarus.runtimes.nursery import Clone
from tartarus.runtimes.processes import stat_fields

_KERNEL = b"runsc-sandbox\0"
_PARENT, _ARG_START, _ARG_END = 4 - 3, 48 - 3, 49 - 3
"""Where /proc/PID/stat has a process' parent, and the addresses of its words, counted from its state (proc(5))."""


def has_kernel(pids: Sequence[int]) -> bool:
    """Whether one of them is a guest's kernel, which runsc calls so; a process that has ended has no name."""
    return any(_words(pid)[: len(_KERNEL)] == _KERNEL for pid in pids)


def open_kernel(pids: Sequence[int]) -> Clone | None:
    """The one of them that is a guest's kernel, by a descriptor that stays its own.

    Not a fork of it that has its words for a moment: that one's parent is among them.
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            # Looked at last: the number may have been another's before.
            fields = stat_fields(pid)
            if has_kernel([pid]) and fields and int(fields[_PARENT]) not in pids:
                return Clone(pidfd)
            os.close(pidfd)
    return None


def is_stub(pid: int) -> bool:
    """Whether it runs a guest's programs on systrap: a fork of the kernel that let go of its memory, words included.

    What just ends, or begins another program, has no words for a moment either; but no room for any by then.
    """
    if _words(pid):
        return False
    fields = stat_fields(pid)
    return len(fields) > _ARG_END and int(fields[_ARG_START]) < int(fields[_ARG_END]) and not _words(pid)


def _words(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as words:
            return words.read(64) or b""
    except OSError:
        return b""
