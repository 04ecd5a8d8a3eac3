"""What a set says of itself: its manifest, whose digest is the set's, and for each file a map of what it holds.

A file is cut into groups of 64 KiB. Its map names each group that is not all zeros, by number and SHA-256; a file's
digest is over its size and its map, so that checking a file of many gigabytes reads only what it holds. Every number
in here may come from a foreign file: all of them have caps.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from tartarus.model.errors import InvalidRequest, SnapshotRefused
from tartarus.model.sandbox import Resources

FORMAT = 1
GROUP = 64 * 1024
"""Bytes that are kept, compressed and found again together: 16 pages."""
MAX_FILES = 16
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_FILE_BYTES = 2**40
MAX_DATA_BYTES = 256 * 1024**3
MAP_ENTRY = struct.Struct(">I32s")
_MAX_NEEDS = 64
_MAX_TEXT = 4096
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_SIZE = struct.Struct(">Q")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known to let a saved guest go on.

    `needs`: as `runtimes.base.Saved` has it. `offer`: what it was made of, as the node encodes it. `session`: what its
    agent and its host had open, if anything. `details`: whatever else who saved it wants to find again.
    """

    isolation: str
    needs: dict[str, str]
    offer: dict[str, Any]
    resources: Resources
    session: dict[str, Any] | None = None
    details: dict[str, Any] = {}


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: its name, its size in bytes, how many groups of it hold something, and its digest (hex)."""

    name: str
    size: int
    groups: int
    digest: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The set. `created_at` is Unix seconds."""

    format: int
    created_at: float
    facts: Facts
    files: tuple[FileEntry, ...]

    def encode(self) -> bytes:
        """As it is written; its SHA-256 is the set's digest."""
        content = msgspec.json.encode(self)
        if len(content) > MAX_MANIFEST_BYTES:
            raise SnapshotRefused(
                "the sandbox's memory can't be kept", why=f"what must be known of it exceeds {MAX_MANIFEST_BYTES} bytes"
            )
        return content

    @property
    def data_bytes(self) -> int:
        """Bytes of all groups that hold something."""
        return sum(entry.groups for entry in self.files) * GROUP


def digest_of(content: bytes) -> str:
    """The digest of a set, from its manifest's bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def decode(content: bytes, digest: str | None = None) -> Manifest:
    """A manifest that is believable. Raises SnapshotRefused, also when it has another digest than `digest`."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise damaged(f"its manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    if digest is not None and digest_of(content) != digest:
        raise damaged("its manifest is not the one that was written")
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != FORMAT:
            raise SnapshotRefused(
                "the memory snapshot can't be used here",
                why=f"it is of format {version}, and this Tartarus knows {FORMAT}",
                fix="use the version that made it, or take it anew",
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, InvalidRequest) as error:
        raise damaged(f"its manifest can't be read: {error}") from error
    _check(manifest)
    return manifest


def file_digest(size: int, content_map: bytes) -> str:
    """A file's digest, from its size and its map."""
    return hashlib.sha256(_SIZE.pack(size) + content_map).hexdigest()


def entries_of(content_map: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, SHA-256) of each group in a map."""
    yield from MAP_ENTRY.iter_unpack(content_map)


def check_map(entry: FileEntry, content_map: bytes) -> None:
    """Raise SnapshotRefused unless that map is the file's: in order, within it, and of the digest in the manifest."""
    if len(content_map) != entry.groups * MAP_ENTRY.size or file_digest(entry.size, content_map) != entry.digest:
        raise damaged(f"the map of {entry.name} is not the one that was written")
    last, end = -1, -(-entry.size // GROUP)
    for number, _ in entries_of(content_map):
        if not last < number < end:
            raise damaged(f"the map of {entry.name} is out of order")
        last = number


def group_size(entry: FileEntry, number: int) -> int:
    """Bytes in that group of the file: the last may be shorter."""
    return min(GROUP, entry.size - number * GROUP)


def check_name(name: str) -> str:
    """A name that a set's file may have: of one plain part. Raises SnapshotRefused."""
    if not _NAME.fullmatch(name):
        raise damaged(f"{name[:80]!r} is no name of a file in it")
    return name


def damaged(why: str) -> SnapshotRefused:
    """Refuse a set that is not what was written."""
    return SnapshotRefused(
        "the memory snapshot is damaged; nothing was started", why=why, fix="use another snapshot, or take it anew"
    )


class _Version(msgspec.Struct):
    format: int


def _check(manifest: Manifest) -> None:
    names = [check_name(entry.name) for entry in manifest.files]
    if not 0 < len(names) <= MAX_FILES or len(set(names)) != len(names):
        raise damaged(f"it has {len(names)} files, or two of one name")
    for entry in manifest.files:
        if not 0 <= entry.size <= MAX_FILE_BYTES or not 0 <= entry.groups <= -(-entry.size // GROUP):
            raise damaged(f"the size of {entry.name} is impossible")
    if manifest.data_bytes > MAX_DATA_BYTES:
        raise damaged(f"it holds more than {MAX_DATA_BYTES} bytes")
    needs = manifest.facts.needs
    if len(needs) > _MAX_NEEDS or any(len(key) + len(value) > _MAX_TEXT for key, value in needs.items()):
        raise damaged("what it needs of its host is too long")
