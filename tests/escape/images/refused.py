"""Layers that must be refused: (name, layer, part of the reason)."""

from __future__ import annotations

import functools
import gzip
import struct

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
    record,
    sha256,
    symlink,
)

_UP = b"../" * 20
_SPARSE = {b"GNU.sparse.major": b"0", b"GNU.sparse.minor": b"1", b"GNU.sparse.name": b"sparse"}


def _traversal(outside: bytes) -> dict[str, tuple[bytes, str]]:
    """Ways out of the target. `outside` is the absolute path of a directory that attacks aim at."""
    rest = outside.lstrip(b"/")
    return {
        "dot-dot": (file(b"../file", b"x"), "leads out"),
        "dot-dot far": (file(_UP + rest + b"/file", b"x"), "leads out"),
        "dot-dot in the middle": (directory(b"a") + file(b"a/../../file", b"x"), "leads out"),
        "dot-dot at the end": (directory(b"a/.."), "leads out"),
        "dot-dot directory mode": (directory(b"..", 0o777), "leads out"),
        "dot-dot by prefix": (file(b"file", b"x", prefix=b"../.."), "leads out"),
        "dot-dot by long name": (long_name(_UP + rest + b"/file") + file(b"x", b"x", magic=GNU), "leads out"),
        "dot-dot by pax": (pax({b"path": _UP + rest + b"/file"}) + file(b"x", b"x"), "leads out"),
        "dot-dot by sparse name": (
            pax(_SPARSE | {b"GNU.sparse.name": b"../file", b"GNU.sparse.realsize": b"0"}) + file(b"x"),
            "leads out",
        ),
        "symbolic link, then below it": (symlink(b"a", outside) + file(b"a/file", b"x"), "below"),
        "relative link, then below it": (symlink(b"a", _UP + rest) + file(b"a/file", b"x"), "below"),
        "chain of links": (symlink(b"a", b"b") + symlink(b"b", b"/") + file(b"a/" + rest + b"/f", b"x"), "below"),
        "link to the root's parent": (symlink(b"a", b"..") + file(b"a/bait/file", b"x"), "below"),
        "link, then a directory below it": (symlink(b"a", outside) + directory(b"a/new"), "below"),
        "link, then a deletion below it": (symlink(b"a", outside) + file(b"a/.wh.file"), "below"),
        "link, then opaque below it": (symlink(b"a", outside) + file(b"a/.wh..wh..opq"), "below"),
        "link, then a hard link through it": (
            symlink(b"a", outside) + hard_link(b"b", b"a/file"),
            "hard link to nothing",
        ),
        "hard link outside": (hard_link(b"a", outside + b"/file"), "hard link to nothing"),
        "hard link up": (hard_link(b"a", _UP + rest + b"/file"), "leads out"),
        "hard link to the host's shadow": (hard_link(b"a", b"/etc/shadow"), "hard link to nothing"),
        "hard link into /proc": (hard_link(b"a", b"/proc/self/exe"), "hard link to nothing"),
        "hard link by pax": (pax({b"linkpath": _UP + b"etc/shadow"}) + hard_link(b"a", b"x"), "leads out"),
        "hard link to a directory": (directory(b"d") + hard_link(b"a", b"d"), "hard link to nothing"),
        "hard link to the root": (hard_link(b"a", b"/"), "hard link to nothing"),
        "hard link to itself": (file(b"a", b"x") + hard_link(b"a", b"a"), "replaces what it links to"),
        "hard link over its own directory": (file(b"d/a", b"x") + hard_link(b"d", b"d/a"), "replaces what it links to"),
        "hard link to what is deleted": (file(b".wh.a") + hard_link(b"b", b"a"), "hard link to nothing"),
        "below a file": (file(b"a", b"x") + file(b"a/b", b"x"), "below"),
        "root as a link": (symlink(b"./", outside), "root"),
        "root as a file": (file(b"/", b"x"), "root"),
    }


