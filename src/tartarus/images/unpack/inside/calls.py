"""The system calls that Python does not have, and the numbers that the filter needs.

x86_64 and aarch64, from the kernel's `unistd_64.h` and `asm-generic/unistd.h`. The guest's package has whole
tables, but this one runs in the child, which imports as little as it can; a test compares the two.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

NUMBERS: Final[dict[str, tuple[int, int]]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "getpid": (39, 172), "exit": (60, 93), "fcntl": (72, 25), "ftruncate": (77, 46),
    "fchmod": (91, 52), "fchown": (93, 55), "umask": (95, 166), "gettimeofday": (96, 169), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "capset": (126, 91), "sigaltstack": (131, 132),
    "pivot_root": (155, 41), "prctl": (157, 167), "mount": (165, 40), "umount2": (166, 39), "gettid": (186, 178),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "lgetxattr": (192, 9), "fgetxattr": (193, 10),
    "llistxattr": (195, 12), "flistxattr": (196, 13), "futex": (202, 98), "getdents64": (217, 61),
    "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113), "clock_nanosleep": (230, 115),
    "exit_group": (231, 94), "openat": (257, 56), "mkdirat": (258, 34), "mknodat": (259, 33), "fchownat": (260, 54),
    "newfstatat": (262, 79), "unlinkat": (263, 35), "linkat": (265, 37), "symlinkat": (266, 36),
    "readlinkat": (267, 78), "fchmodat": (268, 53), "unshare": (272, 97), "set_robust_list": (273, 99),
    "utimensat": (280, 88), "seccomp": (317, 277), "getrandom": (318, 278), "statx": (332, 291), "rseq": (334, 293),
    "open_tree": (428, 428), "move_mount": (429, 429), "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
}  # fmt: skip
_COLUMN: Final = {"x86_64": 0, "aarch64": 1}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def number(name: str, machine: str | None = None) -> int:
    """The call's number here, or on `machine`. KeyError for an architecture without a table."""
    return NUMBERS[name][_COLUMN[machine or os.uname().machine]]


def call(name: str, *arguments: int | bytes | None) -> int:
    """Make a raw system call; its result. Raises OSError, with the call's name for a file name."""
    plain = [ctypes.c_ulong(value & (2**64 - 1)) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number(name)), *plain))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
    return result
