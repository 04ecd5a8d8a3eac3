"""Control groups for sandboxes, on v2 and on v1 or hybrid hosts, behind one class each.

Limits go through the same names on both (`Limits`); what a host has no controller for is reported
by `missing`, never skipped in silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Protocol

from tartarus.guest.program import Fd, Program
from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.model.sandbox import Resources, Stats

_ROOT = Path("/sys/fs/cgroup")
_V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "pids", "freezer")
_V2_CONTROLLERS = ("memory", "cpu", "pids")
_CPU_PERIOD_USEC = 100_000
_HELPER_MEMORY_BYTES = 4 * 1024**2
"""Added to a sandbox's memory limit for what is ours: the agent and the kernel's own structures."""


class Cgroup(Protocol):
    """One sandbox's group."""

    def attach(self, pid: int) -> None:
        """Move a process (and all that it will fork) in."""
        ...

    def entries(self) -> list[int]:
        """Descriptors through which a process joins by writing "0" to each; empty where only `attach` works.

        A process that moves itself this way waits for nothing; moving another waits for an RCU grace period,
        5 to 12 ms on an idle kernel.
        """
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


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _read(path: str) -> str:
    """A small kernel file, through plain descriptors: this is on the way of every launch."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 65536).decode("ascii")
    except OSError:
        return ""
    finally:
        os.close(fd)


def _number(text: str) -> int:
    word = text.split(maxsplit=1)[0] if text.split() else ""
    return int(word) if word.isdigit() else 0


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        if line.startswith(name + " "):
            return int(line.split()[1])
    return 0


def _kill_all(procs_path: str) -> None:
    for word in _read(procs_path).split():
        try:
            os.kill(int(word), signal.SIGKILL)
        except ProcessLookupError:
            continue


def _rmdir(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


class _V1Cgroup:
    def __init__(self, paths: dict[str, str]) -> None:
        self._paths = paths

    def limit(self, resources: Resources) -> None:
        memory = resources.memory_bytes + _HELPER_MEMORY_BYTES
        if "memory" in self._paths:
            base = self._paths["memory"]
            _write(f"{base}/memory.limit_in_bytes", str(memory))
            if os.path.exists(f"{base}/memory.memsw.limit_in_bytes"):
                _write(f"{base}/memory.memsw.limit_in_bytes", str(memory))
        if "cpu" in self._paths:
            _write(f"{self._paths['cpu']}/cpu.cfs_quota_us", str(_quota(resources)))
        if "pids" in self._paths:
            _write(f"{self._paths['pids']}/pids.max", str(resources.pids + 1))

    def attach(self, pid: int) -> None:
        for path in self._paths.values():
            _write(f"{path}/cgroup.procs", str(pid))

    def entries(self) -> list[int]:
        opened: list[int] = []
        try:
            for path in self._paths.values():
                opened.append(os.open(f"{path}/tasks", os.O_WRONLY | os.O_CLOEXEC))  # noqa: PERF401 - closed on failure
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        return opened

    def freeze(self, frozen: bool) -> None:
        if "freezer" not in self._paths:
            raise GuestFailed("this host has no freezer cgroup", fix="mount the cgroup v1 freezer or use cgroup v2")
        base = self._paths["freezer"]
        for _ in range(1000):
            _write(f"{base}/freezer.state", "FROZEN" if frozen else "THAWED")
            if _read(f"{base}/freezer.state").strip() == ("FROZEN" if frozen else "THAWED"):
                return
            time.sleep(0.0002)
        if frozen:
            # Half frozen it could neither run nor be killed.
            _write(f"{base}/freezer.state", "THAWED")
        raise GuestFailed("the sandbox did not freeze")

    def stats(self, limit: int) -> Stats:
        memory = self._paths.get("memory", "")
        return Stats(
            memory_bytes=_number(_read(f"{memory}/memory.usage_in_bytes")),
            memory_peak_bytes=_number(_read(f"{memory}/memory.max_usage_in_bytes")),
            memory_limit_bytes=limit,
            cpu_usec=_number(_read(f"{self._paths.get('cpuacct', '')}/cpuacct.usage")) // 1000,
            pids=_number(_read(f"{self._paths.get('pids', '')}/pids.current")),
            oom_kills=self.oom_kills(),
        )

    def oom_kills(self) -> int:
        return _field(_read(f"{self._paths.get('memory', '')}/memory.oom_control"), "oom_kill")

    def kill(self) -> None:
        path = self._paths.get("pids") or next(iter(self._paths.values()))
        if "freezer" in self._paths and os.path.exists(self._paths["freezer"]):
            # Frozen, so that nobody forks meanwhile; who can't be frozen is killed all the same.
            with contextlib.suppress(GuestFailed, OSError):
                self.freeze(True)
            _kill_all(f"{path}/cgroup.procs")
            with contextlib.suppress(GuestFailed, OSError):
                self.freeze(False)
        _kill_all(f"{path}/cgroup.procs")

    def remove(self) -> bool:
        removed = [_rmdir(path) for path in self._paths.values()]  # each is tried, whatever became of the others
        return all(removed)


class _V1Hierarchy:
    version = "v1"

    def __init__(self, parent: str) -> None:
        self._bases: dict[str, str] = {}
        missing = []
        for controller in _V1_CONTROLLERS:
            base = _ROOT / controller / parent
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
        group = self.open(name)
        for base in self._bases.values():
            os.mkdir(f"{base}/{name}")
        if resources is not None:
            group.limit(resources)
        return group

    def open(self, name: str) -> _V1Cgroup:
        return _V1Cgroup({controller: f"{base}/{name}" for controller, base in self._bases.items()})

    def existing(self) -> list[str]:
        names: set[str] = set()
        for base in self._bases.values():
            names.update(entry.name for entry in os.scandir(base) if entry.is_dir())
        return sorted(names)

    def close(self) -> None:
        for base in self._bases.values():
            _rmdir(base)


class _V2Cgroup:
    def __init__(self, path: str) -> None:
        self._path = path

    def limit(self, resources: Resources, available: frozenset[str]) -> None:
        if "memory" in available:
            _write(f"{self._path}/memory.max", str(resources.memory_bytes + _HELPER_MEMORY_BYTES))
            if os.path.exists(f"{self._path}/memory.swap.max"):
                _write(f"{self._path}/memory.swap.max", "0")
        if "cpu" in available:
            _write(f"{self._path}/cpu.max", f"{_quota(resources)} {_CPU_PERIOD_USEC}")
        if "pids" in available:
            _write(f"{self._path}/pids.max", str(resources.pids + 1))

    def attach(self, pid: int) -> None:
        _write(f"{self._path}/cgroup.procs", str(pid))

    def entries(self) -> list[int]:
        return []

    def freeze(self, frozen: bool) -> None:
        _write(f"{self._path}/cgroup.freeze", "1" if frozen else "0")
        for _ in range(1000):
            if _field(_read(f"{self._path}/cgroup.events"), "frozen") == int(frozen):
                return
            time.sleep(0.0002)
        if frozen:
            _write(f"{self._path}/cgroup.freeze", "0")
        raise GuestFailed("the sandbox did not freeze")

    def stats(self, limit: int) -> Stats:
        return Stats(
            memory_bytes=_number(_read(f"{self._path}/memory.current")),
            memory_peak_bytes=_number(_read(f"{self._path}/memory.peak")),
            memory_limit_bytes=limit,
            cpu_usec=_field(_read(f"{self._path}/cpu.stat"), "usage_usec"),
            pids=_number(_read(f"{self._path}/pids.current")),
            oom_kills=self.oom_kills(),
        )

    def oom_kills(self) -> int:
        return _field(_read(f"{self._path}/memory.events"), "oom_kill")

    def kill(self) -> None:
        if os.path.exists(f"{self._path}/cgroup.kill"):
            _write(f"{self._path}/cgroup.kill", "1")
        else:
            _kill_all(f"{self._path}/cgroup.procs")

    def remove(self) -> bool:
        return _rmdir(self._path)


class _V2Hierarchy:
    version = "v2"
    n_entries = 0

    def __init__(self, base: Path) -> None:
        self._base = base
        base.mkdir(exist_ok=True)
        offered = frozenset(_read(str(base.parent / "cgroup.controllers")).split())
        wanted = [controller for controller in _V2_CONTROLLERS if controller in offered]
        for directory in (base.parent, base):
            for controller in wanted:
                try:
                    _write(str(directory / "cgroup.subtree_control"), f"+{controller}")
                except OSError:
                    continue
        self._available = frozenset(_read(str(base / "cgroup.subtree_control")).split())
        self.missing = tuple(name for name in _V2_CONTROLLERS if name not in self._available)

    def create(self, name: str, resources: Resources | None) -> Cgroup:
        group = self.open(name)
        os.mkdir(self._base / name)
        if resources is not None:
            group.limit(resources, self._available)
        return group

    def open(self, name: str) -> _V2Cgroup:
        return _V2Cgroup(str(self._base / name))

    def existing(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self._base) if entry.is_dir())

    def close(self) -> None:
        _rmdir(str(self._base))


_WITHOUT = {
    "memory": "the memory limit holds for each process by itself",
    "cpu": "the CPU limit is not enforced",
    "pids": "the process limit holds for the sandbox's user",
    "freezer": "sandboxes can't be paused",
}


def lacking(hierarchy: Hierarchy | None) -> frozenset[str]:
    """Controllers that sandboxes must do without on this host."""
    return frozenset(_WITHOUT if hierarchy is None else hierarchy.missing)


def weaker_limits(missing: frozenset[str]) -> tuple[str, ...]:
    """What the lack of controllers means for a sandbox, in words."""
    return tuple(f"no {name} cgroup: {meaning}" for name, meaning in _WITHOUT.items() if name in missing)


def add_joining(program: Program, first: int, count: int) -> None:
    """Let a guest enter its cgroup through `count` passed entries from the `first` on, or wait until it was moved."""
    for index in range(first, first + count):
        program.syscall("write", Fd(index), program.blob(b"0"), 1, step="join the cgroup")
    if not count:
        program.syscall("read", Fd(0), program.blob(b"\0"), 1, step="wait for the cgroup")


def admit(cgroup: Cgroup | None, channel: socket.socket, pid: int, count: int) -> None:
    """The host's half of `add_joining`: nothing where the guest joins by itself."""
    if count:
        return
    if cgroup is not None:
        attach(cgroup, pid)
    channel.send(b"\0")


