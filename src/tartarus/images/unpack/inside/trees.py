"""Layer directories, walked in one fixed order: each entry once, digested as it passes.

The walk takes nothing for granted: what a guest left may be changed while it is read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Any

from tartarus.images.unpack.inside.cursor import DIRECTORY, Parts
from tartarus.images.unpack.inside.extract import OPAQUE
from tartarus.images.unpack.inside.refusal import Refused, shown
from tartarus.images.unpack.limits import Limits

Xattrs = dict[str, bytes]
Sink = Callable[[bytes, int], None]
"""Called with (data, offset) for what is not a hole."""
_OVERLAY = "user.overlay."
# Overlayfs's own notes on where an upper directory's files came from; they mean nothing in a lower layer. What a
# guest calls user.overlay.x itself is user.overlay.overlay.x here, and would steer the overlay once unescaped.
_BOOKS = (_OVERLAY + "origin", _OVERLAY + "impure", _OVERLAY + "nlink", _OVERLAY + "upper", _OVERLAY + "uuid",
          _OVERLAY + "protattr", _OVERLAY + _OVERLAY.removeprefix("user."))  # fmt: skip
_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)
_FIELD = struct.Struct(">Q")


class Entry:
    """Something in a tree: its path from the root, its directory's descriptor, its status."""

    __slots__ = ("directory", "name", "parts", "status")

    def __init__(self, directory: int, parts: Parts, status: os.stat_result) -> None:
        self.directory = directory
        self.parts = parts
        self.name = parts[-1] if parts else b"."
        self.status = status

    @property
    def path(self) -> str:
        """For messages."""
        return shown(b"/" + b"/".join(self.parts))

    @property
    def is_whiteout(self) -> bool:
        """Whether it marks something as deleted."""
        return stat.S_ISCHR(self.status.st_mode) and self.status.st_rdev == 0


class Budget:
    """Counts what is seen against the limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.entries = 0
        self.bytes = 0
        self.sockets_left_out = 0

    def add(self, entry: Entry) -> None:
        """Count one entry. Raises Refused when it is one too many."""
        self.entries += 1
        if self.entries > self.limits.entries:
            raise Refused("the directory has too many entries", f"more than {self.limits.entries}")
        if len(entry.parts) > self.limits.depth:
            raise Refused(f"{entry.path} is too deep", f"more than {self.limits.depth} directories")
        if stat.S_ISREG(entry.status.st_mode):
            self.bytes += entry.status.st_size
            if self.bytes > self.limits.bytes:
                raise Refused("the directory's files are too large", f"together more than {self.limits.bytes} bytes")


def walk(root: int, budget: Budget) -> Iterator[Entry]:
    """Every entry, the root first, a directory before what is in it, names in the order of their bytes.

    Sockets are passed over: nobody listens behind a copy. Raises Refused for devices and beyond the limits.
    """
    yield Entry(root, (), os.stat(root))
    pending: list[tuple[int, Parts, Iterator[str]]] = [(root, (), iter(_names(root)))]
    try:
        while pending:
            directory, above, names = pending[-1]
            name = next(names, None)
            if name is None:
                pending.pop()
                if directory != root:
                    os.close(directory)
                continue
            raw = os.fsencode(name)
            entry = Entry(directory, (*above, raw), os.stat(raw, dir_fd=directory, follow_symlinks=False))
            mode = entry.status.st_mode
            if stat.S_ISSOCK(mode):
                budget.sockets_left_out += 1
                continue
            if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not entry.is_whiteout):
                raise Refused(f"{entry.path} is a device", "a layer can't have any")
            budget.add(entry)
            yield entry
            if stat.S_ISDIR(mode):
                inside = os.open(raw, DIRECTORY, dir_fd=directory)
                pending.append((inside, entry.parts, iter(_names(inside))))
    finally:
        for directory, _, _ in pending:
            if directory != root:
                os.close(directory)


def _names(directory: int) -> list[str]:
    return sorted(os.listdir(directory), key=os.fsencode)


def opened(entry: Entry) -> int:
    """A descriptor of a file or directory. Raises Refused if it is another than was seen."""
    kind = os.O_DIRECTORY if stat.S_ISDIR(entry.status.st_mode) else 0
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | kind
    fd = os.open(entry.name, flags, dir_fd=entry.directory)
    if not os.path.samestat(os.fstat(fd), entry.status):
        os.close(fd)
        raise _changed(entry)
    return fd


def attributes(fd: int, entry: Entry, limits: Limits) -> tuple[Xattrs, bool]:
    """The user's attributes, and whether the overlay's say that a directory is opaque."""
    found: Xattrs = {}
    opaque = False
    for name in os.listxattr(fd):
        if name == OPAQUE:
            opaque = os.getxattr(fd, name) == b"y"
        elif name.startswith(_OVERLAY):
            if not name.startswith(_BOOKS):
                raise Refused(f"{entry.path} depends on what lies below it", f"{shown(name.encode())} is set")
        elif name.startswith("user."):
            found[name] = os.getxattr(fd, name)
    if sum(len(name) + len(value) for name, value in found.items()) > limits.xattr_bytes:
        raise Refused(f"{entry.path} has too many attributes", f"more than {limits.xattr_bytes} bytes")
    return found, opaque


def content(fd: int, entry: Entry, sink: Sink) -> bytes:
    """The SHA-256 of a file, holes read as zeros; `sink` gets the rest. Raises Refused if it changes meanwhile."""
    sha256 = hashlib.sha256()
    size = entry.status.st_size
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            start = size  # nothing but a hole follows
        start = min(start, size)
        _hash_zeros(sha256, start - at)
        at = start
        end = min(os.lseek(fd, at, os.SEEK_HOLE), size) if at < size else at
        while at < end:
            data = os.pread(fd, min(_PIECE, end - at), at)
            if not data:
                raise _changed(entry)
            sha256.update(data)
            sink(data, at)
            at += len(data)
    after = os.fstat(fd)
    if (after.st_size, after.st_mtime_ns) != (size, entry.status.st_mtime_ns):
        raise _changed(entry)
    return sha256.digest()


def _hash_zeros(sha256: hashlib._Hash, count: int) -> None:
    while count > 0:
        sha256.update(_ZEROS[: min(count, _PIECE)])
        count -= _PIECE


def _changed(entry: Entry) -> Refused:
    return Refused(f"{entry.path} changed while it was read", "its sandbox must be paused meanwhile")


class Record:
    """Digests a tree: what two trees must share to be called equal. Owners are the sandbox's ids."""

    def __init__(self, *, times: bool) -> None:
        self._sha256 = hashlib.sha256(b"tartarus tree 1\n")
        self._times = times
        self._first: dict[tuple[int, int], Parts] = {}

    def earlier(self, entry: Entry) -> Parts | None:
        """The path under which a hard-linked file was met before; remembers this one when there is none."""
        if entry.status.st_nlink < 2 or stat.S_ISDIR(entry.status.st_mode):
            return None
        key = (entry.status.st_dev, entry.status.st_ino)
        found = self._first.get(key)
        if found is None:
            self._first[key] = entry.parts
        return found

    def add(self, entry: Entry, kind: bytes, body: bytes, xattrs: Xattrs | None = None) -> None:
        """Take in one entry: a letter for its kind, and the digest or text that is its content."""
        fields = [kind, b"/".join(entry.parts), body]
        if kind not in {b"w", b"h"}:
            status = entry.status
            times = status.st_mtime_ns if self._times else 0
            fields.append(b"%o %d %d %d" % (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, times))
        for name in sorted(xattrs or {}):
            fields += (name.encode("utf-8", "surrogateescape"), (xattrs or {})[name])
        self._sha256.update(_FIELD.pack(len(fields)))
        for field in fields:
            self._sha256.update(_FIELD.pack(len(field)))
            self._sha256.update(field)

    def digest(self) -> str:
        """``sha256:…`` of everything added."""
        return f"sha256:{self._sha256.hexdigest()}"


