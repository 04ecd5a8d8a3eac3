"""Files that are written whole or not at all, and read whole or refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from tartarus.model.errors import FileFailed, InvalidRequest


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """A file to write into, for its owner's eyes alone; removed again if the context ends with an error.

    Raises InvalidRequest when there is a file of that name, and FileFailed when it can't be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InvalidRequest(f"there is a file {path!r} already", fix="choose another name, or remove it") from None
    except OSError as error:
        raise FileFailed(f"can't write {path}", why=error.strerror or str(error)) from error
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise FileFailed(f"can't write {path}", why=error.strerror or str(error)) from error
        raise


def read_whole(path: str, most: int) -> bytes:
    """All of a file of at most so many bytes. Raises FileFailed and InvalidRequest."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise FileFailed(f"can't read {path}", why=error.strerror or str(error)) from error
    if len(data) > most:
        raise InvalidRequest(f"{path} is larger than {most} bytes", fix="is it the right file?")
    return data
