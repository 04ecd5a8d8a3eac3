"""A session keyring of the guest's own, so that it does not hold the keys of whoever started the daemon.

Keyrings are not namespaced and survive setuid and execve. The filter refuses the keyring calls, but the
kernel also searches the session keyring on a process's behalf (network file systems, fscrypt). The new
ring stays empty, counts against the user's quota (200 for most) and is freed with its last process.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tartarus.guest.program import Program

_KEYCTL_JOIN_SESSION_KEYRING = 1


def add_keyring(program: Program) -> None:
    """Join a new, empty, nameless session keyring; nothing to do on kernels without keyrings."""
    program.syscall("keyctl", _KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0, step="take a session keyring", ok=errno.ENOSYS)