def _overlay() -> dict[str, tuple[bytes, str]]:
    """Forgeries of what steers an overlay."""

    def attribute(name: bytes, value: bytes = b"y") -> bytes:
        return pax({b"SCHILY.xattr." + name: value})

    return {
        "opaque by attribute": (attribute(b"user.overlay.opaque") + directory(b"a"), "forges"),
        "redirect": (attribute(b"user.overlay.redirect", b"/etc") + directory(b"a"), "forges"),
        "metacopy": (attribute(b"user.overlay.metacopy", b"") + file(b"a"), "forges"),
        "trusted redirect": (attribute(b"trusted.overlay.redirect", b"/etc") + directory(b"a"), "forges"),
        "whiteout device": (header(b"a", b"3", device=(0, 0)), "forges"),
        "deletes itself": (file(b"a/.wh.."), "deletes the directory"),
        "deletes its parent": (file(b"a/.wh..."), "deletes the directory"),
        "deletes nothing": (file(b"a/.wh."), "deletes the directory"),
        "deletion as a directory": (directory(b".wh.a"), "must be a file"),
        "deletion as a link": (symlink(b".wh.a", b"/etc"), "must be a file"),
        "something below a deletion": (file(b".wh.a/b", b"x"), "below the mark"),
    }


def _numbers() -> dict[str, tuple[bytes, str]]:
    """Sizes and ids that are negative, huge, or no numbers."""
    return {
        "negative size": (header(b"a", size=base256(-1, 12)), "out of range"),
        "negative size of a link": (header(b"a", b"2", link=b"b", size=base256(-512, 12)), "out of range"),
        "huge size": (header(b"a", size=base256(1 << 62, 12)), "out of range"),
        "size beyond the limit": (header(b"a", size=base256(1 << 40, 12)) + bytes(512), "too large"),
        "size with a minus": (header(b"a", size=b"-0000000001\0"), "no number"),
        "size with digits beyond octal": (header(b"a", size=b"00000000099\0"), "no number"),
        "size in pax, negative": (pax({b"size": b"-1"}) + file(b"a"), "no number"),
        "size in pax, huge": (pax({b"size": b"9" * 19}) + file(b"a"), "no number"),
        "size in pax, endless": (pax({b"size": b"9" * 5000}) + file(b"a"), "no number"),
        "size in pax, not what is there": (pax({b"size": b"4096"}) + file(b"a", b"x"), "archive"),
        "negative owner": (header(b"a", uid=base256(-1, 8)), "out of range"),
        "owner in pax, negative": (pax({b"uid": b"-1"}) + file(b"a"), "no number"),
        "time without end": (pax({b"mtime": b"9" * 4000}) + file(b"a"), "no number"),
        "time that is infinite": (pax({b"mtime": b"inf"}) + file(b"a"), "no number"),
        "link with data": (header(b"a", b"2", link=b"b", size=512) + file(b"hidden", b"x"), "ambiguous"),
        "directory with data": (header(b"a", b"5", size=512) + file(b"hidden", b"x"), "ambiguous"),
        "device with data": (header(b"a", b"3", size=512, device=(1, 3)) + file(b"hidden", b"x"), "ambiguous"),
        "checksum": (header(b"a", checksum=b"000000\0 "), "checksum"),
    }


