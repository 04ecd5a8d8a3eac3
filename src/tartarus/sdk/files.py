"""The sandbox's files, through its guest: they never touch the host's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import IO

import msgspec

from tartarus.model.errors import FileFailed
from tartarus.model.sandbox import FileEvent, FileInfo
from tartarus.sdk import calls
from tartarus.sdk.decoding import LineDecoder
from tartarus.sdk.transport import Transport

CHUNK_BYTES = 256 * 1024
Content = bytes | str | IO[bytes] | Iterable[bytes]


class Files:
    """`Sandbox.files`. Paths are absolute paths inside the sandbox; failures raise FileFailed."""

    def __init__(self, transport: Transport, sandbox_id: str) -> None:
        self._transport = transport
        self._id = sandbox_id

    def read(self, path: str) -> bytes:
        """A file's content."""
        with self.open(path) as parts:
            return b"".join(parts)

    def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """A file's content as text."""
        return self.read(path).decode(encoding)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Iterator[bytes]]:
        """A file's content in pieces, for files that are too large to hold: ``with files.open(p) as parts:``."""
        with self._transport.stream(calls.read_file(self._id, path)) as answer:
            yield answer

    def write(
        self,
        path: str,
        data: Content,
        *,
        mode: int | None = None,
        parents: bool = True,
    ) -> None:
        """Write a file, whole or not at all: an interrupted write leaves what was there.

        `data` may be text (as UTF-8), a binary file or pieces; `mode` are the permission
        bits, those of the file that was there or 0644 if not given; `parents` makes missing directories.
        """
        self._transport.call(calls.write_file(self._id, path, mode=mode, parents=parents), parts_of(data))

    def list(self, path: str) -> list[FileInfo]:
        """A directory's entries."""
        return self._transport.call(calls.list_files(self._id, path))

    def stat(self, path: str) -> FileInfo:
        """A file's attributes; a symbolic link's own."""
        return self._transport.call(calls.stat_file(self._id, path))

    def exists(self, path: str) -> bool:
        """Whether there is a file, directory or link at that path."""
        try:
            self.stat(path)
        except FileFailed as error:
            if is_missing(error):
                return False
            raise
        return True

    def mkdir(self, path: str, *, parents: bool = True) -> None:
        """Make a directory; with `parents` those above it too, and an existing one is fine."""
        self._transport.call(calls.make_directory(self._id, path, parents=parents))

    def move(self, source: str, target: str) -> None:
        """Rename a file or directory, replacing a file at `target`."""
        self._transport.call(calls.move_file(self._id, source, target))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or an empty directory; with `recursive` a directory and all in it."""
        self._transport.call(calls.remove_file(self._id, path, recursive=recursive))

    @contextlib.contextmanager
    def watch(self, path: str, *, recursive: bool = False) -> Iterator[Iterator[FileEvent]]:
        """Changes below a directory as they happen: ``with files.watch("/work") as events:``."""
        with self._transport.stream(calls.watch_files(self._id, path, recursive=recursive)) as answer:
            yield _events(answer)


def is_missing(error: FileFailed) -> bool:
    """Whether a file operation failed because nothing is there."""
    text = f"{error.what} {error.why}"
    return "No such file or directory" in text or "Not a directory" in text


def parts_of(data: Content) -> Iterator[bytes]:
    """Any kind of content as pieces."""
    if isinstance(data, str):
        data = data.encode()
    if isinstance(data, (bytes, bytearray, memoryview)):
        for start in range(0, len(data), CHUNK_BYTES):
            yield bytes(data[start : start + CHUNK_BYTES])
    elif hasattr(data, "read"):
        while part := data.read(CHUNK_BYTES):
            yield part
    else:
        yield from data


def _events(answer: Iterator[bytes]) -> Iterator[FileEvent]:
    decoder = LineDecoder()
    for part in answer:
        for line in decoder.receive(part):
            yield msgspec.convert(line, FileEvent)
