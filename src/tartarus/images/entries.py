"""A file tree as data: planned first, so that it can be digested and compared, then written out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec


class Entry(msgspec.Struct, frozen=True, order=True):
    """One directory, file or symbolic link of a root file system. `path` is absolute in the sandbox.

    `uid` is the owner as the sandbox sees it; its group has the same number unless `gid` says another.
    """

    path: str
    kind: Literal["dir", "file", "symlink"] = "dir"
    mode: int = 0o755
    content: bytes = b""
    target: str = ""
    uid: int = 0
    gid: int | None = None


def directory(path: str, mode: int = 0o755, uid: int = 0) -> Entry:
    """A directory; its parents are made by `write_tree` when nothing names them."""
    return Entry(path, "dir", mode, uid=uid)


def text(path: str, content: str, mode: int = 0o644) -> Entry:
    """A text file."""
    return Entry(path, "file", mode, content=content.encode())


def symlink(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path, "symlink", 0o777, target=target)


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """The entries sorted so that each parent comes first, missing parents added. The first of a path counts."""
    found: dict[str, Entry] = {}
    for entry in entries:
        found.setdefault(entry.path, entry)
    for path in list(found):
        parent = os.path.dirname(path)
        while parent != "/" and parent not in found:
            found[parent] = directory(parent)
            parent = os.path.dirname(parent)
    return sorted(found.values())


def write_tree(root: Path, entries: Iterable[Entry], uid_base: int | None) -> None:
    """Write `entries` below the existing directory `root`, owned by `uid_base` + uid (by us when None).

    Modes are set as given, whatever the umask.
    """
    os.chmod(root, 0o755)
    give(root, uid_base, 0)
    for entry in with_parents(entries):
        place = root / entry.path.lstrip("/")
        if entry.kind == "symlink":
            place.symlink_to(entry.target)
        elif entry.kind == "dir":
            place.mkdir()
            os.chmod(place, entry.mode)
        else:
            place.write_bytes(entry.content)
            os.chmod(place, entry.mode)
        give(place, uid_base, entry.uid, entry.gid)


def give(place: Path, uid_base: int | None, uid: int, gid: int | None = None) -> None:
    """Make `place` the sandbox user's, when ids are mapped."""
    if uid_base is not None:
        os.chown(place, uid_base + uid, uid_base + (uid if gid is None else gid), follow_symlinks=False)
