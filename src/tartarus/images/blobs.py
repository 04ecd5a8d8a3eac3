"""Blobs by digest: each downloaded once, whole and verified or not at all, whoever asks and whatever is killed.

A blob grows in a partial file and is renamed when its size and digest are right and it is on disk. The partial
file is locked while somebody writes to it; whoever else wants the digest waits and then finds it done. What a
killed process left of it is continued by the next one.

Whoever can name a digest can have its content: a store is shared by those who may see one another's images, so
tenants have a store each. (A manifest may list the digest of somebody else's private layer; a store that has
the layer already would not ask the registry to show it.)
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tartarus.durable import sync_directory
from tartarus.images.blobfiles import Sink, disk, in_thread, locked_now
from tartarus.images.holds import Holds
from tartarus.images.oci import Descriptor
from tartarus.images.reference import is_digest
from tartarus.model.errors import ImageNotFound, ImageRefused

GRACE_S = 3600.0
"""How old a blob that nobody holds must be before `collect` removes it: longer than from a pull to its `hold`."""
PARTIAL_KEPT_S = 86400.0
"""How long an interrupted download waits to be continued."""
# flock(2) reports no readiness to wait for; this is how often a second asker looks while the first downloads.
_LOOK_EVERY_S = 0.02
# Handed to a worker thread in one go: large enough that the hop costs nothing beside hashing and writing.
_BATCH_BYTES = 1024**2
_DRAFT = "draft-"
_TRASH = "trash-"
_COLLECTOR = "collector"

Fetch = Callable[[int], AsyncGenerator[bytes, None]]
"""Gives a blob's bytes from an offset on; may be asked twice."""
OnBytes = Callable[[int], None]
"""Told how many bytes of a blob are there."""


def _ignore(_bytes: int) -> None:
    pass


