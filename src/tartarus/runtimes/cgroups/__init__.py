"""Control groups for sandboxes, on v2 and on v1 or hybrid hosts, behind one class each.

Limits go through the same names on both; what a host has no controller for is reported by `missing`,
never skipped in silence.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tartarus.model.errors import IsolationUnavailable
from tartarus.runtimes.cgroups.files import ROOT
from tartarus.runtimes.cgroups.joining import add_joining, admit, lacking, remove_soon, weaker_limits
from tartarus.runtimes.cgroups.ports import Cgroup, Hierarchy
from tartarus.runtimes.cgroups.v1 import V1Hierarchy
from tartarus.runtimes.cgroups.v2 import V2Hierarchy, delegated_base

__all__ = [
    "Cgroup",
    "Hierarchy",
    "add_joining",
    "admit",
    "group_name",
    "lacking",
    "open_hierarchy",
    "remove_soon",
    "weaker_limits",
]


def group_name(state_dir: Path) -> str:
    """The group above all of a daemon's groups.

    Its name comes from the state directory, so that two daemons on one host never take each other's
    sandboxes for leftovers.
    """
    return "tartarus-" + hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:10]


def open_hierarchy(state_dir: Path) -> Hierarchy:
    """The groups of the daemon with this state directory. Raises IsolationUnavailable where none can be made."""
    parent = group_name(state_dir)
    if (ROOT / "cgroup.controllers").exists():
        base = ROOT / parent if os.access(ROOT, os.W_OK) else delegated_base(ROOT, parent)
        try:
            return V2Hierarchy(base)
        except OSError as error:
            raise IsolationUnavailable("no cgroup may be made here", why=error.strerror or str(error)) from error
    if os.access(ROOT / "pids", os.W_OK) or os.access(ROOT / "memory", os.W_OK):
        return V1Hierarchy(parent)
    raise IsolationUnavailable("no cgroup may be made here", fix="run as root, or under systemd with Delegate=yes")
