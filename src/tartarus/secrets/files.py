"""Files that hold secrets or what opens them: read only where nobody else could have read or put them there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tartarus.durable import sync_directory
from tartarus.model.errors import InvalidRequest, SecretUnavailable


def read_private(path: Path, most_bytes: int) -> bytearray:
    """A file of the daemon's user or root that nobody else may touch. Raises SecretUnavailable; wipe what it gives."""
    try:
        # Not through a last link, and not waiting for whoever would write into a fifo.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise SecretUnavailable(
            f"{path} can't be read", why=error.strerror or "", fix="mend its path or mode"
        ) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in {0, os.geteuid()} or found.st_mode & 0o077:
            raise SecretUnavailable(
                f"{path} is not used", why="others than root and the daemon's user can read or change it",
                fix=f"chown it to the daemon's user, and chmod 0600 {path}",
            )  # fmt: skip
        if found.st_size > most_bytes:
            raise SecretUnavailable(f"{path} is larger than {most_bytes} bytes", fix="give the right file")
        content = bytearray(found.st_size + 1)
        size = 0
        while size < len(content) and (n := os.readv(fd, [memoryview(content)[size:]])) > 0:
            size += n
    finally:
        os.close(fd)
    if size > found.st_size:
        wipe(content)
        raise SecretUnavailable(f"{path} changed while it was read", fix="try again")
    del content[size:]
    return content


def wipe(content: bytearray) -> None:
    """Overwrite it."""
    content[:] = bytes(len(content))


def write_private(path: Path, content: bytes, *, exclusive: bool = False) -> None:
    """Put a file of mode 0600 in place, whole and on disk, or leave what was there.

    Raises InvalidRequest for one that is there already, where it must not be, and SecretUnavailable.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
            if exclusive:
                os.link(beside, path, follow_symlinks=False)
            else:
                beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        sync_directory(path.parent)
    except FileExistsError:
        raise InvalidRequest(f"{path} is there already", fix="use it, or choose another path") from None
    except OSError as error:
        raise SecretUnavailable(f"{path} can't be written", why=error.strerror or "") from None
