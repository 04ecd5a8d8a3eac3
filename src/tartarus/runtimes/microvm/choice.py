"""Which monitor runs a daemon's machines: the first that is installed and boots one here, or the one that was set.

QEMU comes first, with hardware virtualisation and then without, since it is the one that our tests boot machines
with; then Firecracker and Cloud Hypervisor, which need hardware virtualisation. A monitor that was set is given or
refused, never replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from tartarus.model.errors import IsolationUnavailable, TartarusError
from tartarus.model.settings import MicrovmMonitor
from tartarus.runtimes.microvm import versions
from tartarus.runtimes.microvm.cloud_hypervisor import CloudHypervisor
from tartarus.runtimes.microvm.driver import Driver
from tartarus.runtimes.microvm.firecracker import Firecracker
from tartarus.runtimes.microvm.jailer import Jailed
from tartarus.runtimes.microvm.launcher import Launcher
from tartarus.runtimes.microvm.monitor import Confined
from tartarus.runtimes.microvm.qemu import Qemu

KVM: Final = Path("/dev/kvm")
_NO_KVM = "this host offers no hardware virtualisation"


class Candidate(NamedTuple):
    """One way to run machines. `probe`: one has to boot before it is taken; `no`: why not, known without trying."""

    monitor: versions.Known
    accelerator: str
    make: Callable[[], Driver]
    probe: bool
    no: str = ""

    @property
    def label(self) -> str:
        """Its name, for people."""
        return f"{self.monitor.title} with KVM" if self.accelerator == "kvm" else f"{self.monitor.title}, emulating"


def candidates(wanted: MicrovmMonitor, launcher: Launcher, place: Path, *, jailer: bool = False) -> list[Candidate]:
    """What to try, in this order. `place`: where monitors that are told paths get their homes.

    `jailer`: Firecracker is started by its own instead of by us.
    """
    homes = place / "homes"
    start = Confined(launcher, homes)

    def firecracker() -> Driver:
        if not jailer:
            return Firecracker(start)
        program = versions.program_of(versions.FIRECRACKER)
        return Firecracker(Jailed(launcher, homes / "jails", program), program)

    no_kvm = "" if os.access(KVM, os.R_OK | os.W_OK) else _NO_KVM
    known = [
        Candidate(versions.QEMU, "kvm", lambda: Qemu(launcher, "kvm"), True, no_kvm),
        Candidate(versions.QEMU, "tcg", lambda: Qemu(launcher, "tcg"), False),
        Candidate(versions.FIRECRACKER, "kvm", firecracker, True, no_kvm),
        Candidate(versions.CLOUD_HYPERVISOR, "kvm", lambda: CloudHypervisor(start), True, no_kvm),
    ]
    return [one for one in known if wanted in (MicrovmMonitor.AUTO, one.monitor.name)]


def require_some(wanted: MicrovmMonitor) -> None:
    """Raises IsolationUnavailable where no monitor that could be taken is installed."""
    lacking = []
    for monitor in versions.MONITORS:
        if wanted in (MicrovmMonitor.AUTO, monitor.name):
            try:
                versions.program_of(monitor)
            except IsolationUnavailable as error:
                lacking.append(error)
            else:
                return
    raise IsolationUnavailable("no virtual machine monitor is installed" if len(lacking) > 1 else lacking[0].what,
                               fix=lacking[0].fix)  # fmt: skip


def clear_homes(place: Path) -> None:
    """Remove what monitors left that a killed daemon could not clean up after; make room for new ones."""
    homes = place / "homes"
    shutil.rmtree(homes, ignore_errors=True)
    homes.mkdir(mode=0o700, parents=True)


class Seen(NamedTuple):
    """A monitor on this host. `version` is empty where there is none that can be used, and `trouble` says why."""

    monitor: versions.Known
    version: str
    trouble: str
    fix: str


def look() -> list[Seen]:
    """Which monitors are installed here, without starting a machine."""
    seen = []
    for monitor in versions.MONITORS:
        try:
            seen.append(Seen(monitor, versions.version_of(versions.program_of(monitor), monitor), "", ""))
        except TartarusError as error:
            why = f"{error.what}: {error.why}" if error.why else error.what
            seen.append(Seen(monitor, "", why, error.fix))
    return seen
