"""How hardened this host is, as advice: what an escaped sandbox, or another user, would meet (`doctor --security`).

Nothing here keeps Tartarus from working, so no finding is a failure: each says what is set, why that matters, and
what to set. Everything is read; nothing is tried and nothing is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tartarus.node.doctor import Check

_SYSCTLS: Final = Path("/proc/sys")
_CPU: Final = Path("/sys/devices/system/cpu")
_SECURITY: Final = Path("/sys/kernel/security")
_MM: Final = Path("/sys/kernel/mm")
MOST_BYTES: Final = 4096


class Wish(NamedTuple):
    """A sysctl, the values that are good, what others let happen, and what to set."""

    name: str
    good: frozenset[str]
    why: str
    wanted: str


def _wish(name: str, good: str, why: str) -> Wish:
    values = good.split()
    return Wish(name, frozenset(values), why, values[0])


WISHES: Final = (
    _wish("kernel.kptr_restrict", "1 2", "any user reads where the kernel's code lies"),
    _wish("kernel.dmesg_restrict", "1", "any user reads the kernel's log, addresses and all"),
    _wish("kernel.unprivileged_bpf_disabled", "1 2", "any user loads programs into the kernel"),
    _wish("kernel.perf_event_paranoid", "2 3 4", "any user measures the kernel and other users' programs"),
    _wish("kernel.randomize_va_space", "2", "programs lie where everybody can tell"),
    _wish("kernel.kexec_load_disabled", "1", "root replaces the running kernel, lockdown or not"),
    _wish("kernel.io_uring_disabled", "1 2", "any user outside of sandboxes has io_uring, a long history of holes"),
    _wish("kernel.yama.ptrace_scope", "1 2 3", "a user's programs take each other over"),
    _wish("net.core.bpf_jit_harden", "1 2", "constants in BPF programs become code"),
    _wish("vm.unprivileged_userfaultfd", "0", "any user stretches races in the kernel"),
    _wish("dev.tty.ldisc_autoload", "0", "any user has old line disciplines loaded"),
    _wish("fs.protected_symlinks", "1", "links in /tmp lead other users astray"),
    _wish("fs.protected_hardlinks", "1", "users make links to files that are not theirs"),
    _wish("fs.protected_fifos", "1 2", "pipes in /tmp take what others write"),
    _wish("fs.protected_regular", "1 2", "files in /tmp take what others write"),
    _wish("fs.suid_dumpable", "0 2", "what privileged programs held lies in core files"),
)
"""Of the kernel's own documentation (admin-guide/sysctl) and the Kernel Self-Protection Project's list."""


def examine_security() -> list[Check]:
    """Every finding about this host."""
    return [
        *(check for wish in WISHES if (check := check_sysctl(_SYSCTLS, wish)) is not None),
        *check_vulnerabilities(_CPU / "vulnerabilities"),
        check_smt(_CPU / "smt" / "active"),
        check_same_page_merging(_MM / "ksm" / "run"),
        check_huge_pages(_MM / "transparent_hugepage" / "enabled"),
        check_lockdown(_SECURITY / "lockdown"),
        check_modules(_SECURITY / "lsm"),
        check_core_pattern(_SYSCTLS / "kernel" / "core_pattern"),
        check_swap(Path("/proc/swaps")),
        check_user_namespaces(_SYSCTLS),
    ]


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        return None


def _advice(name: str, good: bool, detail: str, fix: str = "") -> Check:
    return Check(name, True if good else None, detail, "" if good else fix)


def check_sysctl(root: Path, wish: Wish) -> Check | None:
    """One setting; None where this kernel has not got it, and so not what it is about."""
    value = _read(root / wish.name.replace(".", "/"))
    if value is None:
        return None
    good = value in wish.good
    detail = value if good else f"{value}: {wish.why}"
    return _advice(wish.name, good, detail, f"sudo sysctl -w {wish.name}={wish.wanted}")


def check_vulnerabilities(place: Path) -> Iterator[Check]:
    """What the kernel says of its processor's faults; one line for all that are none or are met."""
    said = {path.name: _read(path) or "" for path in sorted(place.glob("*"))}
    open_ones = {name: text for name, text in said.items() if text.startswith("Vulnerable")}
    met = len(said) - len(open_ones)
    if said:
        yield _advice("processor faults", True, f"{met} of {len(said)} known to this kernel are absent or mitigated")
    for name, text in open_ones.items():
        yield _advice(f"processor fault {name}", False, f"{text}: sandboxes may read what others compute",
                      "boot without mitigations=off, and update the kernel and the microcode")  # fmt: skip


