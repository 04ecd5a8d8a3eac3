"""Pausing a guest where there is no cgroup to freeze: SIGSTOP to each of its processes, SIGCONT to those it stopped.

Weaker than a freezer: a program can see that it was stopped (its parent gets SIGCHLD, it may handle SIGCONT), and
another process of the same user can let it go on. So it is used only where the daemon has neither cgroups nor root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from tartarus.model.errors import GuestFailed
from tartarus.runtimes.processes import stat_fields

LIMIT_S = 3.0
"""How long it may take until nothing of a guest runs any more: one that forks without end is faster than we are."""
_LOOK_AGAIN_S = 0.001
_AT_REST = frozenset("TtDZXx")
"""D: in a system call that nothing interrupts, such as the parent of a vfork whose child was stopped."""


class StoppedTree:
    """The processes that were stopped, by descriptors that stay theirs. `stop` and `go_on` block."""

    def __init__(self, pid: int) -> None:
        self._root = pid
        self._stopped: dict[int, int] = {}

    def stop(self) -> None:
        """Stop the root and all that descends from it; what had stopped already is left alone. Raises GuestFailed."""
        deadline = time.monotonic() + LIMIT_S
        while not self._round():
            if time.monotonic() > deadline:
                self.go_on()
                raise GuestFailed(
                    "the sandbox can't be paused",
                    why=f"its processes multiply faster than they can be stopped, for over {LIMIT_S:g} s",
                    fix="run the daemon as root, which freezes all of them at once",
                )
            time.sleep(_LOOK_AGAIN_S)

    def go_on(self) -> None:
        """Let those go on that `stop` stopped; safe to repeat."""
        self._give_up(signal.SIGCONT)

    def kill(self) -> None:
        """End those that `stop` stopped: whatever became of their tree, they are its own; safe to repeat."""
        self._give_up(signal.SIGKILL)

    def _give_up(self, number: int) -> None:
        stopped, self._stopped = self._stopped, {}
        for fd in reversed(stopped.values()):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
            os.close(fd)

    def _round(self) -> bool:
        """Stop what runs. True when nothing did."""
        quiet = True
        for pid, (parent, state) in descendants(self._root).items():
            quiet &= state in _AT_REST
            if state not in _AT_REST and pid not in self._stopped:
                self._stop_one(pid, parent)
        return quiet

    def _stop_one(self, pid: int, parent: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        # The number may have become another process's between the look and the descriptor.
        found = _parent_and_state(pid)
        if found is None or found[0] != parent:
            os.close(fd)
            return
        self._stopped[pid] = fd
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGSTOP)


def descendants(root: int) -> dict[int, tuple[int, str]]:
    """Each process of a tree, parents first, with its parent and state; empty when the root is gone."""
    processes = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (found := _parent_and_state(int(entry.name))) is not None:
            processes[int(entry.name)] = found
    if root not in processes:
        return {}
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    tree = [root]
    for pid in tree:
        tree += children.get(pid, ())
    return {pid: processes[pid] for pid in tree}


def _parent_and_state(pid: int) -> tuple[int, str] | None:
    state, parent = (*stat_fields(pid), "", "")[:2]
    return (int(parent), state) if parent else None
