"""The extended headers of POSIX.1-2001 (pax) archives, and the sparse maps of GNU tar's formats."""

from __future__ import annotations

import re

from tartarus.images.unpack.inside.refusal import Refused, shown

Records = dict[bytes, bytes]
SparseMap = list[tuple[int, int]]
"""(offset, length) of each stretch of data, ascending."""

XATTR = b"SCHILY.xattr."
_LENGTH = re.compile(rb"([1-9][0-9]{0,9}) ")
_MOST_DIGITS = 19
# GNU tar's first sparse format says these once for each stretch of data.
_REPEATED = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
# What a global header must not set for all entries that follow: readers disagree on whether it does.
_PER_ENTRY = (
    b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"hdrcharset", b"SCHILY.", b"GNU.sparse.", b"LIBARCHIVE.",
)  # fmt: skip


def parse(data: bytes) -> Records:
    """The records of one extended header; those of the first sparse format are put together into its map.

    Raises Refused for anything that readers could understand in different ways.
    """
    records: Records = {}
    stretches: list[bytes] = []
    at = 0
    while at < len(data):
        found = _LENGTH.match(data, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise Refused("an extended header is malformed", f"no record at {shown(data[at : at + 20])}")
        key, equals, value = data[found.end() : end - 1].partition(b"=")
        if not equals or not key or b"\0" in key:
            raise Refused("an extended header is malformed", f"no key in {shown(key)}")
        if key in _REPEATED:
            stretches.append(value)
        elif key in records:
            raise Refused("an extended header is ambiguous", f"it has {shown(key)} twice")
        else:
            records[key] = value
        at = end
    if stretches:
        if b"GNU.sparse.map" in records:
            raise Refused("an extended header is ambiguous", "it has two sparse maps")
        records[b"GNU.sparse.map"] = b",".join(stretches)
    # An empty value takes a record back, which is the same as not to have it.
    return {key: value for key, value in records.items() if value or key.startswith(XATTR)}


def check_global(records: Records) -> None:
    """Refuse a global header that would change the entries after it; a comment, as git makes it, is fine."""
    for key in records:
        if key.startswith(_PER_ENTRY):
            raise Refused("a global header is ambiguous", f"it sets {shown(key)} for all entries")


def decimal(value: bytes, what: str) -> int:
    """A count in decimal digits, of at most 63 bits."""
    if not value.isdigit() or len(value) > _MOST_DIGITS or int(value) >= 1 << 63:
        raise Refused(f"{what} is no number", shown(value))
    return int(value)


def nanoseconds(value: bytes) -> int:
    """A time since 1970 in seconds, with fraction and sign."""
    found = re.fullmatch(rb"(-?)([0-9]{1,12})(?:\.([0-9]{0,30}))?", value)
    if found is None:
        raise Refused("a time is no number", shown(value))
    fraction = int((found[3] or b"").ljust(9, b"0")[:9])
    total = int(found[2]) * 10**9 + fraction
    return -total if found[1] else total


def sparse_map(numbers: list[int], real_size: int, stored: int) -> SparseMap:
    """Check that the stretches ascend, do not overlap, lie in the file and are what is stored."""
    if len(numbers) % 2:
        raise Refused("a sparse file's map is malformed", "an offset without a length")
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    at = 0
    for offset, length in pairs:
        if offset < at or offset + length > real_size:
            raise Refused("a sparse file's map is malformed", f"{length} bytes at {offset}")
        at = offset + length
    if sum(length for _, length in pairs) != stored:
        raise Refused("a sparse file's map is malformed", f"it does not add up to the {stored} bytes stored")
    return pairs


def numbers_of(text: bytes) -> list[int]:
    """The numbers of a map in the first two pax formats: ``offset,length,…``."""
    return [decimal(word, "a sparse map") for word in text.split(b",")] if text else []


class MapReader:
    """The map of the third pax format, which stands before the data: a number to a line, in whole blocks."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._text = b""
        self.numbers: list[int] = []
        self.read_bytes = 0

    def feed(self, block: bytes) -> bool:
        """Take one block of 512 bytes; whether the map is complete."""
        self.read_bytes += len(block)
        if self.read_bytes > self._most:
            raise Refused("a sparse file's map is too long", f"more than {self._most} bytes")
        *lines, self._text = (self._text + block).split(b"\n")
        for line in lines:
            if self._complete():
                break
            self.numbers.append(decimal(line, "a sparse map"))
        if len(self._text) > _MOST_DIGITS and not self._complete():
            raise Refused("a sparse file's map is malformed", "no line's end")
        return self._complete()

    def _complete(self) -> bool:
        return bool(self.numbers) and len(self.numbers) > 2 * self.numbers[0]
