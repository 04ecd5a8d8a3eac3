"""The rows of a table of an SQLite file, read without SQLite.

rpm keeps its packages in one, and an image's file is the image's choice: SQLite would run what its schema says (views,
triggers, virtual tables) and has had its share of crashes on crafted files. Reading a table needs none of that: it is a
tree of pages (https://www.sqlite.org/fileformat2.html), walked here with every page visited once at the most.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_MAGIC = b"SQLite format 3\0"
_INTERIOR, _LEAF = 5, 13
_MAX_DEPTH = 40
_MAX_ROWS = 1_000_000
_MAX_COLUMNS = 64
_INTEGERS = (0, 1, 2, 3, 4, 6, 8)  # bytes of serial types 0 to 6

Value = bytes | int | None


class NotReadable(ValueError):
    """No SQLite file, a damaged one, or one that hides something."""


class Table:
    """The file `content`; `rows` reads one of its tables."""

    def __init__(self, content: bytes) -> None:
        if len(content) < 512 or not content.startswith(_MAGIC):
            raise NotReadable("it is no SQLite file")
        size = int.from_bytes(content[16:18])
        self._size = 65536 if size == 1 else size
        # Pages of 512 bytes to 64 KiB; at least 480 of them are used.
        self._usable = self._size - content[20]
        if self._size < 512 or self._size & (self._size - 1) or self._usable < 480:
            raise NotReadable(f"its pages have {size} bytes")
        self._content = content
        self._visited: set[int] = set()
        self._rows = self._bytes = 0

    def rows(self, name: str) -> Iterator[tuple[Value, ...]]:
        """The rows of the table `name`, in the order of their ids. Raises NotReadable, also while it is iterated."""
        self._visited.clear()
        self._rows = self._bytes = 0
        roots = [row[3] for row in self._walk(1, 0) if len(row) >= 4 and row[0] == b"table" and row[1] == name.encode()]
        if len(roots) != 1 or not isinstance(roots[0], int):
            raise NotReadable(f"it has no table {name}")
        yield from self._walk(roots[0], 0)

    def _page(self, number: int) -> memoryview:
        if number in self._visited or not 0 < number <= len(self._content) // self._size:
            raise NotReadable(f"its page {number} is missing, or in two places")
        self._visited.add(number)
        return memoryview(self._content)[(number - 1) * self._size : number * self._size]

    def _walk(self, number: int, depth: int) -> Iterator[tuple[Value, ...]]:
        page = self._page(number)
        start = 100 if number == 1 else 0
        kind, cells = page[start], int.from_bytes(page[start + 3 : start + 5])
        header = {_INTERIOR: 12, _LEAF: 8}.get(kind)
        if header is None or depth > _MAX_DEPTH or start + header + 2 * cells > self._usable:
            raise NotReadable(f"its page {number} is none of a table")
        places = struct.unpack_from(f">{cells}H", page, start + header)
        if kind == _LEAF:
            for place in places:
                yield self._record(self._payload(page, place))
            return
        children = [self._number(page, place) for place in places]
        for child in (*children, self._number(page, start + 8)):
            yield from self._walk(child, depth + 1)

    def _number(self, page: memoryview, place: int) -> int:
        if place + 4 > self._usable:
            raise NotReadable("a cell ends outside of its page")
        return int.from_bytes(page[place : place + 4])

    def _payload(self, page: memoryview, place: int) -> bytes:
        """A leaf cell's content, put together from its overflow pages."""
        length, place = _varint(page, place)
        _, place = _varint(page, place)
        most = self._usable - 35
        local = length
        if length > most:
            least = (self._usable - 12) * 32 // 255 - 23
            local = least + (length - least) % (self._usable - 4)
            if local > most:
                local = least
        self._rows += 1
        self._bytes += length
        # Cells of a page can point to the same bytes, so that a small file could have any number of large rows.
        if self._bytes > len(self._content) or self._rows > _MAX_ROWS:
            raise NotReadable("its rows are more than it can hold")
        if place + local > self._usable:
            raise NotReadable("a cell ends outside of its page")
        content = bytearray(page[place : place + local])
        if length > local:
            following = self._number(page, place + local)
            while len(content) < length:
                overflow = self._page(following)
                following = int.from_bytes(overflow[:4])
                content += overflow[4 : 4 + min(self._usable - 4, length - len(content))]
        return bytes(content)

    @staticmethod
    def _record(payload: bytes) -> tuple[Value, ...]:
        view = memoryview(payload)
        end, place = _varint(view, 0)
        if end > len(payload):
            raise NotReadable("a row's header is longer than the row")
        values: list[Value] = []
        at = end
        while place < end:
            if len(values) >= _MAX_COLUMNS:
                raise NotReadable("a row has too many columns")
            serial, place = _varint(view, place)
            if serial in {8, 9}:
                values.append(serial - 8)
                continue
            if serial in {10, 11}:
                raise NotReadable("a row has a value of no known type")
            length = (serial - 12) // 2 if serial >= 12 else 8 if serial == 7 else _INTEGERS[serial]
            if at + length > len(payload):
                raise NotReadable("a row ends in the middle of a value")
            raw = payload[at : at + length]
            at += length
            # A float (7) comes as its bytes: nobody here wants one.
            values.append(None if serial == 0 else raw if serial >= 7 else int.from_bytes(raw, signed=True))
        return tuple(values)


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """SQLite's integer of up to nine bytes at `place`, and where it ends."""
    number = 0
    for count in range(9):
        if place >= len(data):
            raise NotReadable("a number ends outside of its page")
        byte = data[place]
        place += 1
        if count == 8:
            return number << 8 | byte, place
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            return number, place
    raise AssertionError("unreachable")
