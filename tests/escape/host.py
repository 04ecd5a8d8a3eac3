"""What of the host must be the same after an attack as before it."""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path
from typing import Any

_SETTINGS = (
    "kernel/core_pattern", "kernel/core_uses_pid", "kernel/modprobe", "kernel/hostname", "kernel/domainname", "kernel/sysrq",
    "kernel/panic", "kernel/panic_on_oops", "kernel/randomize_va_space", "kernel/kptr_restrict", "kernel/dmesg_restrict",
    "kernel/perf_event_paranoid", "kernel/unprivileged_bpf_disabled", "kernel/modules_disabled", "kernel/tainted",
    "kernel/ctrl-alt-del", "kernel/printk", "kernel/shmmax", "kernel/msgmax", "kernel/yama/ptrace_scope", "kernel/pid_max",
    "kernel/usermodehelper/bset", "vm/overcommit_memory", "vm/mmap_min_addr", "vm/swappiness", "vm/panic_on_oom",
    "fs/suid_dumpable", "fs/protected_symlinks", "fs/protected_hardlinks", "fs/mqueue/queues_max", "fs/pipe-max-size",
    "fs/inotify/max_user_instances", "net/ipv4/ip_forward", "net/ipv4/ip_unprivileged_port_start", "net/core/somaxconn",
    "net/ipv4/ping_group_range",
)  # fmt: skip
# Other programs' containers and sessions come and go meanwhile; a sandbox's mounts would not be in such places.
_OTHERS_MOUNTS = re.compile(r"overlay2|/netns/|docker|containerd|/containers/|/run/user/")
_CLOCK_TOLERANCE_S = 2.0


class Host:
    """Looks at the host: `state` is what must not change; `leftovers` what a sandbox must not leave."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._clock = time.time() - time.monotonic()

    def state(self) -> dict[str, Any]:
        """Settings, mounts, devices, this process's own limits and priorities."""
        return {
            **{f"/proc/sys/{name}": _read(f"/proc/sys/{name}") for name in _SETTINGS},
            "mounts": self._mounts(),
            "swaps": _read("/proc/swaps"),
            "modules": _names(_read("/proc/modules")),
            "host name": os.uname().nodename,
            "limits": [resource.getrlimit(which) for which in range(16)],
            "priority": (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), os.sched_getaffinity(0)),
            "namespaces": [os.readlink(f"/proc/self/ns/{kind}") for kind in sorted(os.listdir("/proc/self/ns"))],
            "out-of-memory score": _read("/proc/self/oom_score_adj"),
            "umask": _read("/proc/self/status").split("Umask:")[1].split()[0],
            "devices": _devices(),
            "clock set": abs(time.time() - time.monotonic() - self._clock) > _CLOCK_TOLERANCE_S,
            "templates": self._templates(),
            "core files": sorted(str(path) for place in (self._state_dir, Path.cwd()) for path in place.glob("core*")),
        }

    def _mounts(self) -> list[str]:
        lines = [line.split() for line in _read("/proc/self/mountinfo").splitlines()]
        return [" ".join(words) for words in lines if not _OTHERS_MOUNTS.search(words[4])]

    def _templates(self) -> list[tuple[Any, ...]]:
        """The small files of every prepared template, with all that an attack could change."""
        found = []
        # Tenants' own snapshots come and go, of which forks of files are made.
        shared = [path for path in self._state_dir.glob("cache/*") if path.name != "tenants"]
        for path in sorted(shared) + sorted(self._state_dir.glob("cache/**/opt/tartarus/*")):
            status = path.lstat()
            found.append((str(path), status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, status.st_ino))
        return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, in words; of lists only what came and went."""
    found = []
    for name in sorted(before | after):
        old, new = before.get(name), after.get(name)
        if old != new:
            if isinstance(old, list) and isinstance(new, list):
                old, new = [item for item in old if item not in new], [item for item in new if item not in old]
            found.append(f"{name}: {old!r} became {new!r}")
    return found


def processes_of(group: str) -> list[str]:
    """Command lines of the host's processes in a cgroup whose path contains `group`."""
    pids = [entry.name for entry in os.scandir("/proc") if entry.name.isdigit()]
    found = [pid for pid in pids if group in _read(f"/proc/{pid}/cgroup")]
    return [f"{pid} {_read(f'/proc/{pid}/cmdline')!r}" for pid in found]


def _devices() -> list[tuple[str, int]]:
    ignored = ("loop", "dm-", "pts", "shm", "mqueue", "vcs")
    return sorted((entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir("/dev")
                  if not entry.name.startswith(ignored))  # fmt: skip


def _names(table: str) -> list[str]:
    return sorted(line.split()[0] for line in table.splitlines() if line)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
