"""Kernel keyrings: a sandbox starts with an empty one, and its filter keeps it from every call on keys.

Without this a guest would hold (though never reach) the session keyring of whoever started the daemon.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

from tartarus.guest.syscalls import number

if TYPE_CHECKING:
    from tartarus.guest.program import Program

_KEYCTL_GET_KEYRING_ID, _KEYCTL_JOIN_SESSION_KEYRING = 0, 1
_KEY_SPEC_SESSION_KEYRING = -3


@cache
def available() -> bool:
    """Whether this process may use keyrings: a kernel may lack them, and container engines refuse the call."""
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(number("keyctl"), _KEYCTL_GET_KEYRING_ID, _KEY_SPEC_SESSION_KEYRING, 0)) >= 0


def add_keyring(program: Program, *, usable: bool | None = None) -> None:
    """Join a new, empty, nameless session keyring; nothing where keyrings can't be used at all."""
    if usable if usable is not None else available():
        program.syscall("keyctl", _KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0, step="take a session keyring")