def check_smt(path: Path) -> Check:
    """Two threads of one core share what leaks."""
    active = _read(path) == "1"
    detail = "on: sandboxes of different users may share a core" if active else "off, or there is none"
    return _advice("hyper-threading", not active, detail, "boot with nosmt where tenants don't trust each other")


def check_same_page_merging(path: Path) -> Check:
    """Merging tells, by the time of a write, whether somebody else has a page."""
    on = _read(path) not in {None, "0", "2"}
    detail = "on: who has the same memory can be found out" if on else "off"
    return _advice("page merging (KSM)", not on, detail, "echo 2 | sudo tee /sys/kernel/mm/ksm/run")


def check_huge_pages(path: Path) -> Check:
    """Huge pages for all let small programs take much memory."""
    always = "[always]" in (_read(path) or "")
    detail = "for every program: clones that share memory copy 2 MiB at a write" if always else "for who asks, or never"
    fix = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    return _advice("huge pages", not always, detail, fix)


def check_lockdown(path: Path) -> Check:
    """Whether the host's root may change its kernel."""
    said = _read(path)
    if said is None:
        return _advice("lockdown", False, "not in this kernel, or its securityfs is not mounted",
                       "sudo mount -t securityfs none /sys/kernel/security")  # fmt: skip
    locked = "[none]" not in said
    return _advice("lockdown", locked, said, "boot with lockdown=integrity, where nothing needs unsigned modules")


def check_modules(path: Path) -> Check:
    """The security modules that are active."""
    found = _read(path)
    if found is None:
        return _advice("security modules", False, "can't be seen", "sudo mount -t securityfs none /sys/kernel/security")
    walls = {"apparmor", "selinux", "smack", "tomoyo"} & {*found.split(",")}
    return _advice("security modules", bool(walls), found, "an AppArmor or SELinux policy is one more wall around the "
                   "daemon")  # fmt: skip


def check_core_pattern(path: Path) -> Check:
    """A helper that the kernel starts as root reads what crashed programs left."""
    said = _read(path) or ""
    piped = said.startswith("|")
    detail = f"{said.split()[0]} is run as root on crashes; those of sandboxes never reach it" if piped else said
    return _advice("core dumps", not piped, detail or "none", "sudo sysctl -w kernel.core_pattern=core")


def check_swap(path: Path) -> Check:
    """What sandboxes hold in memory, secrets too, may be written to a disk."""
    devices = [line.split()[0] for line in (_read(path) or "").splitlines()[1:]]
    plain = [device for device in devices if "zram" not in device and not _is_encrypted(device)]
    detail = f"{', '.join(plain)}: memory may be written there in plain" if plain else "none, or in memory or encrypted"
    return _advice("swap", not plain, detail, "encrypt it, or sudo swapoff -a")


def _is_encrypted(device: str) -> bool:
    """Whether a device of the device mapper is dm-crypt's."""
    uuid = _read(Path("/sys/class/block") / Path(device).name / "dm" / "uuid")
    return uuid is not None and uuid.startswith("CRYPT-")


def check_user_namespaces(root: Path) -> Check:
    """Ordinary users with namespaces of their own reach much more of the kernel."""
    closed = (
        _read(root / "user/max_user_namespaces") == "0"
        or _read(root / "kernel/unprivileged_userns_clone") == "0"
        or _read(root / "kernel/apparmor_restrict_unprivileged_userns") == "1"
    )
    uses = "Tartarus itself needs none when its daemon is root" + (
        "; bubblewrap and browsers do" if shutil.which("bwrap") else ""
    )
    detail = "kept from ordinary users" if closed else f"ordinary users make them; {uses}"
    return _advice("user namespaces of users", closed, detail, "sudo sysctl -w kernel.unprivileged_userns_clone=0 "
                   "(Debian), or kernel.apparmor_restrict_unprivileged_userns=1 (Ubuntu)")  # fmt: skip
