"""Files that clients send ahead of what they are for: build contexts, archives, databases.

The daemon takes no path of the host from a client, which could name what only the daemon may read; it takes the bytes.
An upload is one file in the cache, known in memory only: it is used once, or removed an hour later, and a daemon that
starts removes whatever one that was killed has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import ClassVar

import msgspec

from tartarus.model.errors import InvalidRequest, NoSpace, TartarusError, UploadNotFound
from tartarus.model.ids import new_id
from tartarus.model.library import Upload

MAX_UPLOADS = 32
_WRITE_BYTES = 1024**2
# As much as a build leaves free: a host without any disk can't even write why.
_KEEP_FREE_BYTES = 512 * 1024**2
_KEEP_FREE_FRACTION = 0.03


class TooLarge(InvalidRequest):
    """The upload is larger than this daemon takes."""

    http_status: ClassVar[int] = 413


class _Stored(msgspec.Struct):
    tenant: str
    path: Path
    expires_at: float
    size_bytes: int = 0
    whole: bool = False


class Uploads:
    """One daemon's uploads below `root`, which is theirs alone. Sizes in bytes, `kept_s` in seconds.

    `most_bytes` bounds one upload, `tenant_bytes` all that one tenant has waiting.
    """

    def __init__(
        self, root: Path, *, most_bytes: int = 16 * 1024**3, tenant_bytes: int = 32 * 1024**3, kept_s: float = 3600.0
    ) -> None:
        self._root = root
        self._most = most_bytes
        self._tenant_most = tenant_bytes
        self._kept_s = kept_s
        self._stored: dict[str, _Stored] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def open(self) -> None:
        """Remove what an earlier daemon left. Raises TartarusError."""
        try:
            for path in self._root.iterdir():
                path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _explained(error) from error

    def close(self) -> None:
        """Remove every upload."""
        for upload_id in list(self._stored):
            stored = self._drop(upload_id)
            if stored is not None:
                stored.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not there, or not empty
            self._root.rmdir()

    async def put(self, tenant: str, chunks: AsyncIterable[bytes]) -> Upload:
        """Keep what `chunks` give. Nothing is kept when it ends early or is refused.

        Raises InvalidRequest for too many at once, TooLarge, NoSpace, and what `chunks` raises.
        """
        if sum(stored.tenant == tenant for stored in self._stored.values()) >= MAX_UPLOADS:
            raise InvalidRequest(
                f"{MAX_UPLOADS} uploads of yours are waiting to be used", fix="use or delete one first"
            )
        upload_id = new_id("upl")
        stored = _Stored(tenant, self._root / upload_id, time.time() + self._kept_s)
        self._stored[upload_id] = stored
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(stored.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                await self._receive(stored, file, chunks)
            finally:
                os.close(file)
        except OSError as error:
            await self._discard(upload_id)
            raise _explained(error) from error
        except BaseException:
            await self._discard(upload_id)
            raise
        stored.whole = True
        self._timers[upload_id] = asyncio.get_running_loop().call_later(self._kept_s, self._expire, upload_id)
        return Upload(id=upload_id, size_bytes=stored.size_bytes, expires_at=stored.expires_at)

    async def _receive(self, stored: _Stored, file: int, chunks: AsyncIterable[bytes]) -> None:
        held = bytearray()
        async for chunk in chunks:
            held += chunk
            # Counted before it is written: several uploads of one tenant may be on their way.
            stored.size_bytes += len(chunk)
            self._check_size(stored)
            if len(held) >= _WRITE_BYTES:
                await asyncio.to_thread(_write, file, bytes(held))
                held.clear()
        await asyncio.to_thread(_write, file, bytes(held))

    def _check_size(self, stored: _Stored) -> None:
        if stored.size_bytes > self._most:
            raise TooLarge(f"the upload is larger than {self._most} bytes", fix="leave out what is not needed")
        waiting = sum(other.size_bytes for other in self._stored.values() if other.tenant == stored.tenant)
        if waiting > self._tenant_most:
            raise TooLarge(
                f"your uploads that wait to be used are larger than {self._tenant_most} bytes",
                fix="use or delete one first",
            )

    @contextlib.asynccontextmanager
    async def claimed(self, tenant: str, upload_id: str) -> AsyncIterator[Path]:
        """The tenant's upload as a file, for as long as the context lasts; nobody gets it again.

        Raises UploadNotFound.
        """
        stored = self._whole(tenant, upload_id)
        self._drop(upload_id)
        try:
            yield stored.path
        finally:
            await _unlink(stored.path)

    async def remove(self, tenant: str, upload_id: str) -> None:
        """Remove the tenant's upload. Raises UploadNotFound."""
        self._whole(tenant, upload_id)
        await self._discard(upload_id)

    def _whole(self, tenant: str, upload_id: str) -> _Stored:
        stored = self._stored.get(upload_id)
        if stored is None or stored.tenant != tenant or not stored.whole:
            raise UploadNotFound(f"no upload {upload_id!r}", fix="each is used once: send it again")
        return stored

    def _drop(self, upload_id: str) -> _Stored | None:
        timer = self._timers.pop(upload_id, None)
        if timer is not None:
            timer.cancel()
        return self._stored.pop(upload_id, None)

    async def _discard(self, upload_id: str) -> None:
        stored = self._drop(upload_id)
        if stored is not None:
            await _unlink(stored.path)

    def _expire(self, upload_id: str) -> None:
        stored = self._drop(upload_id)
        if stored is not None:
            asyncio.get_running_loop().run_in_executor(None, stored.path.unlink)


async def _unlink(path: Path) -> None:
    """In a thread, since a file system may take long to free a large file; to the end, whoever is cancelled."""
    await asyncio.shield(asyncio.to_thread(path.unlink, missing_ok=True))


def _write(file: int, data: bytes) -> None:
    space = os.fstatvfs(file)
    free, whole = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    if free - len(data) < min(_KEEP_FREE_BYTES, whole * _KEEP_FREE_FRACTION):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _explained(error: OSError) -> TartarusError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace("no space left for the upload", why=str(error), fix="free some disk, or move TARTARUS_HOME")
    return TartarusError("the upload can't be kept", why=str(error))
