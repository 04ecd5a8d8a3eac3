"""A value in memory that is kept out of swap, core dumps and forked children, and wiped when it is let go of."""

from __future__ import annotations

import ctypes
import mmap
from typing import NoReturn

_MADV_DONTFORK, _MADV_DONTDUMP = 10, 16
_libc = ctypes.CDLL(None, use_errno=True)


class Secret:
    """One value. Nothing shows it but `reveal`, whose copy the caller lets go of as soon as it can."""

    __slots__ = ("_pages", "_size", "is_locked")

    def __init__(self, value: bytes | bytearray | memoryview) -> None:
        self._size = len(value)
        room = max(self._size, 1)
        self._pages = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages.madvise(_MADV_DONTDUMP)
        self._pages.madvise(_MADV_DONTFORK)
        view = ctypes.c_char.from_buffer(self._pages)
        # Refused where RLIMIT_MEMLOCK is used up; the rest still holds, and whoever made it says so.
        self.is_locked = _libc.mlock(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(room)) == 0
        del view
        self._pages[: self._size] = bytes(value)

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return "Secret(…)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written down")

    def reveal(self) -> bytes:
        """A copy of the value."""
        return self._pages[: self._size]

    def replace_in(self, text: bytes, by: bytes) -> bytes:
        """`text` with `by` in place of the value, wherever that stands."""
        with memoryview(self._pages) as pages, pages[: self._size] as value:
            if text.find(value) < 0:
                return text
            return text.replace(value, by)

    def close(self) -> None:
        """Wipe it; safe to repeat."""
        if not self._pages.closed:
            self._pages[: self._size] = bytes(self._size)
            self._pages.close()
            self._size = 0
