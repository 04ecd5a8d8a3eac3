"""Archives made by hand, byte by byte: what no honest writer of tar archives would write."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping

import msgspec

from tartarus.images.oci import Descriptor

BLOCK = 512
END = bytes(2 * BLOCK)
TAR = "application/vnd.oci.image.layer.v1.tar"
USTAR, GNU, V7 = b"ustar\x0000", b"ustar  \x00", bytes(8)


class Blob(msgspec.Struct, frozen=True):
    """A layer as an image has it: the stored bytes, and what the image says of them."""

    data: bytes
    descriptor: Descriptor
    diff_id: str


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def blob(
    archive: bytes, stored: bytes | None = None, *, media_type: str = TAR, diff_id: str = "", size: int = -1
) -> Blob:
    """The blob of an archive; `stored` is how it lies in the registry, as it is unless given."""
    data = archive if stored is None else stored
    descriptor = Descriptor(media_type, sha256(data), len(data) if size < 0 else size)
    return Blob(data, descriptor, diff_id or sha256(archive))


def gzipped(archive: bytes) -> Blob:
    return blob(archive, gzip.compress(archive, 6, mtime=0), media_type=f"{TAR}+gzip")


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    """GNU's form of numbers that octal digits can't say, negative ones with all bits of the sign."""
    raw = bytearray(value.to_bytes(width, "big", signed=True))
    raw[0] |= 0x80
    return bytes(raw)


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int | bytes = 0,
    mode: int = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 0,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    magic: bytes = USTAR,
    prefix: bytes = b"",
    tail: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    """One header. Numbers may be given as the field's bytes; `tail` is laid over the end, from the prefix on."""
    field = lambda value, width: value if isinstance(value, bytes) else octal(value, width)  # noqa: E731
    block = (
        name[:100].ljust(100, b"\0")
        + octal(mode, 8)
        + field(uid, 8)
        + field(gid, 8)
        + field(size, 12)
        + field(mtime, 12)
        + b" " * 8
        + kind
        + link[:100].ljust(100, b"\0")
        + magic
        + bytes(64)
        + octal(device[0], 8)
        + octal(device[1], 8)
        + prefix.ljust(155, b"\0")
    ).ljust(BLOCK, b"\0")
    if tail:
        block = block[:345] + tail.ljust(BLOCK - 345, b"\0")
    assert len(block) == BLOCK
    total = b"%06o\0 " % sum(block) if checksum is None else checksum
    return block[:148] + total + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def file(name: bytes, data: bytes = b"", **fields: object) -> bytes:
    return header(name, size=len(data), **fields) + padded(data)  # type: ignore[arg-type]


def directory(name: bytes, mode: int = 0o755, **fields: object) -> bytes:
    return header(name, b"5", mode=mode, **fields)  # type: ignore[arg-type]


def symlink(name: bytes, target: bytes) -> bytes:
    return header(name, b"2", link=target, mode=0o777)


def hard_link(name: bytes, target: bytes) -> bytes:
    return header(name, b"1", link=target)


def record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def pax(records: Mapping[bytes, bytes] | bytes, kind: bytes = b"x") -> bytes:
    """An extended header: of records, or of these very bytes."""
    data = records if isinstance(records, bytes) else b"".join(record(*item) for item in records.items())
    return file(b"PaxHeaders/0", data, kind=kind)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return file(b"././@LongLink", name + b"\0", kind=kind, magic=GNU)
