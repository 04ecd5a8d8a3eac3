"""Reading and writing the kernel's small files, and what both versions count alike."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tartarus.model.sandbox import Resources

ROOT = Path("/sys/fs/cgroup")
CPU_PERIOD_USEC = 100_000
HELPER_MEMORY_BYTES = 4 * 1024**2
"""Added to a sandbox's memory limit for what is ours: the agent and the kernel's own structures."""


def write_value(path: str, value: str) -> None:
    """Write a value to a kernel file in one call."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def read_text(path: str) -> str:
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


def number_in(text: str) -> int:
    """The first word as a number; 0 when it is none."""
    word = text.split(maxsplit=1)[0] if text.split() else ""
    return int(word) if word.isdigit() else 0


def field_in(text: str, name: str) -> int:
    """The number after a name at the start of a line; 0 when there is none."""
    for line in text.splitlines():
        if line.startswith(name + " "):
            return int(line.split()[1])
    return 0


def groups_in(base: str | Path) -> list[str]:
    """The names of the groups below one; none where it is gone, as another daemon's end may have removed it."""
    try:
        return [entry.name for entry in os.scandir(base) if entry.is_dir()]
    except FileNotFoundError:
        return []


def pids_in(procs_path: str) -> list[int]:
    """The processes that a cgroup.procs file names."""
    return [int(word) for word in read_text(procs_path).split()]


def kill_all(procs_path: str) -> None:
    """SIGKILL to every process that a cgroup.procs file names."""
    for pid in pids_in(procs_path):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def remove_directory(path: str) -> bool:
    """Remove a group's directory; False while something keeps it."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def cpu_quota(resources: Resources) -> int:
    """Microseconds of CPU time in each period."""
    return max(1000, resources.cpu_milli * CPU_PERIOD_USEC // 1000)
