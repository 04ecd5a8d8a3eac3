"""Groups on the unified hierarchy."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.cgroups.alarms import Alarms, v2_alarms
from tartarus.runtimes.cgroups.files import (
    CPU_PERIOD_USEC,
    HELPER_MEMORY_BYTES,
    cpu_quota,
    field_in,
    groups_in,
    kill_all,
    number_in,
    pids_in,
    read_text,
    remove_directory,
    write_value,
)
from tartarus.runtimes.cgroups.ports import Cgroup

_V2_CONTROLLERS = ("memory", "cpu", "pids")


class V2Cgroup:
    """One sandbox's directory."""

    def __init__(self, path: str, available: frozenset[str]) -> None:
        self._path = path
        self._available = available

    def limit(self, resources: Resources) -> None:
        """Set the limits."""
        available = self._available
        if "memory" in available:
            write_value(f"{self._path}/memory.max", str(resources.memory_bytes + HELPER_MEMORY_BYTES))
            if os.path.exists(f"{self._path}/memory.swap.max"):
                write_value(f"{self._path}/memory.swap.max", "0")
        if "cpu" in available:
            write_value(f"{self._path}/cpu.max", f"{cpu_quota(resources)} {CPU_PERIOD_USEC}")
        if "pids" in available:
            write_value(f"{self._path}/pids.max", str(resources.pids + 1))

    def attach(self, pid: int) -> None:
        """Move a process (and all that it will fork) in."""
        write_value(f"{self._path}/cgroup.procs", str(pid))

    def entries(self) -> list[int]:
        """Descriptors to join by; see `Cgroup.entries`."""
        return []

    @property
    def can_freeze(self) -> bool:
        """True: every group of version 2 can."""
        return True

    def freeze(self, frozen: bool) -> None:
        """Stop or continue every process in it."""
        write_value(f"{self._path}/cgroup.freeze", "1" if frozen else "0")
        for _ in range(1000):
            if field_in(read_text(f"{self._path}/cgroup.events"), "frozen") == int(frozen):
                return
            time.sleep(0.0002)
        if frozen:
            write_value(f"{self._path}/cgroup.freeze", "0")
        raise GuestFailed("the sandbox did not freeze")

    def stats(self, limit: int) -> Stats:
        """Use now; `limit` is the memory limit to report, in bytes."""
        return Stats(
            memory_bytes=number_in(read_text(f"{self._path}/memory.current")),
            memory_peak_bytes=number_in(read_text(f"{self._path}/memory.peak")),
            memory_limit_bytes=limit,
            cpu_usec=field_in(read_text(f"{self._path}/cpu.stat"), "usage_usec"),
            pids=number_in(read_text(f"{self._path}/pids.current")),
            oom_kills=self.oom_kills(),
            refused_forks=self.refused_forks(),
        )

    def oom_kills(self) -> int:
        """How many processes the memory limit killed."""
        return field_in(read_text(f"{self._path}/memory.events"), "oom_kill")

    def refused_forks(self) -> int:
        """How many new processes the task limit refused."""
        return field_in(read_text(f"{self._path}/pids.events"), "max")

    def alarms(self) -> Alarms:
        """What tells of these."""
        return v2_alarms(self._path, self._available)

    def pids(self) -> list[int]:
        """The processes in it."""
        return pids_in(f"{self._path}/cgroup.procs")

    def kill(self) -> None:
        """SIGKILL to every process in it."""
        if os.path.exists(f"{self._path}/cgroup.kill"):
            write_value(f"{self._path}/cgroup.kill", "1")
        else:
            kill_all(f"{self._path}/cgroup.procs")

    def remove(self) -> bool:
        """Remove it; False while a process is still leaving."""
        return remove_directory(self._path)


class V2Hierarchy:
    """The daemon's directory and the controllers handed down to it."""

    version = "v2"
    n_entries = 0

    def __init__(self, base: Path) -> None:
        self._base = base
        base.mkdir(exist_ok=True)
        offered = frozenset(read_text(str(base.parent / "cgroup.controllers")).split())
        wanted = [controller for controller in _V2_CONTROLLERS if controller in offered]
        for directory in (base.parent, base):
            for controller in wanted:
                try:
                    write_value(str(directory / "cgroup.subtree_control"), f"+{controller}")
                except OSError:
                    continue
        self._available = frozenset(read_text(str(base / "cgroup.subtree_control")).split())
        self.missing = tuple(name for name in _V2_CONTROLLERS if name not in self._available)

    def create(self, name: str, resources: Resources | None) -> Cgroup:
        """Make a group, with limits when given."""
        group = self.open(name)
        os.mkdir(self._base / name)
        try:
            if resources is not None:
                group.limit(resources)
        except OSError:
            group.remove()
            raise
        return group

    def open(self, name: str) -> V2Cgroup:
        """An existing group."""
        return V2Cgroup(str(self._base / name), self._available)

    def existing(self) -> list[str]:
        """Names of groups that are there, from this or an earlier daemon."""
        return sorted(groups_in(self._base))

    def close(self) -> None:
        """Remove the place itself, if it is empty."""
        remove_directory(str(self._base))


def delegated_base(mount: Path, parent: str) -> Path:
    """Where an unprivileged daemon may make groups: beside itself, in a subtree that systemd delegated.

    cgroup v2 forbids processes in a group that hands controllers down, so the daemon first moves
    into a leaf of its own.
    """
    own = next(
        (line[3:].strip() for line in read_text("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/"
    )
    here = mount / own.strip("/")
    if not os.access(here / "cgroup.procs", os.W_OK):
        raise IsolationUnavailable("no cgroup may be made here", fix="run as root, or under systemd with Delegate=yes")
    leaf = here / f"{parent}-daemon"
    leaf.mkdir(exist_ok=True)
    write_value(str(leaf / "cgroup.procs"), str(os.getpid()))
    return here / parent
