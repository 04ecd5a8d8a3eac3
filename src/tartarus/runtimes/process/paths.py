"""What of the host's files a process-level guest may use: what programs need to run, and its own directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tartarus.model.errors import IsolationUnavailable
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.confine.landlock import DEVICE, READ, RUN, WRITE, PathRule

PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
READABLE_DIRECTORIES = (
    "/etc/alternatives", "/etc/ssl/certs", "/etc/fonts", "/etc/terminfo", "/etc/python3",
    "/etc/profile.d", "/etc/ld.so.conf.d", "/etc/perl", "/proc/sys", "/sys/kernel/mm/transparent_hugepage",
    "/sys/devices/system/cpu", "/sys/devices/system/node",
)  # fmt: skip
READABLE_FILES = (
    "/etc/ld.so.cache", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/localtime", "/etc/timezone",
    "/etc/mime.types", "/etc/magic", "/etc/os-release", "/etc/hosts", "/etc/services", "/etc/protocols",
    "/etc/ssl/openssl.cnf", "/etc/profile", "/etc/bash.bashrc", "/etc/inputrc", "/etc/gitconfig",
    "/etc/ld.so.conf", "/etc/gai.conf", "/etc/host.conf", "/etc/networks", "/etc/shells", "/etc/debian_version",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/uptime", "/proc/loadavg", "/proc/version",
    "/proc/filesystems",
)  # fmt: skip
"""Of /proc only what describes the machine: with other processes' directories would come their command lines."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
TERMINALS = ("/dev/ptmx", "/dev/tty")


def rules(rootfs: RootFs, home: Path, *, own_terminals: bool) -> list[PathRule]:
    """Landlock rules. `own_terminals`: the guest's user owns only its own terminals, so it may open new ones."""
    granted = [PathRule(str(home), RUN | WRITE)]
    granted += [PathRule(path, RUN) for path in PROGRAMS if os.path.isdir(path)]
    granted += [PathRule(str(layer), RUN) for layer in rootfs.layers]
    granted += [PathRule(source, RUN) for source, _target in rootfs.binds if os.path.isdir(source)]
    granted += [PathRule(str(path), READ) for path in Path("/etc").glob("java*") if path.is_dir()]
    granted += [PathRule(path, READ) for path in READABLE_DIRECTORIES if os.path.isdir(path)]
    granted += [PathRule(path, READ, file=True) for path in READABLE_FILES if os.path.isfile(path)]
    granted += [PathRule(path, DEVICE, file=True) for path in DEVICES]
    if own_terminals:
        granted += [PathRule(path, DEVICE, file=True) for path in TERMINALS]
        granted.append(PathRule("/dev/pts", DEVICE | READ))
    return granted


def require_reachable(paths: Sequence[Path]) -> None:
    """As root every guest has its own user id: all directories on the way to its files must let others through."""
    for path in paths:
        for directory in (path, *path.parents):
            if not directory.stat().st_mode & 0o001:
                raise IsolationUnavailable(
                    "the process level can't be given with this state directory",
                    why=f"{directory} lets no other user through, and each sandbox runs as a user of its own",
                    fix="choose a TARTARUS_HOME whose parents are mode 0711 or wider, or use --isolation container",
                )