class Taker:
    """Does nothing with what a tree has; copying overrides it."""

    def directory(self, entry: Entry, xattrs: Xattrs, *, opaque: bool) -> None:
        """A directory."""

    def file(self, entry: Entry, xattrs: Xattrs, fill: Callable[[Sink], None]) -> None:
        """A file; `fill` reads it once."""
        del entry, xattrs
        fill(lambda _data, _at: None)

    def symlink(self, entry: Entry, target: bytes) -> None:
        """A symbolic link."""

    def hard_link(self, entry: Entry, first: Parts) -> None:
        """Another name of what is at `first`."""

    def special(self, entry: Entry) -> None:
        """A named pipe or a whiteout."""


def take(root: int, limits: Limits, taker: Taker, *, times: bool) -> dict[str, Any]:
    """Walk a tree, hand everything to `taker`, and say what was seen: digest, entries, bytes."""
    budget = Budget(limits)
    record = Record(times=times)
    for entry in walk(root, budget):
        mode = entry.status.st_mode
        first = record.earlier(entry)
        if entry.is_whiteout:
            record.add(entry, b"w", b"")
            taker.special(entry)
        elif first is not None:
            record.add(entry, b"h", b"/".join(first))
            taker.hard_link(entry, first)
        elif stat.S_ISLNK(mode):
            target = os.readlink(entry.name, dir_fd=entry.directory)
            record.add(entry, b"l", target)
            taker.symlink(entry, target)
        elif stat.S_ISFIFO(mode):
            record.add(entry, b"p", b"")
            taker.special(entry)
        else:
            _take_open(entry, limits, taker, record)
    return {
        "digest": record.digest(),
        "entries": budget.entries,
        "bytes": budget.bytes,
        "sockets_left_out": budget.sockets_left_out,
    }


def _take_open(entry: Entry, limits: Limits, taker: Taker, record: Record) -> None:
    fd = opened(entry)
    try:
        xattrs, opaque = attributes(fd, entry, limits)
        if stat.S_ISDIR(entry.status.st_mode):
            record.add(entry, b"d", b"opaque" if opaque else b"", xattrs)
            taker.directory(entry, xattrs, opaque=opaque)
        else:
            sums: list[bytes] = []
            taker.file(entry, xattrs, lambda sink: sums.append(content(fd, entry, sink)))
            record.add(entry, b"f", sums[0], xattrs)
    finally:
        os.close(fd)


def digest(place: str | int, limits: Limits, *, times: bool) -> dict[str, Any]:
    """The digest of the tree at `place`, a path or an open directory; `times`: whether a file's time counts."""
    root = os.open(place, DIRECTORY) if isinstance(place, str) else place
    return take(root, limits, Taker(), times=times)
