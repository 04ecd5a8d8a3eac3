"""Root file systems as images of one layer: a directory is packed as it is read, an archive is taken as it is."""

from __future__ import annotations

import os
import stat
import tarfile
from typing import Protocol

from tartarus.images.manifests import MAX_IMAGE_BYTES
from tartarus.model.errors import ImageRefused

_READ_BYTES = 1024**2
_BLOCK = 512
_MAX_ENTRIES = 1_000_000
# What the unpacker takes too, so that a directory is refused before it is copied.
_MAX_DEPTH = 200
_WHITEOUT = ".wh."
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Sink(Protocol):
    """Where an archive goes: a draft of a blob, or a stream."""

    @property
    def size(self) -> int:
        """How many bytes it has taken."""

    def write(self, data: bytes, /) -> object:
        """Take more."""


def pack(fd: int, draft: Sink, max_bytes: int = MAX_IMAGE_BYTES, *, at: str = "") -> None:
    """Write the directory that is open as `fd` into `draft`, as a pax archive; blocks, for a thread.

    The same tree gives the same bytes. Links are kept and never followed; other file systems that are mounted in it
    are left out, as are devices and sockets (a sandbox has its own) and every attribute but the user's. `at`: where in
    the archive the directory is to lie, if not at its top.
    """
    packer = _Packer(draft, os.fstat(fd).st_dev, max_bytes)
    if at:
        packer.top(fd, at)
    packer.directory(fd, f"{at}/" if at else "", 0)
    draft.write(bytes(2 * _BLOCK))


class _Packer:
    def __init__(self, draft: Sink, device: int, max_bytes: int) -> None:
        self._draft = draft
        self._device = device
        self._max_bytes = max_bytes
        self._entries = 0
        self._linked: dict[int, str] = {}

    def top(self, fd: int, path: str) -> None:
        self._head(path, os.fstat(fd), tarfile.DIRTYPE)

    def directory(self, fd: int, path: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ImageRefused("the directory can't be an image", why=f"it is nested deeper than {_MAX_DEPTH}")
        with os.scandir(fd) as found:
            names = sorted(entry.name for entry in found)
        for name in names:
            self._entry(fd, name, f"{path}{name}", depth)

    def _entry(self, parent: int, name: str, path: str, depth: int) -> None:
        if name.startswith(_WHITEOUT):
            raise ImageRefused(
                f"{path[:200]!a} can't be in an image", why="in a layer's archive that name marks a deletion"
            )
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                self._head(path, status, tarfile.SYMTYPE, link=os.readlink(name, dir_fd=parent))
            elif stat.S_ISFIFO(status.st_mode):
                self._head(path, status, tarfile.FIFOTYPE)
            elif stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
                self._open(parent, name, path, depth)
        except OSError as error:
            raise ImageRefused(f"can't read {path[:200]!a}", why=error.strerror or "") from error

    def _open(self, parent: int, name: str, path: str, depth: int) -> None:
        fd = os.open(name, _OPEN, dir_fd=parent)
        try:
            status = os.fstat(fd)  # of what was opened: the name may lead elsewhere by now
            if stat.S_ISDIR(status.st_mode):
                self._head(path, status, tarfile.DIRTYPE, xattrs=_xattrs(fd))
                if status.st_dev == self._device:
                    self.directory(fd, f"{path}/", depth + 1)
            elif stat.S_ISREG(status.st_mode):
                self._file(fd, path, status)
        finally:
            os.close(fd)

    def _file(self, fd: int, path: str, status: os.stat_result) -> None:
        if status.st_nlink > 1:
            first = self._linked.setdefault(status.st_ino, path)
            if first != path:
                self._head(path, status, tarfile.LNKTYPE, link=first)
                return
        self._head(path, status, tarfile.REGTYPE, size=status.st_size, xattrs=_xattrs(fd))
        left = status.st_size
        while left:
            chunk = os.read(fd, min(left, _READ_BYTES))
            if not chunk:
                raise ImageRefused(f"{path[:200]!a} changed while it was read", fix="try again when it is at rest")
            self._write(chunk)
            left -= len(chunk)
        self._write(bytes(-status.st_size % _BLOCK))

    def _head(
        self,
        path: str,
        status: os.stat_result,
        kind: bytes,
        *,
        size: int = 0,
        link: str = "",
        xattrs: dict[str, str] | None = None,
    ) -> None:
        self._entries += 1
        if self._entries > _MAX_ENTRIES:
            raise ImageRefused("the directory can't be an image", why=f"it has more than {_MAX_ENTRIES} entries")
        info = tarfile.TarInfo(path)
        info.type, info.size, info.linkname = kind, size, link
        info.mode, info.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
        info.uid, info.gid = status.st_uid, status.st_gid
        info.pax_headers = {f"SCHILY.xattr.{name}": value for name, value in (xattrs or {}).items()}
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _write(self, data: bytes) -> None:
        if self._draft.size + len(data) > self._max_bytes:
            raise ImageRefused("the directory can't be an image", why=f"it has more than {self._max_bytes} bytes")
        self._draft.write(data)


def _xattrs(fd: int) -> dict[str, str]:
    """The user's attributes, but for overlayfs's, which would mean something to the sandbox's own overlay."""
    try:
        names = sorted(
            name for name in os.listxattr(fd) if name.startswith("user.") and not name.startswith("user.overlay.")
        )
        return {name: os.getxattr(fd, name).decode("utf-8", "surrogateescape") for name in names}
    except OSError:  # a file system without them
        return {}
