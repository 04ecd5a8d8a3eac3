"""A guest's files: attributes, listings, transfers with flow control, watches. Failures are FileFailed."""

from __future__ import annotations

import asyncio
import os
import stat as modes
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from typing import TYPE_CHECKING

from tartarus.guest.connection import Connection, Signal, Stream, fail, settle
from tartarus.guest.protocol import (
    ENTRY,
    MAX_DATA,
    MORE,
    U32,
    U32_U32,
    BadFrame,
    Reader,
    ToGuest,
    ToHost,
    WriteFlag,
    read_payload,
    text,
    write_payload,
)
from tartarus.guest.session import Session
from tartarus.guest.watch import FileWatch
from tartarus.model.errors import FileFailed, TartarusError
from tartarus.model.sandbox import FileInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_WINDOW = 1024 * 1024
_MAX_ENTRIES = 100_000
_EVERYTHING = 0xFFFF_FFFF_FFFF_FFFF
_KEEP_MODE = 0xFFFF_FFFF
_KINDS = {
    modes.S_IFREG: "file",
    modes.S_IFDIR: "dir",
    modes.S_IFLNK: "symlink",
    modes.S_IFIFO: "fifo",
    modes.S_IFSOCK: "socket",
    modes.S_IFCHR: "char",
    modes.S_IFBLK: "block",
}


def read_error(payload: bytes, doing: str, path: str) -> FileFailed:
    """The error that an ERROR frame carries."""
    reader = Reader(payload)
    (number,) = reader.take(U32)
    what = reader.text()
    reader.done()
    place = path if what in ("", doing) or "/" in what else f"{path} (at {what!r})"
    return FileFailed(f"can't {doing} {place} in the sandbox", why=os.strerror(number & 0xFFFF))


def read_entry(reader: Reader, directory: str = "") -> FileInfo:
    """The next file of an answer; names in a listing are put behind their directory."""
    path = directory + reader.text()
    mode, uid, gid, size, mtime_ns = reader.take(ENTRY)
    link = reader.text()
    kind = _KINDS.get(modes.S_IFMT(mode))
    if kind is None:
        raise BadFrame(f"a file of mode {mode:o}")
    return FileInfo(path, kind, size, modes.S_IMODE(mode), uid, gid, mtime_ns / 1e9, link)


class Answer(Stream):
    """Waits for one RESULT of `size` bytes (None: any)."""

    __slots__ = ("_doing", "_path", "_result", "_size")

    def __init__(self, connection: Connection, doing: str, path: str, size: int | None = 0) -> None:
        super().__init__(connection)
        self._doing = doing
        self._path = path
        self._size = size
        self._result: asyncio.Future[bytes] = connection.loop.create_future()

    @property
    def settled(self) -> bool:
        """Whether the answer is there."""
        return self._result.done()

    async def result(self) -> bytes:
        """The answer's payload. Cancelling the wait cancels the request."""
        try:
            return await self._result
        except asyncio.CancelledError:
            self.connection.cancel(self)
            raise

    def on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        """Take the answer."""
        if kind == ToHost.ERROR:
            self.connection.forget(self)
            fail(self._result, read_error(payload, self._doing, self._path))
        elif kind == ToHost.RESULT and not flags and self._size in (None, len(payload)):
            self.connection.forget(self)
            settle(self._result, payload)
        else:
            super().on_frame(kind, flags, payload)

    def on_lost(self, error: TartarusError) -> None:
        """The guest is gone."""
        fail(self._result, error)


class _Listing(Answer):
    __slots__ = ("_directory", "entries")

    def __init__(self, connection: Connection, path: str) -> None:
        super().__init__(connection, "list", path)
        self._directory = path if path.endswith("/") else path + "/"
        self.entries: list[FileInfo] = []

    def on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        if kind != ToHost.RESULT:
            super().on_frame(kind, flags, payload)
            return
        reader = Reader(payload)
        while not reader.at_end:
            self.entries.append(read_entry(reader, self._directory))
        if len(self.entries) > _MAX_ENTRIES:
            raise BadFrame("a listing without end")
        if not flags & MORE:
            super().on_frame(kind, 0, b"")


