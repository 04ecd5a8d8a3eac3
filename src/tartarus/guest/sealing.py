"""Memory files that nobody can ever change again."""

from __future__ import annotations

import errno
import fcntl
import time

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def seal(fd: int, attempts: int) -> None:
    """Add the seals. The kernel answers EBUSY while it still holds references to pages just written; they pass.

    Raises OSError, with EBUSY when something still maps it for writing after so many `attempts`, a millisecond apart.
    """
    for _ in range(attempts - 1):
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.001)
        else:
            return
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
