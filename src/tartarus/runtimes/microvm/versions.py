"""The monitors that are known here: their programs, how old they may be, and what was proved of each driver."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from typing import NamedTuple

from tartarus.model.errors import IsolationUnavailable

_TIMEOUT_S = 10.0
_CONTRACT = "its driver is contract-tested against the official API document; we booted no machine with it"


class Known(NamedTuple):
    """One monitor. `oldest`: the first version taken, and `since` why; `proved`: what its driver went through."""

    name: str
    title: str
    program: str
    oldest: tuple[int, int]
    since: str
    proved: str
    install: str


QEMU = Known(
    "qemu", "QEMU", f"qemu-system-{platform.machine()}", (7, 2), "older ones' microvm was not tried",
    "machines are booted, saved and cloned with it in our tests", "install the package qemu-system-x86",
)  # fmt: skip
FIRECRACKER = Known(
    "firecracker", "Firecracker", "firecracker", (1, 8), "older ones describe no devices in ACPI tables", _CONTRACT,
    "install Firecracker's release for this architecture",
)  # fmt: skip
CLOUD_HYPERVISOR = Known(
    "cloud-hypervisor", "Cloud Hypervisor", "cloud-hypervisor", (51, 0),
    "older ones guess a disk's format from what the guest wrote (GHSA-jmr4-g2hv-mjj6)", _CONTRACT,
    "install Cloud Hypervisor's release for this architecture",
)  # fmt: skip
MONITORS = (QEMU, FIRECRACKER, CLOUD_HYPERVISOR)
"""In the order in which they are tried."""


def program_of(monitor: Known) -> str:
    """Where its program is. Raises IsolationUnavailable."""
    found = shutil.which(monitor.program)
    if found is None:
        raise IsolationUnavailable(f"{monitor.title} ({monitor.program}) is missing", fix=monitor.install)
    return found


def version_of(program: str, monitor: Known) -> str:
    """What a program says of its version. Raises IsolationUnavailable for one that is too old, or does not say."""
    try:
        done = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise IsolationUnavailable(f"{program} can't be run", why=str(error)[:300], fix=monitor.install) from error
    match = re.search(rb"v?(\d+)\.(\d+)[\w.-]*", done.stdout)
    if match is None or (int(match[1]), int(match[2])) < monitor.oldest:
        words = done.stdout.decode(errors="replace").strip()[:100] or "it does not say its version"
        newer = f"{monitor.oldest[0]}.{monitor.oldest[1]}"
        raise IsolationUnavailable(
            f"{monitor.title} is too old", why=f"{words}; {monitor.since}", fix=f"install {newer} or later"
        )
    return f"{monitor.title} {match[0].decode().removeprefix('v')}"
