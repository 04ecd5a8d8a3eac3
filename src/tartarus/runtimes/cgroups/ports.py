"""What a control group and a place for groups offer, whatever the version."""

from __future__ import annotations

from typing import Protocol

from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.cgroups.alarms import Alarms


class Cgroup(Protocol):
    """One sandbox's group."""

    def limit(self, resources: Resources) -> None:
        """Set the limits, of a new group or of one in use; OSError when the kernel does not take them."""
        ...

    def attach(self, pid: int) -> None:
        """Move a process (and all that it will fork) in."""
        ...

    def entries(self) -> list[int]:
        """Descriptors through which a process joins by writing "0" to each; empty where only `attach` works.

        A process that moves itself this way waits for nothing; moving another waits for an RCU grace period,
        5 to 12 ms on an idle kernel.
        """
        ...

    @property
    def can_freeze(self) -> bool:
        """Whether `freeze` can work on this host."""
        ...

    def freeze(self, frozen: bool) -> None:
        """Stop or continue every process in it."""
        ...

    def stats(self, limit: int) -> Stats:
        """Use now; `limit` is the memory limit to report, in bytes."""
        ...

    def oom_kills(self) -> int:
        """How many processes the memory limit killed."""
        ...

    def refused_forks(self) -> int:
        """How many new processes the task limit refused."""
        ...

    def alarms(self) -> Alarms:
        """What tells of the limits above. OSError when the group is gone."""
        ...

    def pids(self) -> list[int]:
        """The processes in it."""
        ...

    def kill(self) -> None:
        """SIGKILL to every process in it."""
        ...

    def remove(self) -> bool:
        """Remove it; False while a process is still leaving."""
        ...


class Hierarchy(Protocol):
    """Where a daemon's groups live."""

    version: str
    missing: tuple[str, ...]
    n_entries: int

    def create(self, name: str, resources: Resources | None) -> Cgroup:
        """Make a group, with limits when given."""
        ...

    def existing(self) -> list[str]:
        """Names of groups that are there, from this or an earlier daemon."""
        ...

    def open(self, name: str) -> Cgroup:
        """An existing group."""
        ...

    def close(self) -> None:
        """Remove the group above them, unless one of them is still there."""
        ...
