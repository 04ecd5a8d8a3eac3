"""A strict reader of tar streams: ustar, pax, and GNU's long names and sparse files.

Not `tarfile`: that is made to read what it can, and where two readers understand one archive in two ways, what was
scanned is not what is unpacked. Whatever is ambiguous, unknown or out of range is refused here. Names stay bytes.
Formats: POSIX.1-2017 pax, and the manual of GNU tar.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tartarus.images.unpack.inside import pax
from tartarus.images.unpack.inside.refusal import Refused, shown
from tartarus.images.unpack.inside.stream import Stream
from tartarus.images.unpack.limits import Limits

BLOCK = 512
_ZEROS = bytes(BLOCK)
# name mode uid gid size mtime checksum type link magic+version user group major minor prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
_USTAR, _GNU, _V7 = b"ustar\x0000", b"ustar  \x00", bytes(8)
_SPACES = b"        "
FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_SPARSE, _PAX, _GLOBAL, _LONG_NAME, _LONG_LINK = b"S", b"x", b"g", b"L", b"K"
_SAME_AS_FILE = (b"\0", b"7")
_KINDS = {FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO}
_MOST_SIZE = 1 << 62
# Of the old GNU sparse format: four stretches in the header, then 21 in each block that follows.
_OLD_IN_HEADER, _OLD_IN_BLOCK, _OLD_MAP_AT = 4, 21, 386


class Member:
    """One entry. `size` bytes are stored; `real_size` is the file's size, with the holes of `sparse`."""

    __slots__ = ("device", "gid", "kind", "link", "mode", "mtime_ns", "name", "real_size", "size", "sparse", "uid",
                 "xattrs")  # fmt: skip

    def __init__(self) -> None:
        self.kind = FILE
        self.name = b""
        self.link = b""
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.size = 0
        self.real_size = 0
        self.mtime_ns = 0
        self.device = (0, 0)
        self.sparse: pax.SparseMap | None = None
        self.xattrs: dict[bytes, bytes] = {}