class BlobStore:
    """Files under `root`, each named by the SHA-256 of its content. Methods that are not async block for disk."""

    def __init__(self, root: Path) -> None:
        """Open the store, make it if it is new, and remove what killed processes left of their drafts."""
        self._blobs = root / "sha256"
        self._partial = root / "partial"
        with disk(f"open the blob store {root}"):
            for place in (self._blobs, self._partial):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._holds = Holds(root / "holds")
            self._remove_drafts()

    def find(self, digest: str) -> Path | None:
        """The blob's file, marked as used now, or None."""
        place = self._blobs / _name(digest)
        try:
            os.utime(place)
        except FileNotFoundError:
            return None
        return place

    def open(self, digest: str) -> BinaryIO:
        """The blob, for reading; it stays readable if it is collected meanwhile. Raises ImageNotFound."""
        self.find(digest)
        try:
            return open(self._blobs / _name(digest), "rb", buffering=0)
        except FileNotFoundError:
            raise ImageNotFound(f"blob {digest} is not in the store", fix="pull the image again") from None

    def read(self, digest: str, at_most: int) -> bytes:
        """A small blob's content. Raises ImageNotFound, and ImageRefused if it is longer than `at_most` bytes."""
        with self.open(digest) as file:
            content = file.read(at_most + 1)
        if len(content) > at_most:
            raise ImageRefused(f"blob {digest} is too large", why=f"at most {at_most} bytes are taken here")
        return content

    async def ingest(self, descriptor: Descriptor, fetch: Fetch, on_bytes: OnBytes = _ignore) -> Path:
        """The blob's file; `fetch` brings it if nobody has, from where an earlier attempt ended.

        Raises what `fetch` raises, ImageRefused when the content is not what the descriptor says, NoSpace when
        the disk is full.
        """
        partial = self._partial / _name(descriptor.digest)
        while True:
            found = self.find(descriptor.digest)
            if found is not None:
                return self._of_size(found, descriptor, on_bytes)
            with disk("write to the blob store"), locked_now(partial) as file:
                if file is not None and self.find(descriptor.digest) is None:
                    return await self._fill(Sink(partial, file), descriptor, fetch, on_bytes)
                if file is not None:  # its last writer finished between our two looks; we made the file anew
                    partial.unlink()
                    continue
            on_bytes(_size(partial))
            await asyncio.sleep(_LOOK_EVERY_S)

    @staticmethod
    def _of_size(found: Path, descriptor: Descriptor, on_bytes: OnBytes) -> Path:
        if found.stat().st_size != descriptor.size:
            raise ImageRefused(
                f"blob {descriptor.digest} is not {descriptor.size} bytes long",
                why=f"the content of that digest has {found.stat().st_size} bytes",
            )
        on_bytes(descriptor.size)
        return found

    async def _fill(self, sink: Sink, descriptor: Descriptor, fetch: Fetch, on_bytes: OnBytes) -> Path:
        resumed = await in_thread(sink.resume, descriptor.size)
        try:
            await self._copy(sink, descriptor, fetch, on_bytes)
            if resumed and sink.digest() != descriptor.digest:
                # What an earlier attempt left was bad: another registry's, or cut by a power failure.
                sink.restart()
                await self._copy(sink, descriptor, fetch, on_bytes)
            if sink.digest() != descriptor.digest:
                raise ImageRefused(
                    f"blob {descriptor.digest} has other content than its digest says",
                    why=f"what came has the digest {sink.digest()}",
                    fix="the registry or archive is damaged or dishonest; don't trust the image",
                )
            await in_thread(sink.finish, self._blobs)
        except (ImageRefused, OSError):
            sink.discard()
            raise
        return self._blobs / _name(descriptor.digest)

    @staticmethod
    async def _copy(sink: Sink, descriptor: Descriptor, fetch: Fetch, on_bytes: OnBytes) -> None:
        on_bytes(sink.offset)
        if sink.offset < descriptor.size:
            batch: list[bytes] = []
            waiting = 0
            async with contextlib.aclosing(fetch(sink.offset)) as chunks:
                try:
                    async for chunk in chunks:
                        batch.append(chunk)
                        waiting += len(chunk)
                        if sink.offset + waiting > descriptor.size:
                            batch.clear()
                            raise ImageRefused(f"blob {descriptor.digest} is longer than its {descriptor.size} bytes")
                        if waiting >= _BATCH_BYTES:
                            whole, batch, waiting = batch, [], 0
                            await in_thread(sink.write, whole)
                            on_bytes(sink.offset)
                finally:
                    # Cancelled or broken off: what came is kept, so that the next attempt begins there.
                    sink.write(batch)
            on_bytes(sink.offset)
        if sink.offset < descriptor.size:
            raise ImageRefused(
                f"blob {descriptor.digest} is shorter than its {descriptor.size} bytes", why=f"{sink.offset} came"
            )

    async def put_bytes(self, content: bytes, media_type: str = "application/octet-stream") -> Descriptor:
        """Store `content`; returns its descriptor."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        descriptor = Descriptor(media_type, digest, len(content))

        async def whole(offset: int) -> AsyncGenerator[bytes, None]:
            yield content[offset:]

        await self.ingest(descriptor, whole)
        return descriptor

    @contextlib.contextmanager
    def draft(self) -> Iterator[Draft]:
        """A file to be filled whose digest is known only at the end; gone unless committed. For worker threads."""
        while True:
            path = self._partial / f"{_DRAFT}{secrets.token_hex(8)}"
            with disk("write to the blob store"), locked_now(path) as file:
                if file is None:  # another process opened the store in this instant and cleaned up
                    continue
                try:
                    yield Draft(Sink(path, file), self._blobs)
                finally:
                    path.unlink(missing_ok=True)
                return

    def hold(self, owner: str, digests: Iterable[str]) -> None:
        """Keep these blobs, beside what `owner` keeps already, until it releases them. Survives restarts.

        Raises ImageNotFound, and keeps none of them, when one is not there.
        """
        wanted = sorted({f"sha256:{_name(digest)}" for digest in digests})
        before = self._holds.add(owner, wanted)
        # After the record is on disk, not before: a collector that has not read it sees these as used just now.
        missing = [digest for digest in wanted if self.find(digest) is None]
        if missing:
            self._holds.set(owner, before)
            raise ImageNotFound(f"blob {missing[0]} is not in the store", fix="pull the image again")

    def release(self, owner: str) -> None:
        """Keep nothing for `owner` any more."""
        self._holds.set(owner, ())

    def held(self) -> dict[str, tuple[str, ...]]:
        """The digests that each owner holds."""
        return self._holds.all()

    def collect(self, grace_s: float = GRACE_S, partial_kept_s: float = PARTIAL_KEPT_S) -> list[str]:
        """Remove blobs that nobody holds and nobody used for `grace_s`, and downloads given up for `partial_kept_s`.

        Returns the digests of the blobs removed: none if another process is at it.
        """
        with disk("clean up the blob store"), locked_now(self._partial / _COLLECTOR) as alone:
            return self._collect(grace_s, partial_kept_s) if alone is not None else []

    def _collect(self, grace_s: float, partial_kept_s: float) -> list[str]:
        self._remove_drafts()
        for place in self._partial.glob(f"{_TRASH}*"):  # of a collector that was killed
            place.unlink()
        held = {digest for digests in self._holds.all().values() for digest in digests}
        removed = [
            f"sha256:{place.name}"
            for place in self._blobs.iterdir()
            if f"sha256:{place.name}" not in held and self._remove_unused(place, time.time() - grace_s)
        ]
        for place in self._partial.iterdir():
            if is_digest(f"sha256:{place.name}"):
                _remove_abandoned(place, time.time() - partial_kept_s)
        sync_directory(self._blobs)
        return removed

    def _remove_unused(self, place: Path, before: float) -> bool:
        if place.stat().st_mtime > before:
            return False
        # Out of reach first, then a second look: who found it in between has left a newer time on it.
        trash = self._partial / f"{_TRASH}{place.name}"
        place.rename(trash)
        if trash.stat().st_mtime > before:
            trash.rename(place)
            return False
        trash.unlink()
        return True

    def _remove_drafts(self) -> None:
        for place in self._partial.glob(f"{_DRAFT}*"):
            _remove_abandoned(place, time.time() + 1)


class Draft:
    """A blob in the making. `path` can be read while it grows."""

    def __init__(self, sink: Sink, blobs: Path) -> None:
        self._sink = sink
        self._blobs = blobs
        self.path = sink.path

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._sink.offset

    def write(self, chunk: bytes) -> int:
        """Add to the end. Raises NoSpace when the disk is full."""
        with disk("write to the blob store"):
            self._sink.write([chunk])
        return len(chunk)

    def fileno(self) -> int:
        """The open file, for another process to write to; `reread` when it has."""
        return self._sink.file

    def reread(self) -> None:
        """Take what is in the file now for what was written: its digest is of that."""
        with disk("read the blob store"):
            self._sink.resume(2**63)

    def commit(self, media_type: str) -> Descriptor:
        """Make it a blob of the store; returns its descriptor."""
        descriptor = Descriptor(media_type, self._sink.digest(), self._sink.offset)
        with disk("write to the blob store"):
            self._sink.finish(self._blobs)
        return descriptor


def _name(digest: str) -> str:
    if not is_digest(digest):
        raise ImageRefused(f"{digest[:100]!r} is not a digest that is taken", why="only sha256 is")
    return digest.removeprefix("sha256:")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove_abandoned(place: Path, before: float) -> None:
    """Remove a partial file that nobody writes to and that was last written before that time."""
    with locked_now(place, make=False) as file:
        if file is not None and os.fstat(file).st_mtime < before:
            place.unlink(missing_ok=True)