class _Reading(Stream):
    """A file on its way here; unread, it costs at most READ_WINDOW bytes."""

    __slots__ = ("_allowed", "_consumed", "_end", "_more", "_path", "_pieces", "_session")

    def __init__(self, connection: Session, path: str) -> None:
        super().__init__(connection)
        self._session = connection
        self._path = path
        self._pieces: deque[bytes] = deque()
        self._more = Signal(connection.loop)
        self._end: TartarusError | bool = False
        self._allowed = READ_WINDOW
        self._consumed = 0

    async def read(self) -> bytes | None:
        """The next piece, None at the end."""
        while not self._pieces or self._session.is_quiet:
            if self._session.is_quiet:
                await self._session.flowing()
                continue
            if isinstance(self._end, TartarusError):
                raise self._end
            if self._end:
                return None
            await self._more.wait()
        piece = self._pieces.popleft()
        self._consumed += len(piece)
        if self._consumed * 4 >= READ_WINDOW and not self._end:
            self._allowed += self._consumed
            self.connection.send(ToGuest.CREDIT, self.id, U32.pack(self._consumed))
            self._consumed = 0
        return piece

    def on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == ToHost.FILE_DATA:
            self._allowed -= len(payload)
            if self._allowed < 0:
                raise BadFrame("more of a file than was granted")
            if payload:
                self._pieces.append(payload)
                self._more.wake()
        elif kind == ToHost.RESULT and not flags and len(payload) == 8:
            self._finish(True)
        elif kind == ToHost.ERROR:
            self._finish(read_error(payload, "read", self._path))
        else:
            super().on_frame(kind, flags, payload)

    def on_lost(self, error: TartarusError) -> None:
        self._finish(error)

    def allowances(self) -> tuple[int, int]:
        return self._allowed, 0

    def _finish(self, end: TartarusError | bool) -> None:
        self.connection.forget(self)
        self._end = end
        self._more.wake()


def _cut(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[at : at + MAX_DATA] for at in range(0, len(view), MAX_DATA))


class FileCalls(Session):
    """The file operations of a channel. Paths are absolute in the sandbox; all raise FileFailed."""

    async def ask(self, answer: Answer, kind: ToGuest, payload: bytes) -> bytes:
        """Send a request and wait for its answer."""
        self.begin(answer, kind, payload)
        return await answer.result()

    async def stat(self, path: str) -> FileInfo:
        """One file's attributes; a symbolic link's own."""
        reader = Reader(await self.ask(Answer(self, "stat", path, None), ToGuest.STAT, text(path)))
        try:
            info = read_entry(reader)
            reader.done()
        except BadFrame as error:
            raise self.breach(error) from error
        return info

    async def list(self, path: str) -> list[FileInfo]:
        """A directory's entries, by name. Refused above 100,000."""
        listing = _Listing(self, path)
        await self.ask(listing, ToGuest.LIST, text(path))
        return sorted(listing.entries, key=lambda entry: entry.path)

    async def read(self, path: str, offset: int = 0, limit: int | None = None) -> AsyncIterator[bytes]:
        """A regular file's bytes from `offset`, at most `limit`, in pieces as they come."""
        reading = _Reading(self, path)
        window = read_payload(path, offset, _EVERYTHING if limit is None else limit, READ_WINDOW)
        self.begin(reading, ToGuest.READ, window)
        try:
            while (piece := await reading.read()) is not None:
                yield piece
        finally:
            self.cancel(reading)

    async def write(
        self,
        path: str,
        data: AsyncIterable[bytes] | bytes,
        *,
        mode: int | None = None,
        append: bool = False,
        parents: bool = False,
        exclusive: bool = False,
        in_memory: bool = False,
    ) -> int:
        """Write a file and return its size in bytes; it appears when all of it was written, or not at all.

        `mode` defaults to the old file's, or 0644. With `append` bytes are added to what is there, at
        once; with `parents` missing directories are made; with `exclusive` an existing file is refused;
        with `in_memory` a directory that is not on a tmpfs.
        A symbolic link at `path` is replaced, not followed (but `append` follows it).
        """
        flags = WriteFlag.APPEND * append | WriteFlag.PARENTS * parents | WriteFlag.EXCLUSIVE * exclusive
        flags |= WriteFlag.IN_MEMORY * in_memory
        answer = Answer(self, "write", path, 8)
        self.begin(answer, ToGuest.WRITE, write_payload(path, _KEEP_MODE if mode is None else mode, flags))
        try:
            if isinstance(data, (bytes, bytearray, memoryview)):
                await self._send_pieces(answer, bytes(data))
            else:
                async for piece in data:
                    await self._send_pieces(answer, piece)
        except BaseException:
            self.cancel(answer)
            raise
        if not answer.settled:
            self.send(ToGuest.WRITE_END, answer.id)
        return int.from_bytes(await answer.result(), "little")

    async def _send_pieces(self, answer: Answer, data: bytes) -> None:
        for piece in _cut(data):
            if answer.settled:
                await answer.result()
            self.send(ToGuest.WRITE_DATA, answer.id, piece)
            await self.drained()

    async def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Make a directory; with `parents` also those above it, and one that exists is fine."""
        await self.ask(Answer(self, "make directory", path), ToGuest.MKDIR, text(path) + U32_U32.pack(mode, parents))

    async def move(self, source: str, target: str) -> None:
        """Rename, replacing what is at `target` as rename(2) does; not between file systems."""
        await self.ask(Answer(self, "move", source), ToGuest.MOVE, text(source) + text(target))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a symbolic link, or a directory; one that is not empty only when `recursive`."""
        await self.ask(Answer(self, "remove", path), ToGuest.REMOVE, text(path) + U32.pack(recursive))

    def watch(self, path: str, *, recursive: bool = False) -> FileWatch:
        """Changes of `path` (a directory: in it) from now on."""
        watch = FileWatch(self, path)
        self.begin(watch, ToGuest.WATCH, text(path) + U32.pack(recursive))
        return watch
