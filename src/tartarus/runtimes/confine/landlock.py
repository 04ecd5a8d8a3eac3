"""Landlock rulesets as program operations: the process level's main wall, the container level's second.

Landlock grew by versions (ABIs), and a kernel gives what it has: `unenforceable` says in words what an
older one can't hold, and nothing is weakened silently. Constants are those of linux/landlock.h.
Landlock does not mediate metadata (stat, chmod, chown, utimes, extended attributes) at any version so
far; seccomp.py closes what of that changes anything.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Final

from tartarus.guest.syscalls import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tartarus.guest.program import Program, Slot

NEWEST_ABI: Final = 7
_GET_VERSION = 1
_RULE_PATH_BENEATH = 1
_LOG_SAME_EXEC_OFF, _LOG_SUBDOMAINS_OFF = 1, 4
_AT_FDCWD, _O_PATH, _O_CLOEXEC = -100, 0o10000000, 0o2000000


class Access(IntFlag):
    """Rights on files and directories (LANDLOCK_ACCESS_FS_*)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13  # ABI 2
    TRUNCATE = 1 << 14  # ABI 3
    IOCTL_DEV = 1 << 15  # ABI 5


class Port(IntFlag):
    """Rights on TCP ports (LANDLOCK_ACCESS_NET_*), ABI 4."""

    BIND_TCP = 1 << 0
    CONNECT_TCP = 1 << 1


class Scope(IntFlag):
    """What stays inside the domain (LANDLOCK_SCOPE_*), ABI 6."""

    ABSTRACT_UNIX_SOCKET = 1 << 0
    SIGNAL = 1 << 1


EVERYTHING: Final = Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL


ON_FILES: Final = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
"""The rights that a rule on something other than a directory may have."""
READ: Final = Access.READ_FILE | Access.READ_DIR
RUN: Final = READ | Access.EXECUTE
WRITE: Final = (
    Access.WRITE_FILE | Access.TRUNCATE | Access.REFER | Access.REMOVE_DIR | Access.REMOVE_FILE
    | Access.MAKE_DIR | Access.MAKE_REG | Access.MAKE_SOCK | Access.MAKE_FIFO | Access.MAKE_SYM
)  # fmt: skip
DEVICE: Final = Access.READ_FILE | Access.WRITE_FILE | Access.TRUNCATE | Access.IOCTL_DEV


@dataclass(frozen=True, slots=True)
class PathRule:
    """Rights on a path and all below it; `file`: it is not a directory. A path that does not exist is skipped."""

    path: str
    access: Access
    file: bool = False


def abi() -> int:
    """The Landlock version of the running kernel; 0 when it has none, or has it switched off."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(number("landlock_create_ruleset"), None, ctypes.c_size_t(0), ctypes.c_uint(_GET_VERSION))
    return max(0, int(version))


def handled_access(abi: int) -> Access:
    """Every file right that a version knows; all are handled, so what no rule grants is refused."""
    newest = {1: Access.MAKE_SYM, 2: Access.REFER, 3: Access.TRUNCATE, 4: Access.TRUNCATE}
    return Access(2 * newest.get(abi, Access.IOCTL_DEV) - 1) if abi else Access(0)


def unenforceable(abi: int) -> tuple[str, ...]:
    """What this version can't hold at process level, in words; empty when it holds all."""
    if abi <= 0:
        return ("this kernel has no Landlock (5.13 or later, with lsm=landlock): files can't be protected",)
    gaps: list[str] = []
    if abi < 2:
        gaps.append("files can't be moved between directories inside the sandbox (Landlock ABI 2, Linux 5.19)")
    if abi < 3:
        gaps.append("files can't be truncated by path inside the sandbox (Landlock ABI 3, Linux 6.2)")
    if abi < 5:
        gaps.append("commands (ioctl) on the devices it may open are not restricted (Landlock ABI 5, Linux 6.10)")
    if abi < 6:
        gaps.append("signals can be sent to other processes of the same user (Landlock ABI 6, Linux 6.12)")
    return tuple(gaps)


def add_landlock(
    program: Program,
    abi: int,
    rules: Sequence[PathRule],
    *,
    tcp: bool = True,
    scope: Scope = EVERYTHING,
    held: Sequence[int] = (),
) -> None:
    """Enter a domain where only `rules` hold. Needs `no_new_privs`.

    `tcp`: whether TCP ports are left alone; else none can be bound or connected (ABI 4). `scope`: what must
    not reach outside the domain (ABI 6). `held`: descriptors, as numbers there, whose files may be opened again as
    their modes let it. Rights and scopes that `abi` lacks are left out. With `abi` 0
    nothing is added: whether that is acceptable is the level's decision.
    """
    if abi <= 0:
        return
    handled = handled_access(abi)
    ruleset = program.slot()
    attributes = _ruleset_attributes(abi, handled, tcp=tcp, scope=scope)
    program.syscall("landlock_create_ruleset", program.blob(attributes), len(attributes), 0, store=ruleset,
                    step="make a Landlock ruleset")  # fmt: skip
    for rule in rules:
        _add_rule(program, ruleset, rule, handled)
    for number_there in held:
        access = (Access.READ_FILE | Access.WRITE_FILE | Access.TRUNCATE) & handled
        beneath = program.blob(struct.pack("<Qi", access, number_there))
        # A memory file can't have a rule, and needs none: Landlock lets those be.
        program.syscall("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, beneath, 0, ok=errno.EBADFD,
                        step="allow a passed file")  # fmt: skip
    # Denials of code that runs without execve (the warm runner's) would be logged, one line each, to the host; so
    # would those of any domain that a guest makes for itself and asks logs of.
    flags = _LOG_SAME_EXEC_OFF | _LOG_SUBDOMAINS_OFF if abi >= 7 else 0
    program.syscall("landlock_restrict_self", ruleset, flags, step="enter the Landlock domain")
    program.syscall("close", ruleset, step="close the Landlock ruleset")


def _ruleset_attributes(abi: int, handled: Access, *, tcp: bool, scope: Scope) -> bytes:
    """A struct landlock_ruleset_attr, as long as the version knows it (longer ones are refused unless zero)."""
    attributes = struct.pack("<Q", handled)
    if abi >= 4:
        attributes += struct.pack("<Q", 0 if tcp else Port.BIND_TCP | Port.CONNECT_TCP)
    if abi >= 6:
        attributes += struct.pack("<Q", scope)
    return attributes


def _add_rule(program: Program, ruleset: Slot, rule: PathRule, handled: Access) -> None:
    access = rule.access & handled & (ON_FILES if rule.file else ~Access(0))
    if not access:
        return
    # struct landlock_path_beneath_attr: rights, then the descriptor, -1 until the path was opened. One that
    # does not exist leaves -1 there, and the calls after it fail with EBADF, which is then no error.
    beneath = program.blob(struct.pack("<Qi", access, -1))
    parent = program.slot_at(beneath, 8)
    program.syscall("openat", _AT_FDCWD, rule.path, _O_PATH | _O_CLOEXEC, 0, store=parent, ok=errno.ENOENT,
                    step=f"find {rule.path}")  # fmt: skip
    program.syscall("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, beneath, 0, ok=errno.EBADF,
                    step=f"allow {rule.path}")  # fmt: skip
    program.syscall("close", parent, ok=errno.EBADF, step=f"close {rule.path}")
