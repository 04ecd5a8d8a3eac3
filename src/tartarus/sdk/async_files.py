"""The async twin of `files`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator

import anyio.to_thread
import msgspec

from tartarus.model.errors import FileFailed
from tartarus.model.sandbox import FileEvent, FileInfo
from tartarus.sdk import calls
from tartarus.sdk.async_transport import AsyncTransport
from tartarus.sdk.decoding import LineDecoder
from tartarus.sdk.files import CHUNK_BYTES, Content, is_missing, parts_of


class AsyncFiles:
    """`AsyncSandbox.files`. Paths are absolute paths inside the sandbox; failures raise FileFailed."""

    def __init__(self, transport: AsyncTransport, sandbox_id: str) -> None:
        self._transport = transport
        self._id = sandbox_id

    async def read(self, path: str) -> bytes:
        """A file's content."""
        async with self.open(path) as parts:
            return b"".join([part async for part in parts])

    async def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """A file's content as text."""
        return (await self.read(path)).decode(encoding)

    @contextlib.asynccontextmanager
    async def open(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """A file's content in pieces, for files that are too large to hold."""
        async with self._transport.stream(calls.read_file(self._id, path)) as answer:
            yield answer

    async def write(
        self,
        path: str,
        data: Content | AsyncIterable[bytes],
        *,
        mode: int | None = None,
        parents: bool = True,
    ) -> None:
        """Write a file, whole or not at all: an interrupted write leaves what was there.

        `data` may be text (as UTF-8), a binary file (read in a thread) or pieces; `mode` are the permission
        bits, those of the file that was there or 0644 if not given; `parents` makes missing directories.
        """
        call = calls.write_file(self._id, path, mode=mode, parents=parents)
        await self._transport.call(call, data if isinstance(data, AsyncIterable) else _parts(data))

    async def list(self, path: str) -> list[FileInfo]:
        """A directory's entries."""
        return await self._transport.call(calls.list_files(self._id, path))

    async def stat(self, path: str) -> FileInfo:
        """A file's attributes; a symbolic link's own."""
        return await self._transport.call(calls.stat_file(self._id, path))

    async def exists(self, path: str) -> bool:
        """Whether there is a file, directory or link at that path."""
        try:
            await self.stat(path)
        except FileFailed as error:
            if is_missing(error):
                return False
            raise
        return True

    async def mkdir(self, path: str, *, parents: bool = True) -> None:
        """Make a directory; with `parents` those above it too, and an existing one is fine."""
        await self._transport.call(calls.make_directory(self._id, path, parents=parents))

    async def move(self, source: str, target: str) -> None:
        """Rename a file or directory, replacing a file at `target`."""
        await self._transport.call(calls.move_file(self._id, source, target))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or an empty directory; with `recursive` a directory and all in it."""
        await self._transport.call(calls.remove_file(self._id, path, recursive=recursive))

    @contextlib.asynccontextmanager
    async def watch(self, path: str, *, recursive: bool = False) -> AsyncIterator[AsyncIterator[FileEvent]]:
        """Changes below a directory as they happen: ``async with files.watch("/work") as events:``."""
        async with self._transport.stream(calls.watch_files(self._id, path, recursive=recursive)) as answer:
            yield _events(answer)


async def _parts(data: Content) -> AsyncIterator[bytes]:
    if not isinstance(data, (bytes, bytearray, memoryview, str)) and hasattr(data, "read"):
        while part := await anyio.to_thread.run_sync(data.read, CHUNK_BYTES):
            yield part
    else:
        for part in parts_of(data):
            yield part


async def _events(answer: AsyncIterator[bytes]) -> AsyncIterator[FileEvent]:
    decoder = LineDecoder()
    async for part in answer:
        for line in decoder.receive(part):
            yield msgspec.convert(line, FileEvent)
