"""Modes, owners, times and attributes of files, changed on a sandbox's behalf by the daemon.

Landlock does not mediate them, so at process level, where a sandbox may have the user's own id, `chmod` of
any file of the user would work, by path or through a descriptor that may only read it. The filter hands such
calls over instead (SECCOMP_RET_USER_NOTIF): the daemon finds the file as the caller would, makes sure that it
lies in the sandbox's own directory, and makes the change. The rest of this package builds programs; this is
the one part that serves while a guest runs.

Races change nothing: the path is read once and leads to a descriptor, the descriptor is judged by where its
file lies, and the change is made through it. A file that lies in the sandbox's directory is the sandbox's to
change, however it was reached.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tartarus.guest.syscalls import number
from tartarus.runtimes.confine.listening import Call, Listener, answer, check_waiting, next_call

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

_AT_FDCWD, _AT_EMPTY_PATH, _AT_SYMLINK_NOFOLLOW = -100, 0x1000, 0x100
_PATH_BYTES, _VALUE_BYTES, _NAME_BYTES, _PAGE = 4096, 65536, 256, 4096
_NO_CHANGE: Final = 0xFFFF_FFFF
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """Where a call keeps its arguments: indexes, None for what it has not.

    Without a path, and for a null path where the call knows such, `directory` is the descriptor of the file itself.
    """

    change: Callable[[Caller, int, tuple[int, ...]], None]
    path: int | None
    directory: int | None = None
    flags: int | None = None
    follow: bool = True
    null_path: bool = False

    def names_descriptor(self, args: tuple[int, ...]) -> bool:
        """Whether these arguments mean an open file."""
        return self.path is None or (self.null_path and not args[self.path])

    def rest(self, args: tuple[int, ...]) -> tuple[int, ...]:
        """The arguments after those that name the file."""
        last = self.path if self.path is not None else self.directory
        return args[(last or 0) + 1 :]


class Caller:
    """The process that made a call, held by its /proc directory; what is read from it is hostile."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._proc = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._memory = os.open("mem", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        except OSError:
            os.close(self._proc)
            raise

    def close(self) -> None:
        """Let go of it."""
        os.close(self._memory)
        os.close(self._proc)

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes of its memory. Raises EFAULT."""
        try:
            data = os.pread(self._memory, size, address) if address < 1 << 63 else b""
        except OSError:
            data = b""
        if len(data) != size:
            raise OSError(errno.EFAULT, "bad address")
        return data

    def text(self, address: int, limit: int) -> bytes:
        """A NUL-terminated string of its memory, page by page, for the next one may not be there."""
        found = b""
        while b"\0" not in found:
            if len(found) >= limit:
                raise OSError(errno.ENAMETOOLONG, "too long")
            at = address + len(found)
            found += self.read(at, _PAGE - at % _PAGE)
        return found[: found.index(b"\0")]

    def open(self, path: bytes, directory: int, flags: int, *, follow: bool) -> int:
        """A path descriptor of the file that it means. `directory` and `flags` are as in the *at calls."""
        base = self._directory(directory) if not path.startswith(b"/") else None
        try:
            if not path:
                if not flags & _AT_EMPTY_PATH:
                    raise OSError(errno.ENOENT, "empty path")
                return os.dup(base) if base is not None else -1
            for own in (b"/proc/self/", b"/proc/thread-self/"):
                if path.startswith(own):
                    path = b"/proc/%d/" % self.pid + path[len(own) :]
            how = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
            return os.open(path, how, dir_fd=base)
        finally:
            if base is not None:
                os.close(base)

    def descriptor(self, number: int) -> int:
        """A path descriptor of a file that it has open."""
        if number == _AT_FDCWD:
            raise OSError(errno.EFAULT, "no path")
        return self._directory(number)

    def _directory(self, directory: int) -> int:
        name = "cwd" if directory == _AT_FDCWD else f"fd/{directory}"
        try:
            return os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=self._proc)
        except FileNotFoundError:
            raise OSError(errno.EBADF, "no such descriptor") from None


def _change_mode(_caller: Caller, file: int, args: tuple[int, ...]) -> None:
    os.chmod(f"/proc/self/fd/{file}", args[0] & 0o1777)


def _change_owner(_caller: Caller, file: int, args: tuple[int, ...]) -> None:
    """Only to what it is already: anything else takes a privilege that no sandbox has."""
    now = os.stat(f"/proc/self/fd/{file}", follow_symlinks=True)
    if args[0] & _NO_CHANGE not in {now.st_uid, _NO_CHANGE} or args[1] & _NO_CHANGE not in {now.st_gid, _NO_CHANGE}:
        raise OSError(errno.EPERM, "not the owner's to give")


def _change_times(read: Callable[[Caller, int], bytes]) -> Callable[[Caller, int, tuple[int, ...]], None]:
    def change(caller: Caller, file: int, args: tuple[int, ...]) -> None:
        times = read(caller, args[0]) if args[0] else None
        if _libc.syscall(number("utimensat"), _AT_FDCWD, b"/proc/self/fd/%d" % file, times, 0) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    return change


def _timespecs(caller: Caller, address: int) -> bytes:
    return caller.read(address, 32)


def _seconds(caller: Caller, address: int) -> bytes:
    accessed, modified = struct.unpack("<qq", caller.read(address, 16))
    return struct.pack("<4q", accessed, 0, modified, 0)


def _microseconds(caller: Caller, address: int) -> bytes:
    values = struct.unpack("<4q", caller.read(address, 32))
    if not all(0 <= part < 1_000_000 for part in values[1::2]):
        raise OSError(errno.EINVAL, "not a time")
    return struct.pack("<4q", values[0], values[1] * 1000, values[2], values[3] * 1000)


def _attribute(caller: Caller, address: int) -> str:
    name = caller.text(address, _NAME_BYTES)
    if name.startswith(b"system."):
        raise OSError(errno.EOPNOTSUPP, "no access lists")  # so that cp and its kin fall back to modes
    if not name.startswith(b"user."):
        raise OSError(errno.EPERM, "only attributes of users may be changed")
    return os.fsdecode(name)


def _set_attribute(caller: Caller, file: int, args: tuple[int, ...]) -> None:
    if args[2] > _VALUE_BYTES:
        raise OSError(errno.E2BIG, "too large")
    value = caller.read(args[1], args[2]) if args[2] else b""
    os.setxattr(f"/proc/self/fd/{file}", _attribute(caller, args[0]), value, args[3] & _NO_CHANGE)


def _remove_attribute(caller: Caller, file: int, args: tuple[int, ...]) -> None:
    os.removexattr(f"/proc/self/fd/{file}", _attribute(caller, args[0]))


_SHAPES: Final = {
    "chmod": Shape(_change_mode, 0),
    "fchmod": Shape(_change_mode, None, 0),
    "fchmodat": Shape(_change_mode, 1, 0),
    "fchmodat2": Shape(_change_mode, 1, 0, 3),
    "chown": Shape(_change_owner, 0),
    "fchown": Shape(_change_owner, None, 0),
    "lchown": Shape(_change_owner, 0, follow=False),
    "fchownat": Shape(_change_owner, 1, 0, 4),
    "utime": Shape(_change_times(_seconds), 0),
    "utimes": Shape(_change_times(_microseconds), 0),
    "futimesat": Shape(_change_times(_microseconds), 1, 0),
    "utimensat": Shape(_change_times(_timespecs), 1, 0, 3, null_path=True),
    "setxattr": Shape(_set_attribute, 0),
    "fsetxattr": Shape(_set_attribute, None, 0),
    "lsetxattr": Shape(_set_attribute, 0, follow=False),
    "removexattr": Shape(_remove_attribute, 0),
    "fremovexattr": Shape(_remove_attribute, None, 0),
    "lremovexattr": Shape(_remove_attribute, 0, follow=False),
}
BROKERED: Final = frozenset(_SHAPES)
"""The calls that the filter hands over."""


def serve_one(listener: int, roots: Sequence[str]) -> None:
    """Answer one waiting call. `roots`: real paths of the directories whose files the sandbox may change."""
    call = next_call(listener)
    if call is None:
        return
    try:
        error = _serve(listener, call, roots)
    except OSError as failure:
        error = failure.errno or errno.EIO
    answer(listener, call, error)


def _serve(listener: int, call: Call, roots: Sequence[str]) -> int:
    try:
        caller = Caller(call.pid)
    except OSError:
        return errno.EPERM  # undumpable: nothing may be read from it
    try:
        # Only now is it certain that the directory just opened is the caller's, not that of a later process.
        check_waiting(listener, call)
        _make_change(caller, _SHAPES[call.name], call.args, roots)
    finally:
        caller.close()
    return 0


def _make_change(caller: Caller, shape: Shape, args: tuple[int, ...], roots: Sequence[str]) -> None:
    file = _named(caller, shape, args)
    try:
        place = os.readlink(f"/proc/self/fd/{file}")
        if not any(place == root or place.startswith(f"{root}/") for root in roots):
            raise OSError(errno.EPERM, "outside the sandbox's directory")
        shape.change(caller, file, shape.rest(args))
    finally:
        os.close(file)


def _named(caller: Caller, shape: Shape, args: tuple[int, ...]) -> int:
    """A path descriptor of the file that a call is about."""
    directory = _signed(args[shape.directory]) if shape.directory is not None else _AT_FDCWD
    if shape.path is None or shape.names_descriptor(args):
        return caller.descriptor(directory)
    flags = args[shape.flags] & _NO_CHANGE if shape.flags is not None else 0
    follow = shape.follow and not flags & _AT_SYMLINK_NOFOLLOW
    return caller.open(caller.text(args[shape.path], _PATH_BYTES), directory, flags, follow=follow)


def _signed(value: int) -> int:
    low = value & _NO_CHANGE
    return low - (1 << 32) if low >= 1 << 31 else low


class MetadataBroker(Listener):
    """Serves one sandbox. `link`: see `Listener`; `roots`: the directories whose files it may change."""

    def __init__(self, link: socket.socket, roots: Sequence[str]) -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)
        super().__init__(link)

    def serve(self, listener: int) -> None:
        """Answer one waiting call."""
        serve_one(listener, self._roots)
