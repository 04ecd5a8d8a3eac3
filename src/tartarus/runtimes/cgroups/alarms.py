"""How a group tells of a limit that was reached: descriptors that wake up, and counters to read when they do."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

from tartarus.runtimes.cgroups.files import field_in, write_value
from tartarus.runtimes.descriptors import close_all


class Alarms:
    """One group's. `ringing`: what to wait for, as (descriptor, epoll events); `polled`: what has no event here.

    Version 2 wakes whoever polls `memory.events` and `pids.events` (cgroup-v2.rst, "file modified event"). Version 1
    has an eventfd for `memory.oom_control` (memory.rst, "OOM Control"); its `pids.events` wakes nobody.
    """

    def __init__(
        self, ringing: Sequence[tuple[int, int]], memory: int, pids: int, *, field: str, polled: frozenset[str]
    ) -> None:
        self.ringing = tuple(ringing)
        self.polled = polled
        self._memory = memory
        self._pids = pids
        self._field = field
        self._rung = frozenset(fd for fd, events in ringing if events & select.EPOLLIN)

    def answer(self, fd: int) -> None:
        """Let a descriptor that woke somebody up do so again, should there be more."""
        if fd in self._rung:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
        else:
            _read(fd)

    def oom_kills(self) -> int:
        """How many processes the memory limit killed so far."""
        return field_in(_read(self._memory), self._field)

    def refused_forks(self) -> int:
        """How many new processes the task limit refused so far."""
        return field_in(_read(self._pids), "max")

    def close(self) -> None:
        """Wait for nothing more."""
        close_all({self._memory, self._pids, *(fd for fd, _ in self.ringing)} - {-1})


def v1_alarms(memory: str | None, pids: str | None) -> Alarms:
    """Of a group with these directories, where it has them."""
    opened: list[int] = []
    try:
        event = control = -1
        if memory is not None:
            control = _open(f"{memory}/memory.oom_control", opened)
            event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            opened.append(event)
            write_value(f"{memory}/cgroup.event_control", f"{event} {control}")
        events = -1 if pids is None else _open(f"{pids}/pids.events", opened)
    except BaseException:
        close_all(opened)
        raise
    ringing = [] if event < 0 else [(event, select.EPOLLIN)]
    return Alarms(ringing, control, events, field="oom_kill", polled=frozenset({"pids"}))


def v2_alarms(path: str, available: frozenset[str]) -> Alarms:
    """Of a group of the unified hierarchy."""
    opened: list[int] = []
    try:
        memory = _open(f"{path}/memory.events", opened) if "memory" in available else -1
        pids = _open(f"{path}/pids.events", opened) if "pids" in available else -1
        for fd in opened:
            _read(fd)  # what was there before it was opened wakes nobody: it is read by whoever begins to watch
    except BaseException:
        close_all(opened)
        raise
    return Alarms([(fd, select.EPOLLPRI) for fd in opened], memory, pids, field="oom_kill", polled=frozenset())


def _open(path: str, opened: list[int]) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    opened.append(fd)
    return fd


def _read(fd: int) -> str:
    """What the file says now; nothing when the group is gone."""
    if fd < 0:
        return ""
    try:
        return os.pread(fd, 4096, 0).decode("ascii")
    except OSError:
        return ""
