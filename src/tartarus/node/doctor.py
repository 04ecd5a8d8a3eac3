"""What this host can give, found out by trying, and how to get what it can't.

`examine` is what `tartarus doctor` shows before it starts a real guest at each level. Checks are data:
whoever shows them decides how. Must be called from a process without other threads (see probes.py).
"""

from __future__ import annotations

import os
import platform
import pwd
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from tartarus.guest.binary import agent_binary
from tartarus.guest.syscalls import TABLES, machine
from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.model.units import format_size
from tartarus.node import probes
from tartarus.runtimes.confine import landlock
from tartarus.runtimes.idmap import host_id_map
from tartarus.runtimes.microvm import choice, versions

CONTAINER: Final = "container"
PROCESS: Final = "process"
MICROVM: Final = "microvm"
EVERY_LEVEL: Final = (CONTAINER, PROCESS)
OLDEST_KERNEL: Final = (5, 10)
WANTED_FREE_BYTES: Final = 2 * 1024**3
WANTED_CONTROLLERS: Final = ("memory", "cpu", "pids")
_HOST_NAMESPACES: Final = {"pid": 0xEFFFFFFC, "cgroup": 0xEFFFFFFB}
"""Inode numbers that the kernel fixes for a host's first namespaces (PROC_PID_INIT_INO and its kin)."""
_ENGINE_OPTIONS: Final = "--cap-add SYS_ADMIN" + "".join(
    f" --security-opt {what}=unconfined" for what in ("seccomp", "apparmor", "systempaths")
)
_CGROUPS: Final = Path("/sys/fs/cgroup")


class Check(msgspec.Struct, frozen=True):
    """One finding. `ok` None: neither good nor bad, or can't be known here. `needed_for`: levels it matters to."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""
    needed_for: tuple[str, ...] = ()


def examine(state_dir: Path) -> list[Check]:
    """Every check of this host, for a daemon with this state directory."""
    inside = engine()
    return [
        check_kernel(platform.release()),
        check_engine(inside),
        check_agent(),
        check_memory_programs(),
        check_seccomp(inside),
        check_landlock(landlock.abi()),
        *check_user_namespaces(inside),
        check_id_map(inside),
        check_proc(inside),
        check_overlay(inside),
        check_cgroups(_CGROUPS, inside),
        check_disk(state_dir),
        check_kvm(),
        *check_monitors(choice.look()),
        check_tun(),
    ]


def check_kernel(release: str) -> Check:
    """Kernel version and architecture."""
    digits = release.split("-", 1)[0].split(".")[:2]
    version = tuple(int(part) for part in digits if part.isdigit())
    supported = version >= OLDEST_KERNEL and machine() in TABLES
    fix = "" if supported else f"use Linux {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or later on {' or '.join(TABLES)}"
    return Check("kernel", supported, f"Linux {release}, {machine()}", fix, EVERY_LEVEL)


def engine() -> str:
    """The container engine that this process runs under, as far as it can be told; empty on a host.

    Virtual machines are made from container images too, so an engine's marker file alone says nothing.
    """
    if all(os.stat(f"/proc/self/ns/{kind}").st_ino == inode for kind, inode in _HOST_NAMESPACES.items()):
        return ""
    for path, name in (("/.dockerenv", "Docker"), ("/run/.containerenv", "Podman")):
        if Path(path).exists():
            return name
    try:
        groups = Path("/proc/1/cgroup").read_text(encoding="ascii", errors="replace")
        environ = Path("/proc/1/environ").read_bytes()
    except OSError:
        groups, environ = "", b""
    marks = {"kubepods": "Kubernetes", "docker": "Docker", "libpod": "Podman", "lxc": "LXC"}
    named = [word[10:].decode(errors="replace") for word in environ.split(b"\0") if word.startswith(b"container=")]
    return next((name for mark, name in marks.items() if mark in groups), named[0] if named else "")


def check_engine(inside: str) -> Check:
    """Whether a container engine's own walls stand around us."""
    return Check("surroundings", None, f"inside {inside}" if inside else "not inside a container engine")


def check_agent() -> Check:
    """Whether the guest agent was built."""
    try:
        return Check("guest agent", True, str(agent_binary()), "", EVERY_LEVEL)
    except GuestFailed as error:
        return Check("guest agent", False, f"{error.what}: {error.why}", error.fix, EVERY_LEVEL)


