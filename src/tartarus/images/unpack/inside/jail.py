"""The child locks itself in, before it reads a byte of what it was started for.

Walls, each enough by itself: a user namespace whose ids are the sandbox's (what is the host's can't be written,
whatever else fails), a root that holds the job's directories and nothing else, no network, no other process to see,
four capabilities that count only for files of those ids, Landlock, a system call filter, and resource limits.
What can't be set up is an error; only Landlock may be missing, on kernels that do not have it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence

from tartarus.images.unpack.inside.calls import call
from tartarus.images.unpack.inside.filter import seccomp_filter
from tartarus.images.unpack.limits import Limits

TARGET = "/target"
_CLONE_NEWNS, _CLONE_NEWCGROUP, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = (
    _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS | _CLONE_NEWCGROUP
)
_AT_FDCWD, _AT_EMPTY = -100, 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_FROM_EMPTY = 4
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _NOSYMFOLLOW, _BIND, _REC, _PRIVATE = (
    1, 2, 4, 8, 32, 256, 0x1000, 0x4000, 1 << 18,
)  # fmt: skip
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
# CHOWN, DAC_OVERRIDE, FOWNER, and FSETID, without which a set-group-id bit is dropped in silence. They hold for
# files whose owners are the namespace's. No MKNOD: a whiteout needs none, and nothing else may be made.
_KEPT = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4
_SECCOMP_SET_MODE_FILTER = 1
# LANDLOCK_ACCESS_FS_*; what each version (ABI) knows.
_LL_WRITE, _LL_READ_FILE, _LL_READ_DIR, _LL_REMOVE_DIR, _LL_REMOVE_FILE, _LL_CHAR, _LL_DIR, _LL_REG = (
    1 << bit for bit in range(1, 9)
)
_LL_FIFO, _LL_SYM, _LL_REFER, _LL_TRUNCATE = 1 << 10, 1 << 12, 1 << 13, 1 << 14
_LL_KNOWN = {2: 14, 3: 15, 4: 15}
_LL_NEWEST = 16
_LL_LINKS = 2
_LL_READ = _LL_READ_FILE | _LL_READ_DIR
_LL_MAKE = _LL_READ | _LL_CHAR | _LL_DIR | _LL_REG | _LL_FIFO | _LL_SYM | _LL_REFER
_LL_FILL = _LL_MAKE | _LL_WRITE | _LL_REMOVE_DIR | _LL_REMOVE_FILE | _LL_TRUNCATE
# RLIMIT_CORE 1: the value that keeps the host's core dump helper, root outside, from being started; 0 does not.
_CORE, _FILES, _STACK = 1, 4096, 16 << 20


class Place:
    """A host directory that the job may use. `at` is its name in the jail's root (``/target``).

    `write`: it may be filled. `link`: files may be hard-linked from it to other places with `link`, and into it, but
    none may be opened for writing; both sides must lie on one mount.
    """

    __slots__ = ("at", "link", "path", "write")

    def __init__(self, path: str, at: str, *, write: bool = False, link: bool = False) -> None:
        self.path = path
        self.at = at
        self.write = write
        self.link = link


def enter(
    places: Sequence[Place],
    limits: Limits,
    map_ids: Callable[[], None],
    readable: Sequence[int] = (),
    fillable: Sequence[int] = (),
) -> None:
    """Lock this process in. `readable`, `fillable`: open directories that may be read, or filled, wherever they lie.

    Returns in a forked child, which is process 1 of its own namespace.

    `map_ids` is called once in the new user namespace and returns when the host has written its id map. The calling
    process stays outside, without a task but to wait for the child and end as it ends. Raises OSError with the
    failing step's name as `filename`.
    """
    privileged = os.geteuid() == 0
    # A mount can be copied only by who may mount in its namespace: before root leaves it, but after others have one.
    trees = _copies(places) if privileged else []
    call("unshare", _NAMESPACES)
    trees = trees or _copies(places)
    map_ids()
    _fork()
    if privileged:
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    _die_with_parent()
    os.umask(0)
    build_root(places, trees)
    _limit(limits)
    drop_capabilities(_KEPT)
    enter_landlock(places, readable, fillable)
    forget_modules()
    install_filter(seccomp_filter(os.uname().machine))


def _copies(places: Sequence[Place]) -> list[int]:
    return [call("open_tree", _AT_FDCWD, os.fsencode(place.path), _OPEN_TREE_CLONE | os.O_CLOEXEC) for place in places]


def _fork() -> None:
    """Go on in a child; this process waits for it, and neither outlives the other."""
    ready, is_ready = os.pipe()
    alive, is_alive = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.close(is_alive)
        _step("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(is_ready, b".")
        # An end of file here: the parent was gone before its death could be announced.
        if os.read(alive, 1) != b".":
            os._exit(1)
        os.close(is_ready)
        os.close(alive)
        return
    os.close(is_ready)
    os.close(alive)
    _step("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    # The host reads the child's end from its pipe's end of file, so this process must not hold it open.
    os.close(0)
    os.close(1)
    if os.read(ready, 1) == b".":
        os.write(is_alive, b".")
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _die_with_parent() -> None:
    # Once more: the change of ids took it back.
    _step("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    hide_memory()


def hide_memory() -> None:
    """Nobody of the same user looks into this process, and it leaves no core."""
    _step("prctl", _PR_SET_DUMPABLE, 0)


def build_root(places: Sequence[Place] = (), trees: Sequence[int] = ()) -> None:
    """In a mount namespace of our own: a root with the places and nothing else.

    No symbolic link is followed in it, and no other mount is there.
    """
    call("mount", None, b"/", None, _REC | _PRIVATE, None)
    # /proc is a directory on every host; what is mounted over is left behind with the old root.
    call("mount", b"tmpfs", b"/proc", b"tmpfs", _NOSUID | _NODEV | _NOEXEC, b"mode=755,size=64k,nr_inodes=128")
    os.chdir("/proc")
    for place, tree in zip(places, trees, strict=True):
        inside = place.at.lstrip("/").encode()
        os.mkdir(inside, 0o755)
        call("move_mount", tree, b"", _AT_FDCWD, inside, _MOVE_MOUNT_FROM_EMPTY)
        os.close(tree)
        read_only = 0 if place.write or place.link else _RDONLY
        flags = _REMOUNT | _BIND | _NOSUID | _NODEV | _NOEXEC | _NOSYMFOLLOW | read_only
        call("mount", None, inside, None, flags, None)
    call("pivot_root", b".", b".")
    call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    call("mount", None, b"/", None, _REMOUNT | _BIND | _NOSUID | _NODEV | _NOEXEC | _RDONLY, None)


def _limit(limits: Limits) -> None:
    wanted = (
        (resource.RLIMIT_CORE, _CORE),
        (resource.RLIMIT_FSIZE, limits.bytes),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_STACK, _STACK),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    )
    for which, value in wanted:
        hard = resource.getrlimit(which)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (most, most))


def drop_capabilities(kept: int) -> None:
    """Hold no capabilities but those of `kept`, which is a set of bits, and never again another."""
    _step("prctl", _PR_SET_NO_NEW_PRIVS, 1)
    _step("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):
        try:
            _step("prctl", _PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the first that this kernel does not know
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    call("capset", header, struct.pack("<6I", kept, kept, 0, 0, 0, 0))


def enter_landlock(
    places: Sequence[Place] = (), readable: Sequence[int] = (), fillable: Sequence[int] = (), *, connect: bool = False
) -> None:
    """Where the kernel has it: no file but these, no TCP port (but for `connect`, to others), nobody else's process."""
    try:
        abi = call("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return  # the kernel has none; every other wall stands
    if abi < _LL_LINKS:
        return  # the first version forbids every hard link between directories
    handled = (1 << _LL_KNOWN.get(abi, _LL_NEWEST)) - 1
    attributes = struct.pack("<Q", handled)
    attributes += struct.pack("<Q", 1 if connect else 3) if abi >= 4 else b""  # no TCP port, at least to bind
    attributes += struct.pack("<Q", 3) if abi >= 6 else b""  # no signal, no abstract socket, beyond this process
    rules = call("landlock_create_ruleset", attributes, len(attributes), 0)
    for place in places:
        access = _LL_FILL if place.write else _LL_MAKE if place.link else _LL_READ
        directory = os.open(place.at, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        call("landlock_add_rule", rules, 1, struct.pack("<Qi", access & handled, directory), 0)
        os.close(directory)
    for open_ones, access in ((readable, _LL_READ), (fillable, _LL_FILL)):
        for directory in open_ones:
            call("landlock_add_rule", rules, 1, struct.pack("<Qi", access & handled, directory), 0)
    call("landlock_restrict_self", rules, 0)
    os.close(rules)


def forget_modules() -> None:
    """Nothing can be imported any more: the paths where modules lie now lead elsewhere, or nowhere."""
    sys.path.clear()
    sys.meta_path.clear()
    sys.path_hooks.clear()


def install_filter(filter_code: bytes) -> None:
    """Let the system calls pass that a filter, an array of struct sock_filter, lets pass."""
    code = ctypes.create_string_buffer(filter_code)
    program = struct.pack("<HxxxxxxQ", (len(code) - 1) // 8, ctypes.addressof(code))
    call("seccomp", _SECCOMP_SET_MODE_FILTER, 0, program)


def _step(name: str, *arguments: int) -> None:
    call(name, *arguments, *([0] * (5 - len(arguments))))