class _Extended:
    """What stands before an entry and belongs to it. Two writers' ways of saying it are not mixed."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.link: bytes | None = None
        self.records: pax.Records | None = None

    def __bool__(self) -> bool:
        return self.name is not None or self.link is not None or self.records is not None


def members(stream: Stream, limits: Limits) -> Iterator[Member]:
    """Every entry in turn; its data are the stream's next `size` bytes, and what is not taken of them is skipped.

    Raises Refused for what is not a well-formed archive, as soon as it is met.
    """
    extended = _Extended()
    while not stream.at_end():
        block = stream.take(BLOCK)
        if block == _ZEROS:
            if not stream.only_zeros_follow():
                raise Refused("the archive has something after its end", "readers disagree on whether it counts")
            break
        member = _header(block)
        if member.kind in {_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK}:
            _extend(extended, member, _content(stream, member, limits))
            continue
        _finish(member, block, extended, stream, limits)
        extended = _Extended()
        end = stream.position + member.size + -member.size % BLOCK
        yield member
        stream.skip(end - stream.position)
    if extended:
        raise Refused("the archive is cut off", "an extended header without its entry")


def _header(block: bytes) -> Member:
    member = Member()
    (name, mode, uid, gid, size, mtime, checksum, member.kind, link, magic, _, _, major, minor, prefix) = (
        _HEADER.unpack(block)
    )
    # The sum counts its own field as spaces.
    if _number(checksum, "checksum") != sum(block) - sum(checksum) + sum(_SPACES):
        raise Refused("this is no tar archive, or a damaged one", "a header's checksum is wrong")
    if magic not in {_USTAR, _GNU, _V7}:
        raise Refused("this is no tar archive that is known here", f"its magic is {shown(magic)}")
    member.name = name.partition(b"\0")[0]
    if magic == _USTAR and prefix[0]:
        member.name = prefix.partition(b"\0")[0] + b"/" + member.name
    member.link = link.partition(b"\0")[0]
    member.mode = _number(mode, "mode") & 0o7777
    member.uid = _number(uid, "user id")
    member.gid = _number(gid, "group id")
    member.size = _number(size, "size")
    member.mtime_ns = _number(mtime, "time", negative=True) * 10**9
    if member.kind in {CHARACTER, BLOCK_DEVICE}:
        member.device = (_number(major, "device number"), _number(minor, "device number"))
    if member.kind in _SAME_AS_FILE:
        member.kind = FILE
    return member


def _number(field: bytes, what: str, *, negative: bool = False) -> int:
    """Octal digits, or GNU's base 256, marked by the first byte's highest bit."""
    if field[0] & 0x80:
        # The next bit is the sign, of two's complement.
        value = int.from_bytes(bytes([field[0] & 0x7F | (field[0] & 0x40) << 1]) + field[1:], "big", signed=True)
    else:
        digits = field.strip(b" \0")
        if digits.translate(None, b"01234567"):
            raise Refused(f"a header's {what} is no number", shown(digits))
        value = int(digits or b"0", 8)
    if (value < 0 and not negative) or not -_MOST_SIZE < value < _MOST_SIZE:
        raise Refused(f"a header's {what} is out of range", str(value))
    return value


def _content(stream: Stream, member: Member, limits: Limits) -> bytes:
    if member.size > limits.header_bytes:
        raise Refused("an extended header is too long", f"{member.size} bytes, {limits.header_bytes} at most")
    data = stream.take(member.size)
    stream.skip(-member.size % BLOCK)
    return data


def _extend(extended: _Extended, member: Member, data: bytes) -> None:
    if member.kind == _GLOBAL:
        pax.check_global(pax.parse(data))
        return
    said_twice = {
        _PAX: bool(extended),
        _LONG_NAME: extended.name is not None or extended.records is not None,
        _LONG_LINK: extended.link is not None or extended.records is not None,
    }
    if said_twice[member.kind]:
        raise Refused("the archive is ambiguous", "an entry has two extended headers")
    if member.kind == _PAX:
        extended.records = pax.parse(data)
    else:
        text = data.removesuffix(b"\0")
        if b"\0" in text or not text:
            raise Refused("a long name is malformed", shown(text))
        if member.kind == _LONG_NAME:
            extended.name = text
        else:
            extended.link = text


def _finish(member: Member, block: bytes, extended: _Extended, stream: Stream, limits: Limits) -> None:
    """Put what was said before an entry into it, and check the whole."""
    member.name = extended.name or member.name
    member.link = extended.link or member.link
    if member.kind == _SPARSE:
        member.kind = FILE
        member.real_size = _number(block[483:495], "size")
        numbers = _old_map(block, stream, limits)
        member.sparse = pax.sparse_map(numbers, member.real_size, member.size)
        if extended.records:
            raise Refused("the archive is ambiguous", "a GNU sparse file with an extended header")
        return
    if member.kind not in _KINDS:
        raise Refused("the archive has an entry of an unknown kind", f"{shown(member.kind)} for {shown(member.name)}")
    records = extended.records or {}
    _apply(member, records)
    if member.kind == FILE and member.name.endswith(b"/") and not member.size:
        member.kind = DIRECTORY  # as archives older than the directory's own kind have them
    if member.kind != FILE and member.size:
        raise Refused(f"{shown(member.name)} is ambiguous", "readers disagree on whether a link or directory has data")
    member.real_size = member.size
    if any(key.startswith(b"GNU.sparse.") for key in records):
        _pax_sparse(member, records, stream, limits)
    _check_xattrs(member, limits)


def _apply(member: Member, records: pax.Records) -> None:
    for key, value in records.items():
        if key in {b"path", b"linkpath", b"GNU.sparse.name"} and b"\0" in value:
            raise Refused("a name has a zero byte in it", shown(value))
        if key == b"size":
            member.size = pax.decimal(value, "a size")
        elif key in {b"uid", b"gid"}:
            setattr(member, key.decode(), pax.decimal(value, "an id"))
        elif key == b"mtime":
            member.mtime_ns = pax.nanoseconds(value)
        elif key.startswith(pax.XATTR):
            member.xattrs[key[len(pax.XATTR) :]] = value
    member.name = records.get(b"path", member.name)
    member.link = records.get(b"linkpath", member.link)
    if member.size >= _MOST_SIZE:
        raise Refused("a size is out of range", str(member.size))


def _check_xattrs(member: Member, limits: Limits) -> None:
    total = sum(len(name) + len(value) for name, value in member.xattrs.items())
    if total > limits.xattr_bytes:
        raise Refused(f"{shown(member.name)} has too many attributes", f"{total} bytes, {limits.xattr_bytes} at most")
    if any(not name or b"\0" in name for name in member.xattrs):
        raise Refused(f"{shown(member.name)} has an attribute without a proper name", "empty, or with a zero byte")


def _old_map(block: bytes, stream: Stream, limits: Limits) -> list[int]:
    numbers: list[int] = []
    at, count, more = _OLD_MAP_AT, _OLD_IN_HEADER, block[482]
    while True:
        for start in range(at, at + 24 * count, 24):
            pair = block[start : start + 24]
            if not pair[12]:  # an unused place
                break
            numbers += (_number(pair[:12], "sparse map"), _number(pair[12:], "sparse map"))
        if not more:
            return numbers
        if len(numbers) * 12 > limits.header_bytes:
            raise Refused("a sparse file's map is too long", f"more than {limits.header_bytes} bytes")
        block = stream.take(BLOCK)
        at, count, more = 0, _OLD_IN_BLOCK, block[504]


def _pax_sparse(member: Member, records: pax.Records, stream: Stream, limits: Limits) -> None:
    """The three formats that extended headers have for sparse files."""
    if member.kind != FILE:
        raise Refused(f"{shown(member.name)} is ambiguous", "only files can be sparse")
    member.name = records.get(b"GNU.sparse.name", member.name)
    version = (records.get(b"GNU.sparse.major", b"0"), records.get(b"GNU.sparse.minor", b"0"))
    size = records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size"))
    if size is None or (version != (b"1", b"0") and version[0] != b"0"):
        raise Refused(f"{shown(member.name)} is sparse in an unknown way", "its extended header is incomplete")
    member.real_size = pax.decimal(size, "a size")
    if version[0] == b"0":
        numbers = pax.numbers_of(records.get(b"GNU.sparse.map", b""))
        if pax.decimal(records.get(b"GNU.sparse.numblocks", b"0"), "a sparse map") * 2 != len(numbers):
            raise Refused("a sparse file's map is malformed", "it is not as long as it says")
    else:
        reader = pax.MapReader(limits.header_bytes)
        done = False
        while not done:
            if reader.read_bytes + BLOCK > member.size:
                raise Refused("a sparse file's map is malformed", "it is longer than the data")
            done = reader.feed(stream.take(BLOCK))
        member.size -= reader.read_bytes
        numbers = reader.numbers[1 : 1 + 2 * reader.numbers[0]]
    member.sparse = pax.sparse_map(numbers, member.real_size, member.size)
