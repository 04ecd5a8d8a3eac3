"""What all runtimes do with descriptors."""

from __future__ import annotations

import os
from collections.abc import Iterable


def close_all(fds: Iterable[int]) -> None:
    """Close them."""
    for fd in fds:
        os.close(fd)
