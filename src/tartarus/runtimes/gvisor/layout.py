"""The programs of the gVisor level: the small world that runsc works in, and how each runsc is started there.

A nursery stands in mount and pid namespaces of its own, in a root that holds only what follows; killing it leaves
nothing of its guests. A guest alone is ended by its group, or where there are none by a pid namespace of its own.

    /runsc            the runtime                 /l0, /l1 …   the template's layers, read-only, top first
    /b0, /b1 …        the template's binds        /g           the guest's own: storage, overlay, bundle, state
    /w                what runsc writes down about guests, the template's image, and where others are mounted
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from tartarus.guest.program import Fd, Program
from tartarus.model.sandbox import Mount
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.confine import seccomp
from tartarus.runtimes.container.layout import (
    AT_FDCWD,
    ATTR_NOEXEC,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    EEXIST,
    ENOENT,
    MNT_DETACH,
    MOVE_MOUNT_F_EMPTY_PATH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    SAFE_READ_ONLY,
)
from tartarus.runtimes.gvisor.spec import AGENT

NURSERY_FLAGS = CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET
GUEST_FLAGS = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
SHARED_FLAGS = CLONE_NEWNS
"""For a guest that is ended by its group: it is in the nursery's pid namespace."""
ROOT, BUNDLE, STATE = "/g/root", "/g/bundle", "/g/state"
SHARED_STATE, IMAGES = "/w/state", "/w/image"
IMAGE_FILES = ("checkpoint.img", "pages_meta.img", "pages.img")
"""What runsc writes when it saves a guest without compression, in the order in which it is told where."""
DEVICES = ("null", "zero", "full", "random", "urandom")
AT_RECURSIVE = 0x8000
O_WRONLY_CREATE = 0o101
_CLOSE_ON_EXEC_RANGE = 4  # CLOSE_RANGE_CLOEXEC
_LAST_FD = 0xFFFF_FFFF
CHANNEL, LOG, FIRST_ENTRY = 0, 1, 2
"""Passed descriptors; then come the cgroup's entries, the storage, the user's mounts."""


def _mkdir(program: Program, path: str, mode: int = 0o755) -> None:
    program.syscall("mkdirat", AT_FDCWD, path, mode, step=f"make {path}", ok=EEXIST)


def _tmpfs(program: Program, target: str, flags: int, data: str) -> None:
    program.syscall("mount", "tmpfs", target, "tmpfs", flags, data, step=f"mount a tmpfs at {target}")


def _bind(program: Program, source: str, target: str, attributes: int, *, flags: int = 0, ok: int = 0) -> None:
    program.syscall("mount", source, target, 0, MS_BIND | flags, 0, step=f"bind {source}", ok=ok)
    request = program.blob(struct.pack("<QQQQ", attributes, 0, 0, 0))
    program.syscall("mount_setattr", AT_FDCWD, target, AT_RECURSIVE, request, request.size,
                    step=f"restrict {source}", ok=ok)  # fmt: skip


def _place(program: Program, path: str, *, is_directory: bool) -> None:
    if is_directory:
        _mkdir(program, path)
    else:
        program.syscall("mknodat", AT_FDCWD, path, 0o100644, 0, step=f"make {path}", ok=EEXIST)


