"""How a process-level zygote is held: it imports a template's packages, which nobody vouches for either.

As root it becomes a user that owns nothing and keeps two capabilities, with which its clones take user
ids of their own; a filter lets it take no others. Landlock keeps it to the files that its clones may
use, and it has no sockets. Without root it stays the user, inside the same Landlock domain; what
Landlock does not mediate (metadata of the user's files) is then open to it, as to any `pip install`.
"""

from __future__ import annotations

import errno
from pathlib import Path

from tartarus.guest.program import Program
from tartarus.guest.syscalls import machine, table
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.confine import caps, landlock
from tartarus.runtimes.confine.bpf import ALLOW, Branch, Match, Rule, assemble, refuse
from tartarus.runtimes.confine.seccomp import add_filter
from tartarus.runtimes.process import paths

_SETGID, _SETUID, _SETPCAP = 1 << 6, 1 << 7, 1 << 8
_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 8, 38
_EPERM = refuse(errno.EPERM)


def confinement(
    rootfs: RootFs, homes: Path, landlock_abi: int, uid: int | None, guest_uids: tuple[int, int]
) -> Program:
    """The program a zygote runs before its interpreter.

    `homes`: where its clones' directories are. `uid`: the user it becomes, None without privilege.
    `guest_uids`: (first, count) of the ids its clones may take; count is a power of two that divides first.
    """
    program = Program()
    program.syscall("umask", 0o22, step="umask")
    if uid is not None:
        _become(program, uid)
    program.syscall("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, step="set no_new_privs")
    rules = paths.rules(rootfs, homes, own_terminals=uid is not None)
    # Its own entry only, which it looks into for threads that a warm-up left; a clone's rules have no such.
    rules.append(landlock.PathRule("/proc/self", landlock.READ))
    landlock.add_landlock(program, landlock_abi, rules, tcp=False)
    add_filter(program, _filter(guest_uids))
    return program


def _become(program: Program, uid: int) -> None:
    """Change user and keep, through execve, what setresuid and setresgid take."""
    kept = _SETUID | _SETGID
    caps.add_capset(program, effective=caps.permitted(), inheritable=kept)
    program.syscall("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0, step="keep capabilities over the change of user")
    program.syscall("setgroups", 0, 0, step="leave all groups")
    program.syscall("setresgid", uid, uid, uid, step="take a group of its own")
    program.syscall("setresuid", uid, uid, uid, step="take a user of its own")
    caps.add_capset(program, effective=kept | _SETPCAP, inheritable=kept)
    caps.add_ambient(program, kept)
    caps.add_bounding_drop(program)
    caps.add_capset(program, effective=kept, inheritable=kept)


def _filter(guest_uids: tuple[int, int]) -> bytes:
    first, count = guest_uids
    allowed: Rule = ALLOW
    for argument in (2, 1, 0):
        allowed = Branch(Match(argument, (first,), 0xFFFF_FFFF & ~(count - 1)), allowed, _EPERM)
    rules: dict[str, Rule] = dict.fromkeys(("setuid", "setgid", "setreuid", "setregid", "setfsuid", "setfsgid"), _EPERM)
    rules |= {"setresuid": allowed, "setresgid": allowed, "socket": _EPERM}
    rules["setgroups"] = Branch(Match(0, (0,)), ALLOW, _EPERM)
    numbers = table()
    return assemble(machine(), {numbers[name]: rule for name, rule in rules.items()}, ALLOW)
