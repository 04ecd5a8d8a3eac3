"""From the entries of a layer's archive to a directory as overlayfs stacks it.

Whiteouts become character devices 0:0, opaque directories the attribute ``user.overlay.opaque``. Whatever an entry
says, it is written below the directory that was opened first, through directories that this layer made: a path is
walked name by name, links are never followed, and nothing that exists is ever opened for writing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from tartarus.images.unpack.inside import tar
from tartarus.images.unpack.inside.cursor import Cursor, Parts, remove
from tartarus.images.unpack.inside.refusal import Refused, shown
from tartarus.images.unpack.inside.stream import Stream
from tartarus.images.unpack.inside.tar import Member
from tartarus.images.unpack.limits import IDS, NOBODY, Limits

OPAQUE = "user.overlay.opaque"
WHITEOUT_PREFIX = b".wh."
OPAQUE_NAME = b".wh..wh..opq"
# What aufs kept its own books in, and left in some images of its time; it means nothing to anybody else.
_AUFS_PREFIX = b".wh..wh."
_MOST_NAME, _MOST_PATH = 255, 4095
_ALWAYS_FIT = 1024
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SET_ID = 0o6000
# What the largest file systems keep; the kernel cuts a time to what its own can.
_EARLIEST_NS, _LATEST_NS = -(2**31) * 10**9, 2**34 * 10**9
_OVERLAY_ATTRIBUTES = (b"user.overlay.", b"trusted.overlay.")


class Facts:
    """What came of an archive, for the record."""

    def __init__(self) -> None:
        self.entries = 0
        self.bytes = 0
        self.whiteouts = 0
        self.opaque_root = 0
        self.implied_directories = 0
        self.devices_left_out = 0
        self.attributes_left_out = 0
        self.nobodys = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return vars(self)


class Extractor:
    """Writes entries below the directory `root`. `owners`: whether ids can be set, or all files are one user's."""

    def __init__(self, root: int, limits: Limits, *, owners: bool) -> None:
        self._root = root
        self._limits = limits
        self._owners = owners
        self._cursor = Cursor(root)
        self._sources = Cursor(root)
        # Modes and times of directories are set at the end: filling them would change the times, and a
        # set-group-id bit would hand its group to what is made below.
        self._directories: dict[Parts, Member] = {(): _implied()}
        self._opaque: set[Parts] = set()
        self.facts = Facts()

    def extract(self, stream: Stream) -> Facts:
        """Write everything. Raises Refused for what is not acceptable, OSError for what the disk refuses."""
        for member in tar.members(stream, self._limits):
            self._add(member, stream)
        self._settle_directories()
        return self.facts

    def _add(self, member: Member, stream: Stream) -> None:
        self.facts.entries += 1
        if self.facts.entries > self._limits.entries:
            raise Refused("the layer has too many entries", f"more than {self._limits.entries}")
        parts = self._parts(member.name, "the path")
        if any(part.startswith(_AUFS_PREFIX) for part in parts) and parts[-1] != OPAQUE_NAME:
            return
        if any(part.startswith(WHITEOUT_PREFIX) for part in parts[:-1]):
            raise Refused(f"{shown(member.name)} can't be", "it lies below the mark of something deleted")
        if not parts:
            if member.kind != tar.DIRECTORY:
                raise Refused("the layer replaces the root directory", "its root is no directory")
            self._directories[parts] = self._checked(member)
        elif parts[-1].startswith(WHITEOUT_PREFIX):
            self._delete(member, parts)
        else:
            self._write(self._checked(member), parts, stream)

    def _parts(self, path: bytes, what: str) -> Parts:
        """The names in a path, which is always below the root, with or without a slash in front."""
        parts = tuple(part for part in path.split(b"/") if part not in {b"", b"."})
        if b".." in parts:
            raise Refused(f"{what} {shown(path)} leads out of the layer", "it has '..' in it")
        if len(parts) > self._limits.depth:
            raise Refused(f"{what} {shown(path)} is too deep", f"more than {self._limits.depth} directories")
        if len(path) > _MOST_PATH or any(len(part) > _MOST_NAME for part in parts):
            raise Refused(f"{what} {shown(path)} is too long", f"{_MOST_PATH} bytes, {_MOST_NAME} a name at most")
        if b"\0" in path:
            raise Refused(f"{what} {shown(path)} has a zero byte in it", "readers cut it at different places")
        return parts

    def _checked(self, member: Member) -> Member:
        """The entry with what it must not set refused, and what it can't have left out."""
        for name in list(member.xattrs):
            if name.startswith(_OVERLAY_ATTRIBUTES):
                raise Refused(f"{shown(member.name)} forges an overlay's attribute", shown(name))
            # Others need privileges that no sandbox has (security.capability is void under no_new_privs), and
            # links and pipes can't have any.
            if not name.startswith(b"user.") or member.kind not in {tar.FILE, tar.DIRECTORY}:
                del member.xattrs[name]
                self.facts.attributes_left_out += 1
        if member.uid >= IDS or member.gid >= IDS:
            self.facts.nobodys += 1
            member.uid = member.uid if member.uid < IDS else NOBODY
            member.gid = member.gid if member.gid < IDS else NOBODY
        member.mtime_ns = min(max(member.mtime_ns, _EARLIEST_NS), _LATEST_NS)
        return member

    def _write(self, member: Member, parts: Parts, stream: Stream) -> None:
        name = parts[-1]
        if member.kind == tar.HARD_LINK:
            self._link(member, parts)
            return
        directory = self._cursor.to(parts[:-1], self._imply)
        if member.kind == tar.DIRECTORY:
            self._make_directory(directory, parts)
            self._directories[parts] = member
        elif member.kind in {tar.CHARACTER, tar.BLOCK_DEVICE}:
            if member.kind == tar.CHARACTER and member.device == (0, 0):
                raise Refused(f"{shown(member.name)} forges a deletion", "overlayfs marks one with this device")
            # No sandbox could open it: its mounts are nodev, and the kernel lets none be made here.
            self._make_room(directory, parts)
            self.facts.devices_left_out += 1
        elif member.kind == tar.SYMLINK:
            if not 0 < len(member.link) <= _MOST_PATH:
                raise Refused(f"{shown(member.name)} links to nothing", f"a target of {len(member.link)} bytes")
            self._create(directory, parts, lambda: os.symlink(member.link, name, dir_fd=directory))
            self._own(directory, name, member)
        elif member.kind == tar.FIFO:
            self._create(directory, parts, lambda: os.mkfifo(name, 0o600, dir_fd=directory))
            self._own(directory, name, member)
        else:
            self._write_file(directory, parts, member, stream)

    def _write_file(self, directory: int, parts: Parts, member: Member, stream: Stream) -> None:
        self.facts.bytes += member.real_size
        if self.facts.bytes > self._limits.bytes:
            raise Refused("the layer's files are too large", f"together more than {self._limits.bytes} bytes")
        name = parts[-1]
        # The mode at once, unless setting the owner would take its set-id bits back.
        mode = 0o600 if member.mode & _SET_ID else member.mode
        try:
            fd = os.open(name, _CREATE, mode, dir_fd=directory)
        except FileExistsError:
            self._make_room(directory, parts)
            fd = os.open(name, _CREATE, mode, dir_fd=directory)
        try:
            for offset, length in member.sparse if member.sparse is not None else ((0, member.size),):
                if member.sparse is not None:
                    os.lseek(fd, offset, os.SEEK_SET)
                for piece in stream.pieces(length):
                    _write_all(fd, piece)
            if member.sparse is not None:
                os.ftruncate(fd, member.real_size)
            if self._owners and (member.uid or member.gid):
                os.fchown(fd, member.uid, member.gid)
            if member.xattrs:
                _set_attributes(fd, member)
            if member.mode & _SET_ID:
                os.fchmod(fd, member.mode)
            os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
        finally:
            os.close(fd)

    def _link(self, member: Member, parts: Parts) -> None:
        """A hard link to something that this layer has already; nothing else can be linked to, in any layer."""
        target = self._parts(member.link, "the link's target")
        if target[: len(parts)] == parts:
            raise Refused(f"{shown(member.name)} replaces what it links to", shown(member.link))
        try:
            source = self._sources.to(target[:-1])
            status = os.stat(target[-1], dir_fd=source, follow_symlinks=False) if target else None
        except OSError:
            status = None
        if status is None or stat.S_ISDIR(status.st_mode) or stat.S_ISCHR(status.st_mode):
            raise Refused(
                f"{shown(member.name)} is a hard link to nothing",
                f"the layer has no file {shown(member.link)} before it",
            )
        directory = self._cursor.to(parts[:-1], self._imply)

        def link() -> None:
            os.link(target[-1], parts[-1], src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)

        self._create(directory, parts, link)

    def _delete(self, member: Member, parts: Parts) -> None:
        """A whiteout, or the mark of an opaque directory. Neither touches what this layer itself has there."""
        if member.kind not in {tar.FILE, tar.HARD_LINK}:
            raise Refused(f"{shown(member.name)} can't be", "the mark of something deleted must be a file")
        directory = self._cursor.to(parts[:-1], self._imply)
        if parts[-1] == OPAQUE_NAME:
            self._opaque.add(parts[:-1])
            self.facts.opaque_root |= len(parts) == 1
            return
        name = parts[-1][len(WHITEOUT_PREFIX) :]
        if name in {b"", b".", b".."}:
            raise Refused(f"{shown(member.name)} can't be", "it deletes the directory that it is in, or the one above")
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=directory)
        except FileExistsError:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                self._opaque.add((*parts[:-1], name))
            return
        self.facts.whiteouts += 1

    def _create(self, directory: int, parts: Parts, make: Callable[[], None]) -> None:
        try:
            make()
        except FileExistsError:
            self._make_room(directory, parts)
            make()

    def _make_room(self, directory: int, parts: Parts) -> None:
        """Remove what this layer has at a path, so that its later entry there is the one that counts."""
        for cursor in (self._cursor, self._sources):
            cursor.leave(parts)
        with contextlib.suppress(FileNotFoundError):
            remove(directory, parts, self._forget)

    def _forget(self, parts: Parts) -> None:
        self._directories.pop(parts, None)
        self._opaque.discard(parts)

    def _make_directory(self, directory: int, parts: Parts) -> None:
        name = parts[-1]
        try:
            os.mkdir(name, 0o700, dir_fd=directory)
        except FileExistsError:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                return
            os.unlink(name, dir_fd=directory)
            os.mkdir(name, 0o700, dir_fd=directory)
            if stat.S_ISCHR(status.st_mode):
                # It was deleted by this layer, and is made anew by it: nothing of the old one shows through.
                self._opaque.add(parts)

    def _imply(self, directory: int, parts: Parts, error: OSError) -> None:
        """A directory that the archive does not mention before it has something in it."""
        deleted = False
        if not isinstance(error, FileNotFoundError):
            status = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
            deleted = stat.S_ISCHR(status.st_mode)
            if not deleted:
                kind = "a link" if stat.S_ISLNK(status.st_mode) else "no directory"
                raise Refused(
                    f"the layer has something below {shown(b'/'.join(parts))}", f"that is {kind} in the same layer"
                ) from error
            os.unlink(parts[-1], dir_fd=directory)
        os.mkdir(parts[-1], 0o700, dir_fd=directory)
        if deleted:
            self._opaque.add(parts)
        self._directories[parts] = _implied()
        self.facts.implied_directories += 1

    def _own(self, directory: int, name: bytes, member: Member) -> None:
        """Owner, mode and time of what can't be opened."""
        if self._owners and (member.uid or member.gid):
            os.chown(name, member.uid, member.gid, dir_fd=directory, follow_symlinks=False)
        if member.kind != tar.SYMLINK:
            os.chmod(name, member.mode, dir_fd=directory)
        os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=directory, follow_symlinks=False)

    def _settle_directories(self) -> None:
        for parts in sorted(self._directories):
            member = self._directories[parts]
            directory = self._cursor.to(parts)
            if self._owners:
                os.fchown(directory, member.uid, member.gid)
            _set_attributes(directory, member)
            if parts in self._opaque:
                _make_opaque(directory)
            os.fchmod(directory, member.mode)
            os.utime(directory, ns=(member.mtime_ns, member.mtime_ns))
        self._cursor.close()
        self._sources.close()


def _implied() -> Member:
    member = Member()
    member.mode = 0o755
    return member


def _make_opaque(directory: int) -> None:
    """Hide all that lies below; deletions in it are void then, and overlayfs would list them by name."""
    os.setxattr(directory, OPAQUE, b"y")
    for name in os.listdir(directory):
        if stat.S_ISCHR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=directory)


def _write_all(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]


def _set_attributes(fd: int, member: Member) -> None:
    for name, value in member.xattrs.items():
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            # Where attributes are small, no space means a full disk; else that they do not fit beside a file.
            too_many = error.errno == errno.ENOSPC and sum(map(len, member.xattrs.values())) > _ALWAYS_FIT
            if too_many or error.errno in {errno.E2BIG, errno.ERANGE, errno.EINVAL}:
                raise Refused(
                    f"{shown(member.name)} has attributes that can't be kept", f"{shown(name)}: {error.strerror}"
                ) from error
            raise
