"""A directory of a monitor's own, for monitors that are told paths: what it may open, and where it listens.

The monitor owns it, and a guest may have taken the monitor over. So the host follows no link there, connects to
nothing but a socket that the monitor itself made, and reads no more than it expects.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from tartarus.model.errors import GuestFailed
from tartarus.runtimes.microvm import memory


class Home:
    """One monitor's directory. Paths inside are told relative to it, so that they are the same for every clone."""

    def __init__(self, place: Path, below: str = "") -> None:
        """A new one in `place`; or, with `below`, as a directory of that name in a new one."""
        self._top = place / secrets.token_hex(8)
        self.path = self._top / below
        self.uid = -1
        self.path.mkdir(mode=0o700, parents=bool(below))
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def belong_to(self, uid: int) -> None:
        """It is that user's from now on."""
        os.fchown(self.fd, uid, uid)
        self.uid = uid

    def close_to_monitor(self) -> None:
        """Its monitor listens: from now on it makes no file here, and so can't fill the host's disk."""
        os.fchmod(self.fd, 0o711)
        os.fchown(self.fd, 0, 0)

    def open_to_monitor(self) -> None:
        """It is to write something that we asked for."""
        os.fchown(self.fd, self.uid, self.uid)
        os.fchmod(self.fd, 0o700)

    @property
    def id(self) -> str:
        """What tells it from others: letters and digits."""
        return self._top.name

    def point(self, name: str, number: int) -> None:
        """Let `name` be the descriptor that the monitor inherits under that number."""
        os.symlink(f"/proc/self/fd/{number}", name, dir_fd=self.fd)

    def directory(self, name: str, *, written: bool = True) -> None:
        """Make a directory there; the monitor can write to it if it is to be `written`."""
        os.mkdir(name, 0o700, dir_fd=self.fd)
        held = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            if written:
                os.fchown(held, self.uid, self.uid)
            else:
                os.fchmod(held, 0o711)
        finally:
            os.close(held)

    def put(self, name: str, content: bytes) -> None:
        """Place a file there that the monitor can read."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._parent(name) as (parent, last), os.fdopen(os.open(last, flags, 0o444, dir_fd=parent), "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o444)

    def link(self, name: str, target: str) -> None:
        """Let `name` lead to another name there."""
        with self._parent(name) as (parent, last):
            os.symlink(target, last, dir_fd=parent)

    def has(self, name: str) -> bool:
        """Whether something of that name is there."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def holds(self, name: str, fd: int) -> bool:
        """Whether a name there is the very file behind a descriptor."""
        try:
            return os.path.samestat(os.stat(name, dir_fd=self.fd, follow_symlinks=False), os.fstat(fd))
        except OSError:
            return False

    def connect(self, name: str) -> socket.socket:
        """Connect to a socket that the monitor listens on. Raises OSError, GuestFailed for what is no such socket.

        Held open before it is looked at, and reached through that descriptor: it can't be exchanged in between.
        """
        held = self.hold_socket(name)
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect(f"/proc/self/fd/{held}")
            except BaseException:
                sock.close()
                raise
            return sock
        finally:
            os.close(held)

    def hold_socket(self, name: str) -> int:
        """A descriptor of such a socket, to reach it through `/proc/self/fd`."""
        held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        status = os.fstat(held)
        if stat.S_ISSOCK(status.st_mode) and status.st_uid == self.uid:
            return held
        os.close(held)
        raise GuestFailed("a monitor misbehaves", why=f"its {name} is not a socket of its own")

    def take(self, name: str, most: int, into: int) -> None:
        """Copy a file that the monitor wrote into a descriptor, holes left holes, and remove it there."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with self._parent(name) as (parent, last):
                held = os.open(last, flags, dir_fd=parent)
        except OSError as error:
            raise GuestFailed("a monitor misbehaves", why=f"it did not write {name}: {error.strerror}") from error
        try:
            status = os.fstat(held)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != self.uid or not 0 < status.st_size <= most:
                raise GuestFailed("a monitor misbehaves", why=f"{name} is not a file of 1 to {most} bytes")
            os.ftruncate(into, 0)
            memory.copy_data(held, into)
        finally:
            os.close(held)
        self.drop(name)

    def drop(self, name: str) -> None:
        """Remove a file there, if it is there."""
        with contextlib.suppress(OSError), self._parent(name) as (parent, last):
            os.unlink(last, dir_fd=parent)

    def remove(self) -> None:
        """Remove it with all that the monitor left; safe to repeat."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            shutil.rmtree(self._top, ignore_errors=True)

    @contextlib.contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        """The directory that a name is in, held open: the monitor could put a link in its place."""
        directory, _, last = name.rpartition("/")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        held = os.open(directory, flags, dir_fd=self.fd) if directory else os.dup(self.fd)
        try:
            yield held, last
        finally:
            os.close(held)