def _pax() -> dict[str, tuple[bytes, str]]:
    """What readers of pax headers understand in different ways."""
    return {
        "length too long": (pax(b"99 path=a\n") + file(b"b"), "malformed"),
        "length too short": (pax(b"5 path=a\n") + file(b"b"), "malformed"),
        "length zero": (pax(b"0 path=a\n") + file(b"b"), "malformed"),
        "length missing": (pax(b"path=a\n") + file(b"b"), "malformed"),
        "length of a thousand digits": (pax(b"1" * 1000 + b" path=a\n") + file(b"b"), "malformed"),
        "no key": (pax(b"6 =ab\n") + file(b"b"), "malformed"),
        "no equals sign": (pax(b"7 path\n") + file(b"b"), "malformed"),
        "path twice": (pax(record(b"path", b"a") + record(b"path", b"b")) + file(b"c"), "twice"),
        "zero byte in a path": (pax({b"path": b"a\0/../../b"}) + file(b"b"), "zero byte"),
        "zero byte in a link": (pax({b"linkpath": b"a\0b"}) + symlink(b"b", b"x"), "zero byte"),
        "two in a row": (pax({b"path": b"a"}) + pax({b"path": b"b"}) + file(b"c"), "two extended"),
        "with a GNU name": (pax({b"path": b"a"}) + long_name(b"b") + file(b"c"), "two extended"),
        "global path": (pax({b"path": b"a"}, b"g") + file(b"b"), "all entries"),
        "global size": (pax({b"size": b"0"}, b"g") + file(b"b", b"x"), "all entries"),
        "global attribute": (pax({b"SCHILY.xattr.user.x": b"a"}, b"g") + file(b"b"), "all entries"),
        "too long": (pax({b"comment": b"a" * (100 << 10)}) + file(b"b"), "too long"),
        "attribute without a name": (pax({b"SCHILY.xattr.": b"a"}) + file(b"b"), "proper name"),
        "attributes too large": (pax({b"SCHILY.xattr.user.a": b"a" * 20000}) + file(b"b"), "too many attributes"),
        "at the end": (pax({b"path": b"a"}), "without its entry"),
    }


def _sparse() -> dict[str, tuple[bytes, str]]:
    """Maps that overlap, run backwards, or promise other sizes than are there."""

    def mapped(text: bytes, real: bytes, blocks: bytes, data: bytes = b"x" * 8) -> bytes:
        records = _SPARSE | {b"GNU.sparse.map": text, b"GNU.sparse.realsize": real, b"GNU.sparse.numblocks": blocks}
        return pax(records) + file(b"a", data)

    def old(pairs: list[tuple[int, int]], real: int, data: bytes) -> bytes:
        places = b"".join(b"%011o\0%011o\0" % pair for pair in pairs).ljust(96, b"\0")
        tail = bytes(386 - 345) + places + b"\0" + b"%011o\0" % real
        return file(b"a", data, kind=b"S", magic=GNU, tail=tail)

    return {
        "overlap": (mapped(b"0,4,2,4", b"8", b"2"), "malformed"),
        "backwards": (mapped(b"8,4,0,4", b"12", b"2"), "malformed"),
        "beyond the size": (mapped(b"100,8", b"8", b"1"), "malformed"),
        "more than is stored": (mapped(b"0,4096", b"4096", b"1"), "add up"),
        "size beyond the limit": (mapped(b"0,8", b"%d" % (1 << 40), b"1"), "too large"),
        "size that overflows": (mapped(b"0,8", b"%d" % (1 << 63), b"1"), "no number"),
        "count that is wrong": (mapped(b"0,8", b"8", b"9"), "as long as it says"),
        "half a pair": (mapped(b"0,8,9", b"8", b"1"), "sparse"),
        "map without an end": (
            pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"8"})
            + file(b"a", b"9999999\n" * 64),
            "malformed",
        ),
        "old map that overlaps": (old([(0, 4), (2, 4)], 8, b"x" * 8), "malformed"),
        "old map of a huge file": (old([(0, 8)], (1 << 33) - 1, b"x" * 8), "too large"),
        "version from the future": (
            pax({b"GNU.sparse.major": b"7", b"GNU.sparse.realsize": b"8"}) + file(b"a", b"x" * 8),
            "unknown way",
        ),
    }


def _names() -> dict[str, tuple[bytes, str]]:
    return {
        "name of 256 bytes": (pax({b"path": b"a" * 256}) + file(b"x"), "too long"),
        "path of 5000 bytes": (pax({b"path": b"abcdefghi/" * 20 + b"/" * 5000 + b"a"}) + file(b"x"), "too long"),
        "too deep": (pax({b"path": b"a/" * 60 + b"a"}) + file(b"x"), "too deep"),
        "link of 5000 bytes": (pax({b"linkpath": b"a" * 5000}) + symlink(b"a", b"x"), "links to nothing"),
        "link to nothing": (symlink(b"a", b""), "links to nothing"),
        "unknown kind": (header(b"a", b"Q"), "unknown kind"),
        "continued from another volume": (header(b"a", b"M"), "unknown kind"),
        "no name": (file(b"", b"x"), "root"),
    }


