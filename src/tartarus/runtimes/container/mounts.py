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
from pathlib import Path

from tartarus.guest.syscalls import number
from tartarus.model.errors import InvalidRequest, IsolationUnavailable
from tartarus.model.sandbox import Mount
from tartarus.runtimes.container.layout import CLONE_NEWUSER, unshare_program
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.nursery import Nursery

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_IDMAP = 1, 2, 4, 0x100000
_RESOLVE_NO_SYMLINKS = 4
_libc = ctypes.CDLL(None, use_errno=True)


def prepare(mounts: Sequence[Mount], user_namespace: int) -> list[int]:
    """Descriptors of detached mounts, one for each. `user_namespace`: of `owner_namespace`."""
    fds: list[int] = []
    try:
        for mount in mounts:
            fds.append(_detached(mount, user_namespace))  # noqa: PERF401 - what was opened is closed on failure
    except BaseException:
        close_all(fds)
        raise
    return fds


def _detached(mount: Mount, user_namespace: int) -> int:
    source = _open(mount)
    try:
        tree = _libc.syscall(number("open_tree"), source, b"", _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH)
        if tree < 0:
            raise _refused(mount, ctypes.get_errno())
    finally:
        os.close(source)
    attributes = _ATTR_NOSUID | _ATTR_NODEV | _ATTR_IDMAP | (_ATTR_RDONLY if mount.read_only else 0)
    request = struct.pack("<QQQQ", attributes, 0, 0, user_namespace)
    if _libc.syscall(number("mount_setattr"), tree, b"", _AT_EMPTY_PATH, request, len(request)) < 0:
        reason = ctypes.get_errno()
        os.close(tree)
        raise _refused(mount, reason)
    return int(tree)


def _open(mount: Mount) -> int:
    """Its source, by a path without links: one may be the work of a sandbox that the mount was given to."""
    how = struct.pack("<QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS)
    fd = _libc.syscall(number("openat2"), _AT_FDCWD, os.fsencode(mount.source), how, len(how))
    if fd >= 0:
        return int(fd)
    reason = ctypes.get_errno()
    why = os.strerror(reason)
    if reason == errno.ELOOP:
        why = "it leads through a symbolic link, which was not there when the mount was asked for"
    raise InvalidRequest(f"mount source {mount.source!r} can't be used", why=why, fix="check the path")


def _refused(mount: Mount, error: int) -> InvalidRequest | IsolationUnavailable:
    if error in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
        return IsolationUnavailable(
            f"{mount.source!r} can't be mounted into a sandbox",
            why=f"{os.strerror(error)}: its file system or this kernel has no id-mapped mounts",
            fix="use a directory on ext4, xfs, btrfs or tmpfs and Linux 5.12 or later, or tartarus cp",
        )
    return InvalidRequest(f"mount source {mount.source!r} can't be used", why=os.strerror(error))


async def owner_namespace(id_map: IdMap) -> int:
    """A user namespace that maps the daemon user's own files to the sandbox's root; held only by its descriptor."""
    helper = await Nursery.spawn("mounts", shared_pids=False)
    try:
        await helper.run(unshare_program(CLONE_NEWUSER))
        for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
            Path(f"/proc/{helper.pid}/{name}").write_text(f"{own} {id_map.base} 1", encoding="ascii")
        return os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        helper.close()
        await helper.gone()
