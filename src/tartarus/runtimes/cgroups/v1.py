"""Groups on v1 and hybrid hosts: one directory for each controller."""

from __future__ import annotations

import contextlib
import errno
import os
import time

from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.cgroups.alarms import Alarms, v1_alarms
from tartarus.runtimes.cgroups.files import (
    HELPER_MEMORY_BYTES,
    ROOT,
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
from tartarus.runtimes.descriptors import close_all

_V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "pids", "freezer")


class V1Cgroup:
    """One sandbox's directories, by controller."""

    def __init__(self, paths: dict[str, str]) -> None:
        self._paths = paths

    def limit(self, resources: Resources) -> None:
        """Set the limits."""
        memory = resources.memory_bytes + HELPER_MEMORY_BYTES
        if "memory" in self._paths:
            base = self._paths["memory"]
            names = [f"{base}/memory.limit_in_bytes", f"{base}/memory.memsw.limit_in_bytes"]
            if memory > number_in(read_text(names[1])):
                names.reverse()  # the second is never the lower one: to raise both, it goes first
            for name in names:
                if os.path.exists(name):
                    write_value(name, str(memory))
        if "cpu" in self._paths:
            quota = f"{self._paths['cpu']}/cpu.cfs_quota_us"
            try:
                write_value(quota, str(cpu_quota(resources)))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                write_value(quota, "-1")  # more than the group above us has: that one's limit holds
        if "pids" in self._paths:
            write_value(f"{self._paths['pids']}/pids.max", str(resources.pids + 1))

    def attach(self, pid: int) -> None:
        """Move a process (and all that it will fork) in."""
        for path in self._paths.values():
            write_value(f"{path}/cgroup.procs", str(pid))

    def entries(self) -> list[int]:
        """Descriptors to join by; see `Cgroup.entries`."""
        opened: list[int] = []
        try:
            for path in self._paths.values():
                opened.append(os.open(f"{path}/tasks", os.O_WRONLY | os.O_CLOEXEC))  # noqa: PERF401 - closed on failure
        except BaseException:
            close_all(opened)
            raise
        return opened

    @property
    def can_freeze(self) -> bool:
        """Whether the freezer is mounted, and ours to use."""
        return "freezer" in self._paths

    def freeze(self, frozen: bool) -> None:
        """Stop or continue every process in it."""
        if "freezer" not in self._paths:
            raise GuestFailed("this host has no freezer cgroup", fix="mount the cgroup v1 freezer or use cgroup v2")
        base = self._paths["freezer"]
        for _ in range(1000):
            write_value(f"{base}/freezer.state", "FROZEN" if frozen else "THAWED")
            if read_text(f"{base}/freezer.state").strip() == ("FROZEN" if frozen else "THAWED"):
                return
            time.sleep(0.0002)
        if frozen:
            # Half frozen it could neither run nor be killed.
            write_value(f"{base}/freezer.state", "THAWED")
        raise GuestFailed("the sandbox did not freeze")

    def stats(self, limit: int) -> Stats:
        """Use now; `limit` is the memory limit to report, in bytes."""
        memory = self._paths.get("memory", "")
        return Stats(
            memory_bytes=number_in(read_text(f"{memory}/memory.usage_in_bytes")),
            memory_peak_bytes=number_in(read_text(f"{memory}/memory.max_usage_in_bytes")),
            memory_limit_bytes=limit,
            cpu_usec=number_in(read_text(f"{self._paths.get('cpuacct', '')}/cpuacct.usage")) // 1000,
            pids=number_in(read_text(f"{self._paths.get('pids', '')}/pids.current")),
            oom_kills=self.oom_kills(),
            refused_forks=self.refused_forks(),
        )

    def oom_kills(self) -> int:
        """How many processes the memory limit killed."""
        return field_in(read_text(f"{self._paths.get('memory', '')}/memory.oom_control"), "oom_kill")

    def refused_forks(self) -> int:
        """How many new processes the task limit refused."""
        return field_in(read_text(f"{self._paths.get('pids', '')}/pids.events"), "max")

    def alarms(self) -> Alarms:
        """What tells of these."""
        return v1_alarms(self._paths.get("memory"), self._paths.get("pids"))

    def pids(self) -> list[int]:
        """The processes in it."""
        return pids_in(f"{self._paths.get('pids') or next(iter(self._paths.values()))}/cgroup.procs")

    def kill(self) -> None:
        """SIGKILL to every process in it."""
        path = self._paths.get("pids") or next(iter(self._paths.values()))
        if "freezer" in self._paths and os.path.exists(self._paths["freezer"]):
            # Frozen, so that nobody forks meanwhile; who can't be frozen is killed all the same.
            with contextlib.suppress(GuestFailed, OSError):
                self.freeze(True)
            kill_all(f"{path}/cgroup.procs")
            with contextlib.suppress(GuestFailed, OSError):
                self.freeze(False)
        kill_all(f"{path}/cgroup.procs")

    def remove(self) -> bool:
        """Remove it; False while a process is still leaving."""
        removed = [
            remove_directory(path) for path in self._paths.values()
        ]  # each is tried, whatever became of the others
        return all(removed)


class V1Hierarchy:
    """The daemon's directory below each controller that it may write."""

    version = "v1"

    def __init__(self, parent: str) -> None:
        self._bases: dict[str, str] = {}
        missing = []
        for controller in _V1_CONTROLLERS:
            base = ROOT / controller / parent
            try:
                base.mkdir(exist_ok=True)
            except OSError:
                missing.append(controller)
                continue
            self._bases[controller] = str(base)
        self.missing = tuple(missing)
        self.n_entries = len(self._bases)
        if not self._bases:
            raise IsolationUnavailable("no cgroup can be made", why="every v1 hierarchy refused")

    def create(self, name: str, resources: Resources | None) -> Cgroup:
        """Make a group, with limits when given."""
        group = self.open(name)
        try:
            for base in self._bases.values():
                os.mkdir(f"{base}/{name}")
            if resources is not None:
                group.limit(resources)
        except OSError:
            group.remove()
            raise
        return group

    def open(self, name: str) -> V1Cgroup:
        """An existing group."""
        return V1Cgroup({controller: f"{base}/{name}" for controller, base in self._bases.items()})

    def existing(self) -> list[str]:
        """Names of groups that are there, from this or an earlier daemon."""
        return sorted({name for base in self._bases.values() for name in groups_in(base)})

    def close(self) -> None:
        """Remove the place itself, if it is empty."""
        for base in self._bases.values():
            remove_directory(base)