def check_memory_programs() -> Check:
    """Whether programs run from memory files."""
    found = probes.run_from_memory()
    fix = "" if found.works else "sudo sysctl -w vm.memfd_noexec=0"
    return Check("programs in memory", found.works, found.detail or "memfd and execveat work", fix, EVERY_LEVEL)


def check_seccomp(inside: str) -> Check:
    """Whether filters can be installed."""
    found = probes.seccomp()
    fix = "" if found.works else _engine_fix(inside) or "use a kernel with CONFIG_SECCOMP_FILTER"
    detail = f"filters work ({found.detail})" if found.works else found.detail
    return Check("seccomp", found.works, detail, fix, EVERY_LEVEL)


def check_landlock(abi: int) -> Check:
    """Landlock's version, and what it can't hold."""
    gaps = landlock.unenforceable(abi)
    if abi == 0:
        fix = 'boot with lsm=landlock,... (add the names that "cat /sys/kernel/security/lsm" shows)'
        return Check("Landlock", False, gaps[0], fix, (PROCESS,))
    detail = f"ABI {abi}" + (f": {'; '.join(gaps)}" if gaps else "")
    return Check("Landlock", True, detail, "a newer kernel closes these gaps" if gaps else "", (PROCESS,))


def check_user_namespaces(inside: str) -> list[Check]:
    """User namespaces for us, and, when we are root, for ordinary users."""
    own = probes.user_namespaces()
    detail = "every namespace can be made" if own.works else own.detail
    checks = [Check("user namespaces", own.works, detail, "" if own.works else _namespace_fix(inside), (CONTAINER,))]
    if os.geteuid() == 0:
        others = probes.user_namespaces_without_root()
        detail = "ordinary users can make them, too" if others.works else f"not for ordinary users: {others.detail}"
        fix = "" if others.works else f"only needed to run without root: {_namespace_fix(inside)}"
        checks.append(Check("user namespaces without root", True if others.works else None, detail, fix, (CONTAINER,)))
    return checks


def check_id_map(inside: str) -> Check:
    """Whether a sandbox can have more user ids than one, tried on a real namespace."""
    wanted = host_id_map()
    if wanted.span == 1:
        lacking = "no ids of yours in /etc/subuid and /etc/subgid" if shutil.which("newuidmap") else "no newuidmap"
        return Check("user ids", None, f"{lacking}: sandboxes know one user id, root", _subordinate_fix(), (CONTAINER,))
    try:
        probes.hold_user_namespace(wanted.apply)
    except IsolationUnavailable as error:
        return Check("user ids", False, str(error), _subordinate_fix(), (CONTAINER,))
    except OSError as error:
        return Check("user ids", False, error.strerror or str(error), _namespace_fix(inside), (CONTAINER,))
    who = "root" if wanted.privileged else "newuidmap"
    return Check("user ids", True, f"{who} maps {wanted.span} ids from {wanted.base}", "", (CONTAINER,))


def check_proc(inside: str) -> Check:
    """Whether a sandbox can have a /proc of its own."""
    found = probes.fresh_proc()
    fix = "" if found.works else _namespace_fix(inside)
    return Check("own /proc", found.works, found.detail or "can be mounted", fix, (CONTAINER,))


def check_overlay(inside: str) -> Check:
    """Whether overlayfs can be mounted in a user namespace."""
    found = probes.overlay(Path("/tmp"))  # noqa: S108 - a mount point that exists everywhere, used in a private namespace
    fix = _engine_fix(inside) or "use Linux 5.11 or later with overlayfs (sudo modprobe overlay)"
    detail = "works in a user namespace" if found.works else found.detail
    return Check("overlayfs", found.works, detail, "" if found.works else fix, (CONTAINER,))


def check_cgroups(root: Path, inside: str = "") -> Check:
    """Which limits control groups can enforce for us."""
    kind, parents = cgroup_parents(root)
    made = {name: probes.make_cgroup(parent) for name, parent in parents.items()}
    missing = [name for name in WANTED_CONTROLLERS if name not in made or not made[name].works]
    if not missing:
        return Check("cgroups", True, f"{kind}: {', '.join(made)}", "", EVERY_LEVEL)
    why = next((result.detail for result in made.values() if not result.works), "")
    detail = f"{kind}: no {', '.join(missing)}; these limits are not enforced" + (f" ({why})" if why else "")
    delegated = ", or: systemd-run --user --scope -p Delegate=yes tartarus up" if kind == "v2" else ""
    fix = f"start the {inside} container with --privileged" if inside else f"run the daemon as root{delegated}"
    return Check("cgroups", None if len(missing) < len(WANTED_CONTROLLERS) else False, detail, fix, EVERY_LEVEL)