def stage_program(
    stage: Path, rootfs: RootFs, runsc: Path, agent: Path, *, image_bytes: int, owner: int, kvm: bool = False
) -> Program:
    """Build the root that runsc works in at `stage`, in a mount namespace of the nursery's own, and enter it."""
    base = str(stage)
    program = Program()
    program.syscall("umask", 0o22, step="umask")
    program.syscall("mount", 0, "/", 0, MS_REC | MS_PRIVATE, 0, step="make mounts private")
    _tmpfs(program, base, MS_NOSUID, "size=16m,nr_inodes=1k,mode=755")
    for name in ("proc", "dev", "sys", "tmp", "g", "w", "a", "a/.tartarus", "a/tmp", "etc"):
        _mkdir(program, f"{base}/{name}")
    for name in ("tmp", "a/tmp"):
        program.syscall("fchmodat", AT_FDCWD, f"{base}/{name}", 0o1777, step=f"open {name} to all")
    # A copy: an overlay does not see what is mounted in its lower directories.
    _copy(program, str(agent), f"{base}/a{AGENT}", 0o555)
    for name in ("a", "a/.tartarus", f"a{AGENT}", "a/tmp"):
        program.syscall("fchownat", AT_FDCWD, f"{base}/{name}", owner, owner, 0, step=f"give {name} to the sandbox")
    _place(program, f"{base}/runsc", is_directory=False)
    _bind(program, str(runsc), f"{base}/runsc", SAFE_READ_ONLY)
    for device in (*DEVICES, *(("kvm",) if kvm else ())):
        _place(program, f"{base}/dev/{device}", is_directory=False)
        program.syscall("mount", f"/dev/{device}", f"{base}/dev/{device}", 0, MS_BIND, 0, step=f"bind /dev/{device}",
                        ok=ENOENT)  # fmt: skip
    _bind(program, "/sys", f"{base}/sys", SAFE_READ_ONLY | ATTR_NOEXEC, flags=MS_REC)
    for index, layer in enumerate(rootfs.layers):
        _mkdir(program, f"{base}/l{index}")
        _bind(program, str(layer), f"{base}/l{index}", SAFE_READ_ONLY)
    for index, (source, _target) in enumerate(rootfs.binds):
        _place(program, f"{base}/b{index}", is_directory=Path(source).is_dir())
        _bind(program, source, f"{base}/b{index}", SAFE_READ_ONLY)
    _tmpfs(program, f"{base}/w", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={image_bytes},nr_inodes=64k,mode=700")
    for path in (SHARED_STATE, IMAGES):
        _mkdir(program, base + path)
    program.syscall("chdir", base, step="enter the stage")
    program.syscall("pivot_root", ".", ".", step="change root")
    program.syscall("umount2", ".", MNT_DETACH, step="let go of the host's root")
    program.syscall("chdir", "/", step="go to /")
    return program


def proc_program() -> Program:
    """As process 1 of the nursery's pid namespace."""
    program = Program()
    _mount_proc(program)
    return program


def _mount_proc(program: Program) -> None:
    program.syscall("mount", "proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "", step="mount /proc")


def guest_program(
    rootfs: RootFs,
    mounts: Sequence[Mount],
    config: bytes,
    argv: Sequence[str],
    *,
    n_entries: int,
    owner: int,
    own_pids: bool = True,
    network: bool = False,
) -> Program:
    """Join the cgroup, mount the guest's storage and root, write its bundle, and become runsc.

    `owner`: the host id of the guest's root. `argv`: runsc's command line. `network`: the network namespace that it is
    to have is passed last.
    """
    program = Program()
    _join(program, n_entries)
    if network:
        last = FIRST_ENTRY + n_entries + 1 + len(mounts)
        program.syscall("setns", Fd(last), CLONE_NEWNET, step="enter the sandbox's network")
    program.syscall("umask", 0o22, step="umask")
    if own_pids:
        _mount_proc(program)
    if network:
        # runsc takes a namespace with this directory's rmem_default for the host's own, and refuses. Since Linux 6.14
        # every namespace has that file; this one was just made (`attach` looks), so the file is what is wrong.
        _tmpfs(program, "/proc/sys/net/core", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,nr_inodes=1,mode=555")
    _tmpfs(program, "/g", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4m,nr_inodes=256,mode=755")
    for name in ("s", "root", "bundle", "state"):
        _mkdir(program, f"/g/{name}")
    storage = FIRST_ENTRY + n_entries
    _attach(program, storage, "/g/s", "attach the sandbox's own storage")
    for name in ("u", "w"):
        _mkdir(program, f"/g/s/{name}")
    program.syscall("fchownat", AT_FDCWD, "/g/s/u", owner, owner, 0, step="give the sandbox its storage")
    # The agent's layer lies on top: a template can't put another file in its place.
    lower = ":".join(["/a", *(f"/l{index}" for index in range(len(rootfs.layers)))])
    options = f"lowerdir={lower},upperdir=/g/s/u,workdir=/g/s/w,userxattr"
    program.syscall("mount", "overlay", ROOT, "overlay", MS_NOSUID | MS_NODEV, options, step="mount the overlay root")
    for index, mount in enumerate(mounts):
        _place(program, f"/g/m{index}", is_directory=Path(mount.source).is_dir())
        _attach(program, storage + 1 + index, f"/g/m{index}", f"mount {mount.source}")
    _write_file(program, f"{BUNDLE}/config.json", config)
    _become(program, argv)
    return program


def _join(program: Program, n_entries: int) -> None:
    for index in range(FIRST_ENTRY, FIRST_ENTRY + n_entries):
        program.syscall("write", Fd(index), program.blob(b"0"), 1, step="join the cgroup")


def _attach(program: Program, fd_index: int, target: str, step: str) -> None:
    program.syscall("move_mount", Fd(fd_index), "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH, step=step)


def _copy(program: Program, source: str, target: str, mode: int) -> None:
    origin, copy = program.slot(), program.slot()
    program.syscall("openat", AT_FDCWD, source, 0, 0, store=origin, step=f"open {source}")
    program.syscall("openat", AT_FDCWD, target, O_WRONLY_CREATE, mode, store=copy, step=f"make {target}")
    program.syscall("sendfile", copy, origin, 0, os.stat(source).st_size, step=f"copy {source}")
    program.syscall("close", copy, step="close the copy")
    program.syscall("close", origin, step="close the original")


def _write_file(program: Program, path: str, content: bytes) -> None:
    file = program.slot()
    program.syscall("openat", AT_FDCWD, path, O_WRONLY_CREATE, 0o644, store=file, step=f"make {path}")
    program.syscall("write", file, program.blob(content), len(content), step=f"write {path}")
    program.syscall("close", file, step=f"close {path}")


def _become(program: Program, argv: Sequence[str]) -> None:
    """Execute runsc with the channel as standard input and the log as standard output and error."""
    for passed, fd in ((CHANNEL, 0), (LOG, 1), (LOG, 2)):
        program.syscall("dup3", Fd(passed), fd, 0, step="connect the standard streams")
    program.syscall("close_range", 3, _LAST_FD, _CLOSE_ON_EXEC_RANGE, step="hand over no other descriptor")
    words = [program.blob(word.encode() + b"\0") for word in argv]
    pointers = program.blob(bytes(8 * (len(words) + 1)))
    for index, word in enumerate(words):
        program.reloc(word, into=pointers, at=8 * index)
    environment = program.blob(bytes(8))
    # A guest's root may set any mode there, and what its kernel allows runsc does on the host, as the mounts' owner.
    seccomp.add_filter(program, seccomp.set_id_filter())
    program.syscall("execve", "/runsc", pointers, environment, step="start runsc")
