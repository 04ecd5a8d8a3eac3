"""Images as files: the members of a tar archive, or of a directory, by name. Both are hostile.

No name of a member is ever used as a path of the host: an archive is read at the offsets where its members are, a
directory from part to part, never through a link.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncGenerator, Iterator
from typing import Protocol

from tartarus.images.blobs import Fetch
from tartarus.images.unpack.inside.refusal import Refused
from tartarus.images.unpack.inside.stream import Stream
from tartarus.images.unpack.inside.tar import FILE, HARD_LINK, SYMLINK, members
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import ImageRefused

_READ_BYTES = 1024**2
_MAX_MEMBERS = 20_000
"""An image of 512 layers has some 2,000 members in the most talkative of formats."""
ROOTFS_PARTS = frozenset({"bin", "etc", "lib", "sbin", "usr"})
"""A tree with one of these at its top is a root file system."""
_TAR_LIMITS = Limits(header_bytes=64 << 10)


class _Missing(ImageRefused):
    """A file that is not there."""


class Bundle(Protocol):
    """Files by name. `is_rootfs`: they are a root file system's, and were not all listed."""

    is_rootfs: bool

    def names(self) -> list[str]:
        """What is at the top, for messages."""

    def size(self, name: str) -> int | None:
        """How many bytes the file has; None when there is no such file."""

    def file(self, name: str) -> contextlib.AbstractContextManager[tuple[int, int]]:
        """An open file, and the offset at which the named one begins in it. Raises ImageRefused."""


def read(bundle: Bundle, name: str, at_most: int) -> bytes:
    """A small file's content. Raises ImageRefused when it is missing or too large."""
    size = bundle.size(name)
    if size is None or size > at_most:
        why = "it is missing" if size is None else f"it has {size} bytes, and at most {at_most} are taken"
        raise ImageRefused(f"the archive's file {name[:100]!r} can't be read", why=why)
    with bundle.file(name) as (file, start):
        content = os.pread(file, size, start)
    if len(content) != size:
        raise ImageRefused(f"the archive is cut off in {name[:100]!r}")
    return content


def fetch(bundle: Bundle, name: str) -> Fetch:
    """What brings a file into the blob store."""

    async def chunks(offset: int) -> AsyncGenerator[bytes, None]:
        size = bundle.size(name)
        if size is None:
            raise ImageRefused(f"the archive lacks {name[:100]!r}")
        with bundle.file(name) as (file, start):
            while offset < size:
                chunk = await asyncio.to_thread(os.pread, file, min(_READ_BYTES, size - offset), start + offset)
                if not chunk:
                    raise ImageRefused(f"the archive is cut off in {name[:100]!r}")
                yield chunk
                offset += len(chunk)

    return chunks


class _FileStream(Stream):
    """A plain archive in a file: what is skipped is not read."""

    def __init__(self, fd: int) -> None:  # the parent's fields are of a stream; nothing here is used but by name
        self._fd = fd
        self._at = 0
        self._end = os.fstat(fd).st_size

    @property
    def position(self) -> int:
        return self._at

    def pieces(self, count: int) -> Iterator[memoryview]:
        yield memoryview(self.take(count))

    def take(self, count: int) -> bytes:
        data = os.pread(self._fd, count, self._at)
        if len(data) != count:
            raise Refused("the archive is cut off", f"{count - len(data)} more bytes were promised")
        self._at += count
        return data

    def skip(self, count: int) -> None:
        if count > self._end - self._at:
            raise Refused("the archive is cut off", f"{count - (self._end - self._at)} more bytes were promised")
        self._at += count

    def at_end(self) -> bool:
        return self._at >= self._end

    def only_zeros_follow(self) -> bool:
        while data := os.pread(self._fd, _READ_BYTES, self._at):
            if data.strip(b"\0"):
                return False
            self._at += len(data)
        return True


