"""Capabilities: none left, and no way back to any.

Order matters: the bounding set and the secure bits need CAP_SETPCAP, so the sets are emptied last. A
process without that capability (process level, no privilege) can't empty its bounding set; nothing is
lost, because its sets are empty already and `no_new_privs` keeps execve from adding to them.
"""

from __future__ import annotations

import errno
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tartarus.guest.program import Program
    from tartarus.model.template import RunAs

_PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 24, 28, 38, 47
_PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
CAPABILITY_VERSION_3 = 0x20080522
SECUREBITS: Final = 0xEF
"""NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, each with its lock; KEEP_CAPS off, with its lock."""

BUILD_CAPABILITIES: Final = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7))
"""CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID: half of what Docker gives every container."""
CHANGE_USER: Final = sum(1 << number for number in (6, 7, 8))
"""SETGID, SETUID, SETPCAP: what taking another user and locking the secure bits takes."""
ZYGOTE_CAPABILITIES: Final = sum(1 << number for number in (0, 1, 3, 6, 7, 8, 12, 21))
"""CHOWN, DAC_OVERRIDE, FOWNER, SETGID, SETUID, SETPCAP, NET_ADMIN (loopback), SYS_ADMIN (mounts and namespaces)."""


@cache
def last_capability() -> int:
    """The highest capability this kernel knows (40 since Linux 5.9)."""
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))


def permitted() -> int:
    """The capabilities that this process may use, as a bit mask."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def add_user(program: Program, user: RunAs) -> None:
    """Become the template's user, in its groups."""
    if user.uid or user.gid or user.groups:
        groups = program.blob(struct.pack(f"<{len(user.groups)}I", *user.groups) or bytes(4))
        program.syscall("setgroups", len(user.groups), groups, step="take the groups of the template's user")
        program.syscall("setresgid", user.gid, user.gid, user.gid, step="take the group of the template's user")
        program.syscall("setresuid", user.uid, user.uid, user.uid, step="become the template's user")


def add_ambient(program: Program, capabilities: int) -> None:
    """Carry these, which are inheritable, over each execve."""
    for number in (number for number in range(last_capability() + 1) if capabilities & 1 << number):
        program.syscall("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0, step="carry a capability over")


def add_capset(program: Program, *, effective: int, inheritable: int = 0) -> None:
    """Set effective and permitted capabilities, and inheritable ones, as bit masks."""
    header = program.blob(struct.pack("<Ii", CAPABILITY_VERSION_3, 0))
    mask = 0xFFFF_FFFF
    low, high = effective & mask, effective >> 32
    data = struct.pack("<6I", low, low, inheritable & mask, high, high, inheritable >> 32)
    program.syscall("capset", header, program.blob(data), step="set capabilities")


def add_bounding_limit(program: Program, kept: int) -> None:
    """Leave these in the bounding set, as far as this process may say so."""
    for capability in range(last_capability() + 1):
        if not kept & 1 << capability:
            program.syscall("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0, step="reduce the capability bounding set",
                            ok=errno.EPERM)  # fmt: skip


def add_bounding_drop(program: Program, *, kept: int = 0) -> None:
    """Empty the bounding set and lock the secure bits. Comes before a change of user, which takes CAP_SETPCAP away.

    `kept`: a mask of capabilities that stay, through changes of user and execve (as ambient ones).
    """
    add_bounding_limit(program, kept)
    if kept:
        add_capset(program, effective=kept | CHANGE_USER, inheritable=kept)
        add_ambient(program, kept)
    program.syscall("prctl", _PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0, step="lock the secure bits", ok=errno.EPERM)


def add_capability_drop(program: Program, *, bounding: bool = True, kept: int = 0) -> None:
    """Leave the process without capabilities, unable to gain any by execve, and with `no_new_privs` set.

    `bounding`: false where `add_bounding_drop` came before; `kept`: what that kept.
    """
    if bounding:
        add_bounding_drop(program)
    if not kept:
        program.syscall("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, step="clear ambient capabilities")
    add_capset(program, effective=kept, inheritable=kept)
    program.syscall("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, step="set no_new_privs")


def add_zygote_capabilities(program: Program) -> None:
    """Leave a container-level warm interpreter what its clones need to box themselves, and set `no_new_privs`."""
    program.syscall("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, step="clear ambient capabilities")
    add_capset(program, effective=ZYGOTE_CAPABILITIES)
    program.syscall("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, step="set no_new_privs")


def add_build_capabilities(program: Program) -> None:
    """Leave a build step's root what installing packages takes: power over files and users of its own namespace.

    Root stays root across execve (no secure bits), but `no_new_privs` holds: nobody else becomes it again.
    """
    add_bounding_limit(program, BUILD_CAPABILITIES)
    program.syscall("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, step="clear ambient capabilities")
    add_capset(program, effective=BUILD_CAPABILITIES)
    program.syscall("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, step="set no_new_privs")
