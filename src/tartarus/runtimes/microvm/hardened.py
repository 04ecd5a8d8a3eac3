"""How a machine's own kernel is hardened: words of its command line, and what its programs do before they start.

The settings that cost nothing, all machines get: here, and as sysctls by the agent's init (`harden.c`). Those that
cost time are had by asking (`hardened_kernel`), and a lockdown too. docs/hardening.md has what each costs.
"""

from __future__ import annotations

from typing import Final

from tartarus.guest.program import Program
from tartarus.model.security import CAPABILITIES, Lockdown
from tartarus.model.template import RunAs
from tartarus.runtimes.confine import caps
from tartarus.runtimes.confine.seccomp import add_filter, profile_filter
from tartarus.runtimes.hardening import Hardening

COMMAND_LINE: Final = "vsyscall=none debugfs=off randomize_kstack_offset=on"
"""Words for every machine: no code at a fixed address, no windows for developers, another stack at each call."""
_COSTLY: Final = "init_on_alloc=1 init_on_free=1 slab_nomerge page_alloc.shuffle=1 tartarus.hardened=yes"
"""Memory is cleared when it is given and when it is taken back, and lies where nobody can tell."""
_EVERY: Final = (1 << len(CAPABILITIES)) - 1
_PR_SET_NO_NEW_PRIVS = 38


def words(hardening: Hardening) -> str:
    """What the command line has besides, for a machine that is hardened so."""
    found = [_COSTLY] if hardening.hardened_kernel else []
    if hardening.lockdown is not Lockdown.NONE:
        found.append(f"lockdown={hardening.lockdown.value}")
    return " ".join(found)


def program_of(hardening: Hardening, user: RunAs) -> bytes:
    """What each program of the sandbox does to itself, in its user's stead, before it is executed; empty for nothing.

    The agent is outside of it: it stays the machine's own root.
    """
    if not (hardening.dropped or hardening.added or hardening.filters):
        return b""
    program = Program()
    kept = _EVERY & ~hardening.dropped if user.uid == 0 else hardening.added
    if user.uid:
        caps.add_bounding_drop(program, kept=kept)
        caps.add_user(program, user)
        caps.add_capset(program, effective=kept, inheritable=kept)
    else:
        caps.add_user(program, user)
        caps.add_bounding_limit(program, kept)
        caps.add_capset(program, effective=kept)
    program.syscall("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, step="set no_new_privs")
    if hardening.filters:
        add_filter(program, profile_filter(hardening))
    return program.encode()
