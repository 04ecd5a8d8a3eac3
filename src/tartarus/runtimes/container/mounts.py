"""A user's `--mount`: host paths as detached, id-mapped mounts that a guest attaches by descriptor.

The guest never sees the host's path, only a mount; ids are mapped so that files the sandbox's root
makes belong, on the host, to the user who asked (kernel 5.12 and later; file systems that can't be
id-mapped are refused with what to do).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from tartarus.guest.syscalls import number
from tartarus.model.errors import InvalidRequest, IsolationUnavailable, PermissionRefused
from tartarus.model.sandbox import Mount
from tartarus.runtimes.idmap import IdMap

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_IDMAP = 1, 2, 4, 0x100000
_libc = ctypes.CDLL(None, use_errno=True)


def prepare(mounts: Sequence[Mount], owner_uid: int, id_map: IdMap) -> list[int]:
    """Descriptors of detached mounts, one for each. `owner_uid`: the host user whose files the guest's root may use."""
    if not mounts:
        return []
    fds: list[int] = []
    try:
        user_namespace = _namespace_for(owner_uid, id_map) if id_map.privileged else -1
        try:
            for mount in mounts:
                fds.append(_detached(mount, owner_uid, user_namespace))
        finally:
            if user_namespace >= 0:
                os.close(user_namespace)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _detached(mount: Mount, owner_uid: int, user_namespace: int) -> int:
    source = _open_as_owner(mount, owner_uid)
    try:
        tree = _libc.syscall(number("open_tree"), source, b"", _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH)
        if tree < 0:
            raise _refused(mount, ctypes.get_errno())
    finally:
        os.close(source)
    attributes = _ATTR_NOSUID | _ATTR_NODEV | (_ATTR_RDONLY if mount.read_only else 0)
    if user_namespace >= 0:
        attributes |= _ATTR_IDMAP
    request = struct.pack("<QQQQ", attributes, 0, 0, max(user_namespace, 0))
    if _libc.syscall(number("mount_setattr"), tree, b"", _AT_EMPTY_PATH, request, len(request)) < 0:
        error = ctypes.get_errno()
        os.close(tree)
        raise _refused(mount, error)
    return int(tree)


def _open_as_owner(mount: Mount, owner_uid: int) -> int:
    """Open the source, refusing what the user who asked could not reach himself."""
    try:
        fd = os.open(mount.source, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(f"mount source {mount.source!r} can't be used", why=error.strerror or "", fix="check the path") from error
    if os.geteuid() == 0 and owner_uid != 0 and not _owner_may_reach(fd, owner_uid, mount.read_only):
        os.close(fd)
        raise PermissionRefused(f"mount source {mount.source!r} is not yours to share", fix="choose a directory that you may read and write")
    return fd


def _owner_may_reach(fd: int, owner_uid: int, read_only: bool) -> bool:
    status = os.fstat(fd)
    return status.st_uid == owner_uid or (read_only and status.st_mode & 0o005 == 0o005)


def _refused(mount: Mount, error: int) -> InvalidRequest | IsolationUnavailable:
    if error in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
        return IsolationUnavailable(
            f"{mount.source!r} can't be mounted into a sandbox",
            why=f"{os.strerror(error)}: its file system or this kernel has no id-mapped mounts",
            fix="use a directory on ext4, xfs, btrfs or tmpfs and kernel 5.12 or later, or copy the files with tartarus cp",
        )
    return InvalidRequest(f"mount source {mount.source!r} can't be used", why=os.strerror(error))


def _namespace_for(owner_uid: int, id_map: IdMap) -> int:
    """A user namespace that maps the owner's files to the sandbox's root; held only by its descriptor."""
    gone_read, gone_write = os.pipe()
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if _libc.unshare(0x10000000) == 0:
                os.write(ready_write, b"1")
            os.close(gone_write)
            os.read(gone_read, 1)
        finally:
            os._exit(0)
    os.close(ready_write)
    os.close(gone_read)
    try:
        if os.read(ready_read, 1) != b"1":
            raise IsolationUnavailable("no user namespace can be made for a mount")
        line = f"{owner_uid} {id_map.base} 1"
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(line)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(gone_write)
        os.close(ready_read)
        os.waitpid(pid, 0)
