"""The files below the blob store: locked while they grow, hashed as they are written, renamed when on disk."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from tartarus.durable import sync_directory
from tartarus.model.errors import NoSpace, TemplateFailed

_REREAD_BYTES = 1024**2
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Sink:
    """A partial file that is open and locked; it knows the digest of what is in it."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self.offset = 0
        self.file = file
        self._hash = hashlib.sha256()

    def resume(self, size: int) -> bool:
        """Continue what is in the file, if that is not more than `size` bytes; whether there was anything."""
        if os.fstat(self.file).st_size > size:
            self.restart()
        self._hash = hashlib.sha256()
        os.lseek(self.file, 0, os.SEEK_SET)
        self.offset = 0
        while chunk := os.read(self.file, _REREAD_BYTES):
            self._hash.update(chunk)
            self.offset += len(chunk)
        return self.offset > 0

    def restart(self) -> None:
        """Forget everything written."""
        os.ftruncate(self.file, 0)
        os.lseek(self.file, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self.offset = 0

    def write(self, chunks: list[bytes]) -> None:
        """Append; large chunks are hashed and written without the interpreter's lock."""
        for chunk in chunks if len(chunks) == 1 else [b"".join(chunks)]:
            self._hash.update(chunk)
            rest = memoryview(chunk)
            while rest:
                written = os.write(self.file, rest)
                rest = rest[written:]
            self.offset += len(chunk)

    def digest(self) -> str:
        """Of what has been written."""
        return f"sha256:{self._hash.hexdigest()}"

    def finish(self, blobs: Path) -> None:
        """Put it on disk, then in its place, both durable."""
        os.fsync(self.file)
        os.rename(self.path, blobs / self._hash.hexdigest())
        # Not before: were we killed in between, nobody but root could go on with a partial file that is read-only.
        os.fchmod(self.file, 0o400)
        sync_directory(blobs)

    def discard(self) -> None:
        """Remove the file: it can't be continued, or its space is needed."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_now(path: Path, *, make: bool = True) -> Iterator[int | None]:
    """Hold the lock of the file at `path` (yields it), or find that another has it, or it is gone (yields None)."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    try:
        file = os.open(path, flags, 0o600)
    except FileNotFoundError:
        if make:
            raise
        yield None
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # Its holder before us may have renamed or removed it; a newcomer may hold its successor.
        yield file if _is_still(path, file) else None
    finally:
        os.close(file)


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def disk(what: str) -> Iterator[None]:
    """Turn an OSError into NoSpace or TemplateFailed that says what could not be done."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace(
                f"no space left to {what}", why=str(error), fix="free some disk, or move TARTARUS_HOME"
            ) from error
        raise TemplateFailed(f"can't {what}", why=str(error)) from error


async def in_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run blocking work in a thread and wait for its end, cancelled or not: it uses files that we are to close.

    asyncio's own to_thread leaves the thread alone when the waiter is cancelled, and anyio's when it is asyncio
    that cancels.
    """
    future = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: nobody is left to be told
        raise
