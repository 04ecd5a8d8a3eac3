"""Runs a program as if the kernel lacked some system calls, or as if Landlock hid /proc.

Usage: without.py CALLS PROGRAM [ARGUMENT]..., with CALLS such as `splice,close_range`; `proc` among
them hides /proc. The confinement is built by hand, so that this tests the agent and nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from tartarus.guest.syscalls import number

LIBC = ctypes.CDLL(None, use_errno=True)
LOAD_NR, IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2
READ_FILE, READ_DIR = 1 << 2, 1 << 3
RULE_PATH_BENEATH = 1


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "call failed")
    return result


def refuse(calls: list[str]) -> None:
    """ENOSYS for these calls from now on."""
    code = struct.pack("<HBBI", LOAD_NR, 0, 0, 0)
    for name in calls:
        code += struct.pack("<HBBI", IF_EQUAL, 0, 1, number(name))
        code += struct.pack("<HBBI", RETURN, 0, 0, ERRNO | errno.ENOSYS)
    code += struct.pack("<HBBI", RETURN, 0, 0, ALLOW)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(held))
    check(LIBC.prctl(PR_SET_SECCOMP, FILTER, program, 0, 0))


def hide_proc() -> None:
    """Only what lies in the other top directories can be read."""
    attribute = struct.pack("<Q", READ_FILE | READ_DIR)
    ruleset = check(LIBC.syscall(number("landlock_create_ruleset"), attribute, len(attribute), 0))
    for name in os.listdir("/"):
        path = os.path.join("/", name)
        if name != "proc" and os.path.isdir(path):
            parent = os.open(path, os.O_PATH)
            rule = struct.pack("<Qi", READ_FILE | READ_DIR, parent)
            check(LIBC.syscall(number("landlock_add_rule"), ruleset, RULE_PATH_BENEATH, rule, 0))
            os.close(parent)
    check(LIBC.syscall(number("landlock_restrict_self"), ruleset, 0))
    os.close(ruleset)


def main() -> None:
    calls = sys.argv[1].split(",")
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if "proc" in calls:
        calls.remove("proc")
        hide_proc()
    refuse(calls)
    os.execv(sys.argv[2], sys.argv[2:])


main()
