"""Attacks by mounting: every call that makes, moves, changes or shows mounts, old and new."""

from __future__ import annotations

import os

from tests.escape.attack import inside
from tests.escape.kit import WORLD, asked, opened

_AT_FDCWD = -100
_RDONLY, _REMOUNT, _BIND, _MOVE, _REC, _UNBINDABLE, _PRIVATE, _SLAVE, _SHARED = (
    1, 32, 4096, 8192, 16384, 1 << 17, 1 << 18, 1 << 19, 1 << 20,
)  # fmt: skip


@inside("mounts/file-systems", tries="mount every kind of file system", container="EPERM", process="EPERM")
def file_systems() -> dict[str, str]:
    os.mkdir("target")
    kinds = (
        "proc", "sysfs", "tmpfs", "ramfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "cpuset", "overlay", "bpf", "debugfs",
        "tracefs", "securityfs", "mqueue", "hugetlbfs", "configfs", "fusectl", "fuse", "nfs", "9p", "virtiofs", "ext4", "xfs",
        "btrfs", "squashfs", "iso9660", "vfat", "binfmt_misc", "autofs", "efivarfs", "pstore", "binder", "aufs", "nsfs", "pidfs",
    )  # fmt: skip
    return {kind: asked("mount", "none", "target", kind, 0, "") for kind in kinds}


@inside("mounts/binds", tries="bind, move and reshape existing mounts", container="EPERM", process="EPERM")
def binds() -> dict[str, str]:
    os.mkdir("target")
    return {
        "bind": asked("mount", "/", "target", None, _BIND, None),
        "bind all": asked("mount", "/", "target", None, _BIND | _REC, None),
        "bind /proc": asked("mount", "/proc", "target", None, _BIND, None),
        "move": asked("mount", "/proc", "target", None, _MOVE, None),
        "writable root": asked("mount", None, "/", None, _REMOUNT, None),
        "writable programs": asked("mount", None, "/usr", None, _REMOUNT | _BIND, None),
        "writable settings": asked("mount", None, "/proc/sys", None, _REMOUNT | _BIND, None),
        "shared": asked("mount", None, "/", None, _SHARED | _REC, None),
        "slave": asked("mount", None, "/", None, _SLAVE | _REC, None),
        "private": asked("mount", None, "/", None, _PRIVATE, None),
        "unbindable": asked("mount", None, "/", None, _UNBINDABLE, None),
        "magic in the flags": asked("mount", "/", "target", None, 0xC0ED0000 | _BIND, None),
    }


@inside("mounts/unmount", tries="take away what covers secrets", container="EPERM", process="EPERM")
def unmount() -> dict[str, str]:
    found = {}
    for path in ("/", "/proc", "/proc/sys", "/proc/keys", "/proc/kcore", "/usr", "/dev", "/sys", "."):
        for name, flags in (("plain", 0), ("detach", 2), ("force", 1), ("expire", 4), ("no follow", 10)):
            found[f"{path} {name}"] = asked("umount2", path, flags)
    return found


@inside("mounts/new-calls", tries="mount by the calls of Linux 5.2 and later", container="EPERM", process="EPERM")
def new_calls() -> dict[str, str]:
    attributes = b"\0" * 32
    return {
        "fsopen": asked("fsopen", "tmpfs", 0),
        "fsconfig": asked("fsconfig", 0, 1, "size", "1m", 0),
        "fsmount": asked("fsmount", 0, 0, 0),
        "fspick": asked("fspick", _AT_FDCWD, "/", 0),
        "open_tree": asked("open_tree", _AT_FDCWD, "/", 1),
        "open_tree without a copy": asked("open_tree", _AT_FDCWD, "/", 0),
        "open_tree_attr": asked("open_tree_attr", _AT_FDCWD, "/", 1, attributes, 32),
        "move_mount": asked("move_mount", _AT_FDCWD, "/proc", _AT_FDCWD, "/tmp", 0),
        "mount_setattr": asked("mount_setattr", _AT_FDCWD, "/usr", 0, attributes, 32),
        "mount_setattr, all": asked("mount_setattr", _AT_FDCWD, "/", 0x8000, attributes, 32),
    }


@inside("mounts/listing", tries="list mounts of other namespaces by number", container="ENOSYS", process="ENOSYS")
def listing() -> dict[str, str]:
    request = b"\x20\0\0\0\0\0\0\0" + b"\xff" * 8 + bytes(16)
    return {
        "statmount": asked("statmount", request, bytes(512), 512, 0),
        "listmount": asked("listmount", request, bytes(512), 64, 0),
    }


@inside("mounts/change-root", tries="change the root directory", container="EPERM", process="EPERM")
def change_root() -> dict[str, str]:
    os.mkdir("target")
    return {
        "chroot": asked("chroot", "target"),
        "chroot here": asked("chroot", "."),
        "pivot_root": asked("pivot_root", ".", "."),
        "pivot_root below": asked("pivot_root", "target", "target"),
    }


@inside(
    "mounts/user-file-systems", tries="serve a file system of its own to the kernel", container="ENOENT|EACCES",
    process="EACCES|ENOENT",
)  # fmt: skip
def user_file_systems() -> dict[str, str]:
    paths = (
        "/dev/fuse",
        "/dev/cuse",
        "/dev/loop-control",
        "/dev/loop0",
        "/dev/mapper/control",
        "/dev/nbd0",
        "/dev/autofs",
    )
    return {path: opened(path, os.O_RDWR) for path in paths}


@inside(
    "mounts/other-namespaces", tries="mount after entering a namespace of its own", container="EPERM", process="EPERM"
)
def other_namespaces() -> dict[str, str]:
    new_user, new_mounts = 0x10000000, 0x00020000
    return {
        "user": asked("unshare", new_user),
        "user and mounts": asked("unshare", new_user | new_mounts),
        "mounts": asked("unshare", new_mounts),
        "mount in it": asked("mount", "none", WORLD["neighbour"]["home"], "tmpfs", 0, None),
    }


@inside(
    "mounts/quota-and-swap", tries="swap to a file, account to a file, set quotas", container="EPERM", process="EPERM"
)
def quota_and_swap() -> dict[str, str]:
    with open("file", "wb") as file:
        file.write(bytes(8192))
    return {
        "swapon": asked("swapon", "file", 0),
        "swapoff": asked("swapoff", "nothing"),
        "acct": asked("acct", "file"),
        "quotactl": asked("quotactl", 0x80000100, "/dev/root", 0, None),
        "quotactl_fd": asked("quotactl_fd", 0, 0x80000100, 0, None),
    }
