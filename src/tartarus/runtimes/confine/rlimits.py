"""Resource limits of each process: walls of their own at process level, second walls behind the cgroup elsewhere.

A hard limit can only go down without CAP_SYS_RESOURCE, which even root may lack, so every wish is cut
to what this process has: its guests inherit it.
"""

from __future__ import annotations

import os
import resource
import struct
from typing import TYPE_CHECKING, Final

from tartarus.model.sandbox import Isolation, Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from tartarus.guest.program import Program

_KIB, _MIB, _GIB = 1024, 1024**2, 1024**3
_INFINITY: Final = 0xFFFF_FFFF_FFFF_FFFF

CORE_BYTES: Final = 1
"""One byte: too small for a core file, and the value that keeps a core dump helper (`|` in core_pattern),
which is root outside the sandbox, from being started. 0 does not: helpers ignore the limit but for 1."""

SIGNALS: Final = 4096
"""Queued signals and timers, which hold one each. The kernel's own limit grows with the machine's memory."""
MESSAGE_BYTES: Final = 800 * _KIB
"""POSIX message queues: the kernel's own limit (MQ_BYTES_MAX)."""

Limit = tuple[int, int, int]


def _everywhere() -> list[Limit]:
    """(resource, soft, hard) at every level."""
    return [
        (resource.RLIMIT_CORE, CORE_BYTES, CORE_BYTES),
        # select(2) can't take descriptors from 1024 up; programs that can use more raise the soft limit themselves.
        (resource.RLIMIT_NOFILE, 1024, 65536),
        (resource.RLIMIT_MEMLOCK, 64 * _KIB, 64 * _KIB),
        (resource.RLIMIT_NICE, 0, 0),
        (resource.RLIMIT_RTPRIO, 0, 0),
        (resource.RLIMIT_SIGPENDING, SIGNALS, SIGNALS),
        # A quarter of the stack is the limit on arguments: 8 MiB allow the 2 MiB that we accept.
        (resource.RLIMIT_STACK, 8 * _MIB, 1 * _GIB),
    ]


def wanted(resources: Resources, level: Isolation, *, other_tasks: int = 0) -> list[Limit]:
    """(resource, soft, hard) for a level; `other_tasks` is how many tasks of the sandbox's user run outside it."""
    if level is Isolation.CONTAINER:
        return [*_everywhere(), (resource.RLIMIT_MSGQUEUE, MESSAGE_BYTES, MESSAGE_BYTES)]
    pids = resources.pids + other_tasks
    return [
        *_everywhere(),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_NPROC, pids, pids),
        (resource.RLIMIT_FSIZE, resources.disk_bytes, resources.disk_bytes),
        # Private writable memory. Not RLIMIT_AS: V8 and the JVM reserve far more addresses than they use.
        (resource.RLIMIT_DATA, resources.memory_bytes, resources.memory_bytes),
    ]


def clamp(limit: Limit, hard_now: int) -> Limit:
    """Cut a limit to the hard limit in force (`resource.RLIM_INFINITY` is -1)."""
    which, soft, hard = limit
    ceiling = hard if hard_now == resource.RLIM_INFINITY else min(hard, hard_now)
    return which, min(soft, ceiling), ceiling


def tasks_of(uid: int) -> int:
    """How many threads of a user run now: the kernel counts them against RLIMIT_NPROC together with the sandbox's."""
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == uid:
                    total += os.stat(f"/proc/{entry.name}/task").st_nlink - 2
            except OSError:
                continue  # it ended meanwhile
    return total


def add_rlimits(
    program: Program,
    resources: Resources,
    level: Isolation,
    *,
    hard_now: Callable[[int], int] = lambda which: resource.getrlimit(which)[1],
) -> None:
    """Set every limit. At process level without root the user's other processes count too, so they are added."""
    others = tasks_of(os.getuid()) if level is Isolation.PROCESS and os.geteuid() != 0 else 0
    _add(program, wanted(resources, level, other_tasks=others), hard_now)


def add_queue_limits(program: Program) -> None:
    """Limit what a container-level warm interpreter may queue to what each of its clones may."""
    queues = [(resource.RLIMIT_SIGPENDING, SIGNALS, SIGNALS), (resource.RLIMIT_MSGQUEUE, MESSAGE_BYTES, MESSAGE_BYTES)]
    _add(program, queues, lambda which: resource.getrlimit(which)[1])


def _add(program: Program, limits: list[Limit], hard_now: Callable[[int], int]) -> None:
    for limit in limits:
        which, soft, hard = clamp(limit, hard_now(limit[0]))
        pair = program.blob(struct.pack("<QQ", soft & _INFINITY, hard & _INFINITY))
        program.syscall("prlimit64", 0, which, pair, 0, step=f"set resource limit {which}")