def _shape() -> dict[str, tuple[bytes, str]]:
    return {
        "cut in a header": (file(b"a", b"x")[:300], "cut off"),
        "cut in the data": (file(b"a", b"x" * 5000)[:2048], "cut off"),
        "something after the end": (file(b"a", b"x") + END + file(b"hidden", b"x"), "after its end"),
        "a block after one of zeros": (file(b"a", b"x") + bytes(512) + file(b"hidden", b"x"), "after its end"),
        "no archive": (b"#!/bin/sh\n" * 100, "checksum"),
    }


def _bombs() -> dict[str, Blob]:
    many = b"".join(file(b"%d" % number) for number in range(2500))
    huge = gzip.compress(bytes(64 << 20), 9)
    layered = b"".join(gzip.compress(bytes(1 << 20), 9) for _ in range(64))
    window = struct.pack("<IBB", 0xFD2FB528, 0, 0xFF) + b"\x01\0\0"  # a frame that wants the largest window
    return {
        "entries": gzipped(many + END),
        "zeros in gzip": blob(bytes(64 << 20), huge),
        "zeros in members": blob(bytes(64 << 20), layered),
        "zeros in zstd": blob(bytes(64 << 20), zstandard.compress(bytes(64 << 20))),
        "zstd window": blob(b"", window),
        "one large file": gzipped(header(b"a", size=64 << 20) + bytes(64 << 20) + END),
        "many files": gzipped(b"".join(file(b"%d" % number, bytes(1 << 20)) for number in range(12)) + END),
    }


_BOMB_REASONS = {"entries": "too many entries", "zstd window": "zstd"}


def _labels() -> dict[str, tuple[Blob, str]]:
    good = file(b"a", b"x") + END
    return {
        "another content than promised": (blob(good, diff_id=sha256(b"other")), "not what the image says"),
        "another content, gzip": (blob(good, gzip.compress(good), diff_id=sha256(b"other")), "not what the image says"),
        "digest that is a path": (blob(good, diff_id="sha256:../../etc/passwd"), "no SHA-256 digest"),
        "digest of another kind": (blob(good, diff_id="md5:" + "0" * 32), "no SHA-256 digest"),
        "size that is wrong": (blob(good, size=7), "should have 7"),
        "media type of a chart": (
            blob(good, media_type="application/vnd.cncf.helm.chart.content.v1.tar+gzip"),
            "media",
        ),
        "media type of a config": (blob(good, media_type="application/vnd.oci.image.config.v1+json"), "media type"),
        "media type with an escape": (blob(good, media_type=TAR + "\x1b[2J"), "media type"),
        "gzip with something after": (blob(good, gzip.compress(good) + b"more"), "gzip"),
        "gzip cut off": (blob(good, gzip.compress(good)[:-12]), ""),
        "gzip damaged": (blob(good, gzip.compress(good, 0)[:40] + b"\xff" * 400), ""),
        "zstd cut off": (blob(good, zstandard.compress(good)[:-6]), ""),
        "nothing": (blob(good, b""), ""),
    }


@functools.cache
def _anywhere() -> dict[str, tuple[Blob, str]]:
    found: dict[str, tuple[Blob, str]] = {}
    groups = {"overlay": _overlay(), "numbers": _numbers(), "pax": _pax(), "sparse": _sparse(), "names": _names()}
    for group, attacks in groups.items():
        for name, (archive, reason) in attacks.items():
            found[f"{group}/{name}"] = (blob(archive + END), reason)
    for name, (archive, reason) in _shape().items():
        found[f"shape/{name}"] = (blob(archive), reason)
    for name, bomb in _bombs().items():
        found[f"bombs/{name}"] = (bomb, _BOMB_REASONS.get(name, "too large"))
    for name, labelled in _labels().items():
        found[f"labels/{name}"] = labelled
    return found


def refused(outside: bytes) -> dict[str, tuple[Blob, str]]:
    """Every layer that must be refused, by name, with a part of the reason."""
    ways_out = {f"traversal/{name}": (blob(archive + END), why) for name, (archive, why) in _traversal(outside).items()}
    return ways_out | _anywhere()