def attach(cgroup: Cgroup, pid: int) -> None:
    """Move a new guest in. One that died already is no error: its channel tells why."""
    try:
        if pid > 0:
            cgroup.attach(pid)
    except ProcessLookupError:
        return


async def remove_soon(cgroup: Cgroup) -> None:
    """Remove a group whose processes are ending, and kill those that are not."""
    for _ in range(100):
        if cgroup.remove():
            return
        cgroup.kill()
        await asyncio.sleep(0.002)


def _quota(resources: Resources) -> int:
    return max(1000, resources.cpu_milli * _CPU_PERIOD_USEC // 1000)


def _delegated_v2_base(mount: Path, parent: str) -> Path:
    """Where an unprivileged daemon may make groups: beside itself, in a subtree that systemd delegated.

    cgroup v2 forbids processes in a group that hands controllers down, so the daemon first moves
    into a leaf of its own.
    """
    own = next((line[3:].strip() for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    here = mount / own.strip("/")
    if not os.access(here / "cgroup.procs", os.W_OK):
        raise IsolationUnavailable("no cgroup may be made here", fix="run as root, or under systemd with Delegate=yes")
    leaf = here / f"{parent}-daemon"
    leaf.mkdir(exist_ok=True)
    _write(str(leaf / "cgroup.procs"), str(os.getpid()))
    return here / parent


def group_name(state_dir: Path) -> str:
    """The group above all of a daemon's groups.

    Its name comes from the state directory, so that two daemons on one host never take each other's
    sandboxes for leftovers.
    """
    return "tartarus-" + hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:10]


def open_hierarchy(state_dir: Path) -> Hierarchy:
    """The groups of the daemon with this state directory. Raises IsolationUnavailable where none can be made."""
    parent = group_name(state_dir)
    if (_ROOT / "cgroup.controllers").exists():
        base = _ROOT / parent if os.access(_ROOT, os.W_OK) else _delegated_v2_base(_ROOT, parent)
        try:
            return _V2Hierarchy(base)
        except OSError as error:
            raise IsolationUnavailable("no cgroup may be made here", why=error.strerror or str(error)) from error
    if os.access(_ROOT / "pids", os.W_OK) or os.access(_ROOT / "memory", os.W_OK):
        return _V1Hierarchy(parent)
    raise IsolationUnavailable("no cgroup may be made here", fix="run as root, or under systemd with Delegate=yes")