class TarBundle:
    """An uncompressed archive that is open as `fd`, which stays the caller's. Reads its headers; for a thread."""

    def __init__(self, fd: int) -> None:
        """List the members. Raises ImageRefused for what is no archive, and for names that lead outside."""
        self.is_rootfs = False
        self._fd = fd
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._tops: dict[str, None] = {}
        try:
            self._list(_FileStream(fd))
        except Refused as refused:
            raise ImageRefused(f"the archive was refused: {refused.what}", why=refused.why) from None

    def _list(self, stream: _FileStream) -> None:
        for count, member in enumerate(members(stream, _TAR_LIMITS)):
            name = os.path.normpath(os.fsdecode(member.name))
            self._tops[name.partition("/")[0]] = None
            if name.lstrip("/").partition("/")[0] in ROOTFS_PARTS:
                self.is_rootfs = True  # all the rest is for the unpacker to judge
                return
            if count >= _MAX_MEMBERS:
                raise ImageRefused("the archive has too many members for an image", why=f"at most {_MAX_MEMBERS}")
            if name.startswith(("/", "../")) or name == "..":
                raise ImageRefused("the archive has a member that leads outside", why=ascii(name[:100]))
            if member.kind not in {FILE, SYMLINK, HARD_LINK}:
                continue
            if name in self._files or name in self._links or member.sparse is not None:
                raise ImageRefused("the archive is ambiguous", why=f"{name[:100]!a} is there twice or has holes")
            if member.kind == FILE:
                self._files[name] = (stream.position, member.size)
            else:
                base = os.path.dirname(name) if member.kind == SYMLINK else ""
                self._links[name] = os.path.normpath(os.path.join(base, os.fsdecode(member.link)))

    def names(self) -> list[str]:
        """What is at the top."""
        return list(self._tops)

    def _where(self, name: str) -> tuple[int, int] | None:
        """Where a file lies.

        Docker writes a layer that several images have once, and links to it: one such step to another member is
        taken. Nothing is looked up but in the archive's own list.
        """
        name = os.path.normpath(name)
        return self._files.get(self._links.get(name, name))

    def size(self, name: str) -> int | None:
        """The file's size in bytes, or None."""
        found = self._where(name)
        return None if found is None else found[1]

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[tuple[int, int]]:
        """The open file and where in it the named one begins."""
        found = self._where(name)
        if found is None:
            raise ImageRefused(f"the archive lacks {name[:100]!r}")
        yield self._fd, found[0]


class DirectoryBundle:
    """A directory that is open as `fd`, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.is_rootfs = any(part in ROOTFS_PARTS for part in self.names())

    def names(self) -> list[str]:
        """What is at the top."""
        with os.scandir(self._fd) as found:
            return sorted(entry.name for entry, _ in zip(found, range(_MAX_MEMBERS), strict=False))

    def size(self, name: str) -> int | None:
        """The file's size in bytes, or None."""
        try:
            with self.file(name) as (file, _):
                return os.fstat(file).st_size
        except _Missing:
            return None

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[tuple[int, int]]:
        """The open file and where in it the named one begins."""
        *parents, last = name.split("/")
        with contextlib.ExitStack() as opened:
            place = self._fd
            for part in parents:
                place = _step(opened, place, part, os.O_RDONLY | os.O_DIRECTORY)
            file = _step(opened, place, last, os.O_RDONLY | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ImageRefused(f"{name[:100]!r} is not a file")
            yield file, 0


def _step(opened: contextlib.ExitStack, place: int, part: str, flags: int) -> int:
    """Open one part of a path below `place`, which must be no link and lead down."""
    if part in {"", ".", ".."} or "\0" in part:
        raise ImageRefused(f"the image names a file by {part!r}", why="a path must lead down, part by part")
    try:
        file = os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    except FileNotFoundError:
        raise _Missing(f"the image lacks {part[:100]!r}") from None
    except OSError as error:  # ELOOP and ENOTDIR for links, whatever else for devices and sockets
        raise ImageRefused(f"the image's file {part[:100]!r} can't be used", why=error.strerror or "") from None
    opened.callback(os.close, file)
    return file
