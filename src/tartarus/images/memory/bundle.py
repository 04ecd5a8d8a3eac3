"""A set as one file, to keep elsewhere or to take to another host: sealed by the host that wrote it.

Who could make up a set could make up the state of a monitor's devices, which no monitor is proof against: only what
this host, or one whose key its administrator has put beside its own, has sealed is read at all.

Layout, numbers big-endian: magic, 8 bytes of the key's id, u32 length and the manifest, each file's map in the
manifest's order, then for each group that was not named before u32 length and its zstd frame; 32 bytes of HMAC-SHA256
over all that comes before.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import zstandard

from tartarus.durable import sync_directory, write_whole
from tartarus.images.memory import files
from tartarus.images.memory.manifest import (
    MAP_ENTRY,
    MAX_MANIFEST_BYTES,
    FileEntry,
    check_map,
    damaged,
    decode,
    entries_of,
    group_size,
)
from tartarus.images.memory.packs import MAX_FRAME, Packs, unpacked
from tartarus.images.memory.sparse import read_group
from tartarus.model.errors import SnapshotRefused

_MAGIC = b"TARTMEM1"
_KEY_BYTES = 32
_ID_BYTES = 8
_MAC_BYTES = 32
_LENGTH = struct.Struct(">I")
_PIECE_BYTES = 1024 * 1024
_LEVEL = 1


class Seals:
    """The keys below `place`: ``host.key``, made when it is first needed, and others' that are trusted, ``*.key``."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def own(self) -> bytes:
        """This host's key."""
        path = self._place / "host.key"
        if not path.exists():
            self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, os.urandom(_KEY_BYTES))
            sync_directory(self._place)
        return _key(path)

    def find(self, key_id: bytes) -> bytes:
        """The trusted key of that id. Raises SnapshotRefused."""
        for path in [self._place / "host.key", *self._place.glob("*.key")]:
            if path.is_file() and id_of(key := _key(path)) == key_id:
                return key
        raise SnapshotRefused(
            "the file was not sealed by a host that is trusted here",
            why="memory from elsewhere could take a sandbox's monitor over",
            fix=f"have the administrator copy the other host's snapshot-keys/host.key to {self._place}/NAME.key",
        )


def id_of(key: bytes) -> bytes:
    """What names a key and tells nothing of it."""
    return hashlib.sha256(b"tartarus-memory-key" + key).digest()[:_ID_BYTES]


def write(found: files.StoredSet, seals: Seals) -> Iterator[bytes]:
    """The set, whose files lie there verified, as pieces of about a megabyte."""
    key = seals.own()
    mac = hmac.new(key, digestmod=hashlib.sha256)
    held = bytearray()
    for part in _parts(found, id_of(key)):
        mac.update(part)
        held += part
        if len(held) >= _PIECE_BYTES:
            yield bytes(held)
            held.clear()
    yield bytes(held) + mac.digest()


def _parts(found: files.StoredSet, key_id: bytes) -> Iterator[bytes]:
    manifest = found.manifest.encode()
    yield _MAGIC + key_id + _LENGTH.pack(len(manifest)) + manifest
    for entry in found.manifest.files:
        yield found.map_of(entry.name)
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    named: set[bytes] = set()
    with ExitStack() as opened:
        for entry in found.manifest.files:
            fd = opened.enter_context(files.opened(found.place / files.RAW / entry.name))
            for number, digest in entries_of(found.map_of(entry.name)):
                if digest not in named:
                    named.add(digest)
                    frame = compressor.compress(read_group(fd, number, group_size(entry, number)))
                    yield _LENGTH.pack(len(frame)) + frame


def read(path: Path, staging: Path, packs: Packs, seals: Seals) -> bytes:
    """Write the set in that file into an empty directory and a pack; its manifest's bytes.

    The file is opened once: what was verified is what is read. Raises SnapshotRefused; who made `staging` removes it.
    """
    with files.opened(path) as fd:
        end = _verify(fd, seals)
        content, maps, at = _head(fd, end)
        manifest = decode(content)
        (staging / files.MAPS).mkdir(mode=0o700)
        for entry in manifest.files:
            write_whole(staging / files.MAPS / entry.name, maps[entry.name])

        def unpack(piece: tuple[bytes, int, int, int]) -> tuple[bytes, bytes]:
            digest, offset, length, size = piece
            group = unpacked(os.pread(fd, length, offset), digest)
            if len(group) != size:
                raise damaged("a group of its pages has another size")
            return digest, group

        name = os.urandom(8).hex()
        made = packs.write(name, _frames(fd, at, end, manifest.files, maps), unpack)
    write_whole(staging / files.PACKED, msgspec.json.encode([name] if made else []))
    write_whole(staging / files.MANIFEST, content)
    for directory in (staging / files.MAPS, staging):
        sync_directory(directory)
    return content


def _verify(fd: int, seals: Seals) -> int:
    """Check the seal of the whole file; where its content ends."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise damaged("it is no file")
    end = os.fstat(fd).st_size - _MAC_BYTES
    start = len(_MAGIC) + _ID_BYTES
    head = os.pread(fd, start, 0)
    if end < start or head[: len(_MAGIC)] != _MAGIC:
        raise SnapshotRefused("the file is no memory snapshot", fix="give one that tartarus snapshot export wrote")
    mac = hmac.new(seals.find(head[len(_MAGIC) :]), digestmod=hashlib.sha256)
    at = 0
    while at < end:
        piece = os.pread(fd, min(_PIECE_BYTES, end - at), at)
        if not piece:
            raise damaged("the file became shorter while it was read")
        mac.update(piece)
        at += len(piece)
    if not hmac.compare_digest(mac.digest(), os.pread(fd, _MAC_BYTES, end)):
        raise damaged("its seal does not fit: it was changed, or cut off")
    return end


def _head(fd: int, end: int) -> tuple[bytes, dict[str, bytes], int]:
    """The manifest's bytes, the maps, and where the frames begin."""
    at = len(_MAGIC) + _ID_BYTES
    (length,) = _LENGTH.unpack(_take(fd, at, _LENGTH.size, end))
    if length > MAX_MANIFEST_BYTES:
        raise damaged(f"its manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    at += _LENGTH.size
    content = _take(fd, at, length, end)
    at += length
    maps = {}
    for entry in decode(content).files:
        size = entry.groups * MAP_ENTRY.size
        maps[entry.name] = _take(fd, at, size, end)
        check_map(entry, maps[entry.name])
        at += size
    return content, maps, at


def _frames(
    fd: int, at: int, end: int, entries: tuple[FileEntry, ...], maps: dict[str, bytes]
) -> Iterator[tuple[bytes, int, int, int]]:
    """(digest, offset, length, size of the group) of each frame."""
    named: set[bytes] = set()
    for entry in entries:
        for number, digest in entries_of(maps[entry.name]):
            if digest in named:
                continue
            named.add(digest)
            (length,) = _LENGTH.unpack(_take(fd, at, _LENGTH.size, end))
            at += _LENGTH.size
            if not 0 < length <= MAX_FRAME or at + length > end:
                raise damaged("a group of its pages has an impossible length")
            yield digest, at, length, group_size(entry, number)
            at += length
    if at != end:
        raise damaged("there is more in the file than belongs to it")


def _take(fd: int, at: int, size: int, end: int) -> bytes:
    content = os.pread(fd, size, at) if at + size <= end else b""
    if len(content) != size:
        raise damaged("the file is cut off")
    return content


def _key(path: Path) -> bytes:
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise SnapshotRefused(f"the key {path} is damaged", why=f"it does not have {_KEY_BYTES} bytes", fix="remove it")
    return key
