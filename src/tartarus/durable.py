"""Files that are on disk, and whole, when a call returns: what every store stands on, whatever it keeps."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Put a small file of mode 0600 there in one step, on disk; its directory is the caller's to sync.

    Until then the old one stands. A kill leaves at most one file beside it, `.NAME.new`, which the next write takes.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "wb", opener=private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)


def sync_directory(place: Path) -> None:
    """Make the names in `place` durable."""
    file = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def private(path: str, flags: int) -> int:
    """For `open`: follows no link at the end, and makes files for their owner alone."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
