"""Layers that are odd but harmless: they unpack, and `kinds` of what comes of it is exactly as said."""

from __future__ import annotations

import functools
import gzip

import zstandard
from tests.escape.images.archives import (
    END,
    GNU,
    TAR,
    Blob,
    base256,
    blob,
    directory,
    file,
    gzipped,
    hard_link,
    header,
    long_name,
    pax,
    symlink,
)

Kinds = dict[str, str]


def _archives() -> dict[str, tuple[bytes, Kinds]]:
    return {
        "absolute path": (file(b"/etc/passwd", b"x"), {"etc": "d", "etc/passwd": "f"}),
        "many slashes": (file(b"///etc//.//passwd", b"x"), {"etc": "d", "etc/passwd": "f"}),
        "links that lead out": (
            symlink(b"a", b"/etc/shadow") + symlink(b"b", b"../../../etc"),
            {"a": "l", "b": "l"},
        ),
        "link replaced by a file": (symlink(b"a", b"/etc/passwd") + file(b"a", b"x"), {"a": "f"}),
        "link replaced by a directory": (
            symlink(b"a", b"/etc") + directory(b"a") + file(b"a/passwd", b"x"),
            {"a": "d", "a/passwd": "f"},
        ),
        "directory replaced by a link": (
            file(b"a/b/c", b"x") + symlink(b"a", b"/etc"),
            {"a": "l"},
        ),
        "directory replaced by a file": (file(b"a/b/c/d", b"x") + file(b"a", b"y"), {"a": "f"}),
        "hard link to a link": (symlink(b"a", b"/etc/shadow") + hard_link(b"b", b"a"), {"a": "l", "b": "l"}),
        "hard link, then its file anew": (
            file(b"a", b"x") + hard_link(b"b", b"a") + file(b"a", b"other"),
            {"a": "f", "b": "f"},
        ),
        "file twice": (file(b"a", b"x") + file(b"a", b"y"), {"a": "f"}),
        "devices": (
            header(b"dev/null", b"3", device=(1, 3)) + header(b"disk", b"4", device=(254, 0)) + file(b"a"),
            {"dev": "d", "a": "f"},
        ),
        "device over a link": (symlink(b"a", b"/dev/sda") + header(b"a", b"4", device=(8, 0)), {}),
        "pipe": (header(b"pipe", b"6"), {"pipe": "p"}),
        "deletions": (file(b".wh.a") + file(b"d/.wh.b"), {"a": "w", "d": "d", "d/b": "w"}),
        "deletion, then the thing anew": (file(b".wh.a") + file(b"a", b"x"), {"a": "f"}),
        "deletion of what is there": (file(b"a", b"x") + file(b".wh.a"), {"a": "f"}),
        "deletions in what hides all": (file(b"d/.wh.a") + file(b"d/.wh..wh..opq") + file(b"d/.wh.b"), {"d": "d"}),
        "books of aufs": (file(b".wh..wh.plnk/1.2", b"x") + file(b".wh..wh.aufs"), {}),
        "owner beyond all ids": (file(b"a", uid=base256(1 << 40, 8), gid=base256(70000, 8)), {"a": "f"}),
        "time before time": (file(b"a", mtime=base256(-(1 << 60), 12)), {"a": "f"}),
        "time after time": (pax({b"mtime": b"9" * 12 + b".999"}) + file(b"a"), {"a": "f"}),
        "capability": (
            pax({b"SCHILY.xattr.security.capability": b"\1\0\0\2" + b"\xff" * 16}) + file(b"ping", b"x", mode=0o755),
            {"ping": "f"},
        ),
        "trusted attribute": (pax({b"SCHILY.xattr.trusted.x": b"y"}) + file(b"a"), {"a": "f"}),
        "comment for all": (pax({b"comment": b"0123abcd"}, b"g") + file(b"a"), {"a": "f"}),
        "long name": (long_name(b"d/" + b"n" * 200) + file(b"x", b"x", magic=GNU), {"d": "d", "d/" + "n" * 200: "f"}),
        "old directory": (header(b"d/", b"\0"), {"d": "d"}),
        "no end": (b"", {}),
    }


@functools.cache
def contained() -> dict[str, tuple[Blob, Kinds]]:
    """Every odd layer, by name, with what must come of it."""
    found = {name: (blob(archive + END), kinds) for name, (archive, kinds) in _archives().items()}
    good = file(b"a", b"x" * 1000) + END
    halves = gzip.compress(good[:700]) + gzip.compress(good[700:])
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(good[:700]) + zstandard.compress(good[700:])
    found |= {
        "without an end mark": (blob(file(b"a", b"x")), {"a": "f"}),
        "members": (blob(good, halves, media_type=f"{TAR}+gzip"), {"a": "f"}),
        "frames": (blob(good, skipped, media_type=f"{TAR}+zstd"), {"a": "f"}),
        "gzip called plain": (blob(good, gzip.compress(good)), {"a": "f"}),
        "plain called gzip": (blob(good, media_type=f"{TAR}+gzip"), {"a": "f"}),
        "padded": (gzipped(good + bytes(20480)), {"a": "f"}),
    }
    return found
