"""Tisiphone's eyes: one live sandbox, its alarms, and what was counted of it so far."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable

import structlog

from tartarus.model.enforcement import Violation, ViolationKind
from tartarus.node.enforcement.bell import Bell
from tartarus.node.enforcement.windows import Windows
from tartarus.node.sandbox import Sandbox
from tartarus.policy.documents import Limits
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.cgroups.alarms import Alarms

_log = structlog.get_logger("tartarus.node.enforcement")
WITHIN_S = 0.01
"""A sandbox is watched from so long after its start on: many have ended by then, and setting alarms takes longer than
the kernel takes to start one. What happened before is counted at the first look, or the last."""
_FULL_BYTES = 64 * 1024
"""A disk with less than this left is full: what is written in blocks rarely meets the limit to the byte."""
Report = Callable[["Watched", ViolationKind, int, str], None]


class Watched:
    """Counts are the kernel's, so that nothing is missed between two looks and nothing counted twice."""

    def __init__(self, sandbox: Sandbox, limits: Limits, bell: Bell, report: Report) -> None:
        self.sandbox = sandbox
        self.limits = limits
        self.windows = Windows(limits.quarantine_when)
        self.told: set[ViolationKind] = set()
        self.untold: list[Violation] = []
        self.network: dict[str, int] = {}
        self._bell = bell
        self._report = report
        self._alarms: Alarms | None = None
        self._group: Cgroup | None = None
        self._oom_kills = self._refused = self._output = 0
        self._disk_full = False
        self._cpu_usec = self._cpu_before_usec = 0
        self._cpu_told = False
        self._cpu_timer: asyncio.TimerHandle | None = None
        self._beginning: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def begin(self) -> None:
        """Watch its guest's group, soon, and what happened in it before."""
        if self.limits.output_bytes is not None and self.sandbox.channel.on_output is None:
            self.sandbox.channel.on_output = self._wrote
            self._wrote(self.sandbox.channel.output_bytes)
        if self.sandbox.calls is not None:
            self.sandbox.calls.listen(self._called)
        self._group = self.sandbox.guest.group
        self._beginning = self._loop.call_later(WITHIN_S, self._set_alarms)

    def _set_alarms(self) -> None:
        self._beginning = None
        if self._group is None:
            return
        try:
            self._alarms = self._group.alarms()
        except OSError as error:  # it has just ended; its last counts come with its end
            _log.debug("not_watched", sandbox=self.sandbox.record.id, error=str(error))
            return
        for fd, events in self._alarms.ringing:
            self._bell.hang_up(fd, events, self._ring)
        self._look_at_cpu()
        self.look()

    def end(self) -> None:
        """Watch no more."""
        if self._beginning is not None:
            self._beginning.cancel()
        alarms, self._alarms = self._alarms, None
        if alarms is not None:
            for fd, _ in alarms.ringing:
                self._bell.take_down(fd)
            alarms.close()
        if self._cpu_timer is not None:
            self._cpu_timer.cancel()

    def restart(self) -> None:
        """It may have another guest: the counters begin anew with another group."""
        if self.sandbox.guest.group is self._group:
            return
        self.end()
        self._oom_kills = self._refused = 0
        self._cpu_before_usec += self._cpu_usec
        self._cpu_usec = 0
        self.begin()

    def last_look(self) -> None:
        """What happened since the last look, when it has ended."""
        final = self.sandbox.guest.stats()
        self._counted(final.oom_kills, final.refused_forks)
        self._cpu_left_s(final.cpu_usec)
        if self.sandbox.calls is not None and self.sandbox.record.exit_signal == signal.SIGSYS:
            self._called("")

    def look(self) -> None:
        """Read the counters. Called by alarms, and every so often where there is none."""
        if self._alarms is not None:
            self._counted(self._alarms.oom_kills(), self._alarms.refused_forks())

    def stands_still(self) -> None:
        """It is about to be saved, and may go on with another group: what this one has counted."""
        if self._beginning is not None:
            self._beginning.cancel()
            self._set_alarms()
        self.look()
        self._cpu_left_s(self.sandbox.guest.stats().cpu_usec)

    @property
    def must_be_polled(self) -> bool:
        """Whether this host tells of something only when asked."""
        return self._alarms is not None and bool(self._alarms.polled)

    def look_at_disk(self) -> None:
        """The kernel tells nobody of a full file system."""
        limits = self.sandbox.record.spec.resources.over(self.sandbox.template.resources)
        full = self.sandbox.guest.stats().disk_bytes >= limits.disk_bytes - _FULL_BYTES
        if full and not self._disk_full:
            self._report(self, ViolationKind.DISK, 1, "its disk is full")
        self._disk_full = full

    def _wrote(self, size: int) -> None:
        """Output came, of whatever command."""
        most, before = self.limits.output_bytes, self._output
        self._output += size
        if most is not None and before <= most < self._output:
            self._report(self, ViolationKind.OUTPUT, 1, f"it wrote more than {most} bytes of output")

    def _called(self, name: str) -> None:
        """It made one of an escape's system calls; "": one of another architecture's, which ended its command."""
        which = name or "of another architecture's"
        self._report(self, ViolationKind.SYSCALL, 1, f"it was refused a system call that escapes begin with: {which}")

    def _ring(self, fd: int) -> None:
        if self._alarms is not None:
            self._alarms.answer(fd)
            self.look()

    def _counted(self, oom_kills: int, refused: int) -> None:
        new_kills, self._oom_kills = oom_kills - self._oom_kills, max(oom_kills, self._oom_kills)
        new_refused, self._refused = refused - self._refused, max(refused, self._refused)
        if new_kills > 0:
            self._report(self, ViolationKind.MEMORY, new_kills, "its memory limit was reached")
        if new_refused > 0:
            self._report(self, ViolationKind.PIDS, new_refused, "its process limit was reached")

    def _time_cpu(self) -> None:
        """No event tells of CPU time, but its quota says when the limit can be reached at the earliest: look then."""
        left_s = self._cpu_left_s(self.sandbox.guest.stats().cpu_usec)
        if left_s > 0 and self.limits.cpu_time_s is not None:
            cpus = self.sandbox.record.spec.resources.over(self.sandbox.template.resources).cpu_milli / 1000
            self._cpu_timer = self._loop.call_later(max(0.01, left_s / cpus), self._look_at_cpu)

    def _cpu_left_s(self, used_usec: int) -> float:
        """Seconds that are left when its present guest has used so much; the first time that there are none is told."""
        self._cpu_usec = used_usec
        most_s = self.limits.cpu_time_s
        if most_s is None or self._cpu_told:
            return 0.0
        left_s = most_s - (self._cpu_before_usec + used_usec) / 1e6
        if left_s <= 0:
            self._cpu_told = True
            self._report(self, ViolationKind.CPU, 1, f"it used more than {most_s:g} s of CPU time")
        return left_s

    def _look_at_cpu(self) -> None:
        with contextlib.suppress(OSError):
            self._time_cpu()