def cgroup_parents(root: Path) -> tuple[str, dict[str, Path]]:
    """(v1, hybrid, v2 or none; the directory below which each controller's groups would be made)."""
    if (root / "cgroup.controllers").exists():
        parent = root if os.access(root, os.W_OK) else root / _own_v2_group()
        offered = (parent / "cgroup.controllers").read_text(encoding="ascii").split()
        return "v2", {name: parent for name in offered if name in WANTED_CONTROLLERS}
    found = {name: root / name for name in (*WANTED_CONTROLLERS, "freezer") if (root / name).is_dir()}
    if not found:
        return "none", {}
    return ("hybrid" if (root / "unified").is_dir() else "v1"), found


def _own_v2_group() -> str:
    lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    return next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")


def check_disk(state_dir: Path) -> Check:
    """Room where the daemon keeps its state."""
    place = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    space = os.statvfs(place)
    free = space.f_bavail * space.f_frsize
    detail = f"{format_size(free)} free in {state_dir}"
    if not os.access(place, os.W_OK):
        fix = "set TARTARUS_HOME to a place of yours"
        return Check("state directory", False, f"{place} can't be written", fix, EVERY_LEVEL)
    if free < WANTED_FREE_BYTES or (space.f_files and space.f_favail < 10_000):
        return Check(
            "state directory", False, detail, "make room, or set TARTARUS_HOME to a place with more", EVERY_LEVEL
        )
    return Check("state directory", True, detail, "", EVERY_LEVEL)


def check_kvm() -> Check:
    """Whether hardware virtualisation is offered to us."""
    found = probes.kvm()
    if found.works:
        detail = f"offered ({found.detail}); booting a guest will tell whether it works"
        return Check("KVM", None, detail, "", (MICROVM,))
    absent = "switch virtualisation on in the firmware or hypervisor"
    fix = f"sudo usermod -aG kvm {_user()}" if Path("/dev/kvm").exists() else absent
    return Check("KVM", None, found.detail, fix, (MICROVM,))


def check_monitors(seen: Sequence[choice.Seen]) -> list[Check]:
    """Each virtual machine monitor: whether it is installed, its version, and what was proved of its driver."""
    checks = []
    for one in seen:
        if one.version:
            detail, ok = f"{one.version}; {one.monitor.proved}", True if one.monitor is versions.QEMU else None
        else:
            detail, ok = f"{one.trouble} (one monitor is enough)", None
        checks.append(Check(f"monitor {one.monitor.name}", ok, detail, one.fix, (MICROVM,)))
    return checks


def check_tun() -> Check:
    """Whether network taps can be made."""
    found = probes.tun()
    fix = "run as root" if Path("/dev/net/tun").exists() else "sudo modprobe tun"
    return Check("tun", None, found.detail or "offered", "" if found.works else fix, (MICROVM,))


def _engine_fix(inside: str) -> str:
    return f"start the {inside} container with --privileged, or with {_ENGINE_OPTIONS}" if inside else ""


def _namespace_fix(inside: str) -> str:
    """The setting that keeps user namespaces from being made, and how to change it."""
    switches = (
        ("/proc/sys/user/max_user_namespaces", "0", "sudo sysctl -w user.max_user_namespaces=15000"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1",
         "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    )  # fmt: skip
    for path, closed, fix in switches:
        try:
            if Path(path).read_text(encoding="ascii").strip() == closed:
                return fix
        except OSError:
            continue
    return _engine_fix(inside) or "use a kernel with CONFIG_USER_NS; a security module may also refuse (see dmesg)"


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # containers are often run as an id without a name
        return str(os.geteuid())


def _subordinate_fix() -> str:
    """How to get newuidmap and a range of ids."""
    installers = {
        "apt-get": "sudo apt-get install -y uidmap",
        "dnf": "sudo dnf install -y shadow-utils",
        "zypper": "sudo zypper install -y shadow",
        "pacman": "sudo pacman -S --noconfirm shadow",
        "apk": "sudo apk add shadow-uidmap",
    }
    install = next((command for tool, command in installers.items() if shutil.which(tool)), "install newuidmap")
    grant = f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {_user()}"
    return grant if shutil.which("newuidmap") else f"{install} && {grant}"
