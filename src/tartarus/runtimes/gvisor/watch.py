"""Ends a gVisor guest that can't go on, since the host killed one of the processes that run its programs.

runsc itself does not notice that: its kernel waits for the dead one without end, and so would everybody who waits for
the guest. Who kills one is an administrator, or the host when it runs out of memory.
"""

from __future__ import annotations

import asyncio

import structlog

from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.gvisor.stubs import has_kernel, is_stub

_BRISK_S, _CALM_S = 0.02, 0.5
"""Between two looks: while a guest begins or moves, when somebody waits for it and its processes are made; and later.
A look takes some 0.1 ms."""
_BRISK_LOOKS = 150
_log = structlog.get_logger("tartarus.runtimes.gvisor")


class Watch:
    """Looks after one group from now on, until it is closed."""

    def __init__(self, name: str, cgroup: Cgroup) -> None:
        self.seen: frozenset[int] = frozenset()
        """The processes that run programs, as of the last look."""
        self._name = name
        self._cgroup = cgroup
        self._brisk = _BRISK_LOOKS
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(_BRISK_S, self._look)

    def hurry(self) -> None:
        """Look often for a while: its processes are about to change."""
        self._brisk = _BRISK_LOOKS
        if self._timer is not None:
            self._timer.cancel()
            self._look()

    def _look(self) -> None:
        pids = self._cgroup.pids()
        if not self.seen.issubset(pids):
            # runsc keeps such processes for the next program, and ends none of them before it ends.
            if has_kernel(pids):
                _log.warning("runsc_lost_a_process", guest=self._name)
            self._timer = None
            self._cgroup.kill()
            return
        self.seen = frozenset(pid for pid in pids if pid in self.seen or is_stub(pid))
        self._brisk = max(0, self._brisk - 1)
        self._timer = self._loop.call_later(_BRISK_S if self._brisk else _CALM_S, self._look)

    def close(self) -> None:
        """Look no more; safe to repeat."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
