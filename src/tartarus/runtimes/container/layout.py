"""The two programs of the container level: how a nursery takes its place, and how each guest is boxed.

Paths inside the nursery's mount namespace: `/.tartarus/l<i>` are the template's layers, `/.tartarus/box`
is where each guest (in its own copy of the namespace) mounts a tmpfs that holds its overlay. Facts
behind the order of steps: overlay refuses a lower directory with mounts below it, so layers are bound
without submounts before the user namespace exists; a procfs can be mounted only by a process of the
pid namespace that it shows, so the nursery forks first.
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Sequence
from pathlib import Path

from tartarus.guest.program import Fd, Program
from tartarus.model.sandbox import Isolation, Mount, Resources
from tartarus.model.template import RunAs
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.cgroups import add_joining
from tartarus.runtimes.confine import caps, keyring, landlock, masks, recording, rlimits, seccomp
from tartarus.runtimes.container import secretsdir
from tartarus.runtimes.container.storage import Storage, inodes_for
from tartarus.runtimes.idmap import OWNER_UID

AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
SAFE_READ_ONLY = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV
GUEST_FLAGS = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
NURSERY_FLAGS = CLONE_NEWUSER | GUEST_FLAGS | CLONE_NEWCGROUP
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
MOVE_MOUNT_F_EMPTY_PATH = 4
PR_SET_DUMPABLE, PR_SET_SECUREBITS = 4, 28
SECBIT_NO_SETUID_FIXUP = 4
MAX_TERMINALS = 64
"""Of 4096 that a machine has; containers share all but 1024 of them."""
EPERM, ECHILD, EEXIST, ENOENT, EINVAL = 1, 10, 17, 2, 22
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEV_LINKS = (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
             ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx"), ("core", "/proc/kcore"))  # fmt: skip
SYS_VISIBLE = ("/sys/devices/system/cpu", "/sys/devices/system/node")
USER_NAMESPACE, FIRST_ENTRY = 2, 3
"""Passed descriptors: 0 the channel, 1 the agent's executable, then the guest's own user namespace, the cgroup's
entries, the storage, the mounts."""
LANDLOCK_RULES = (
    landlock.PathRule("/", landlock.RUN | landlock.WRITE),
    *(landlock.PathRule(f"/dev/{device}", landlock.DEVICE, file=True) for device in DEVICES),
    landlock.PathRule("/dev/pts", landlock.DEVICE | landlock.READ),
)
"""The second wall: no device files made, no device commands but on these, signals and abstract sockets kept inside."""


HOSTNAME_PLACEHOLDER = "sbx-0000000000000000"


def _mkdir(program: Program, path: str, mode: int = 0o755) -> None:
    program.syscall("mkdirat", AT_FDCWD, path, mode, step=f"make {path}", ok=EEXIST)


def _mount(program: Program, source: str, target: str, kind: str, flags: int, data: str, step: str) -> None:
    program.syscall("mount", source, target, kind, flags, data, step=step)


def _bind(program: Program, source: str, target: str, flags: int = 0, *, ok: int = 0) -> None:
    program.syscall("mount", source, target, 0, MS_BIND | flags, 0, step=f"bind {target}", ok=ok)


def _set_attributes(program: Program, target: str, attributes: int, step: str, *, ok: int = 0) -> None:
    """Add mount attributes to a whole tree; unlike a remount, it needs not know which are locked."""
    request = program.blob(struct.pack("<QQQQ", attributes, 0, 0, 0))
    program.syscall("mount_setattr", AT_FDCWD, target, AT_RECURSIVE, request, request.size, step=step, ok=ok)


def _remount(program: Program, target: str, flags: int, *, ok: int = 0) -> None:
    program.syscall("mount", 0, target, 0, MS_BIND | MS_REMOUNT | flags, 0, step=f"make {target} read-only", ok=ok)


def stage_program(
    stage: Path,
    rootfs: RootFs,
    mounts: Sequence[Mount] = (),
    *,
    rootless: bool = False,
    storage: Path | None = None,
) -> Program:
    """Gather layers, binds and devices below `stage`, in a mount namespace of the nursery's own, then leave the host.

    Runs with the host's privileges, or `rootless`: inside a user namespace just made, where mounts below a
    bound directory can't be left out. `mounts` and `storage`: a user's own, for a nursery that serves one sandbox.
    """
    submounts = MS_REC if rootless else 0
    base = str(stage)
    program = Program()
    program.syscall("mount", 0, "/", 0, MS_REC | MS_PRIVATE, 0, step="make mounts private")
    _mount(program, "tmpfs", base, "tmpfs", MS_NOSUID, "size=1m,nr_inodes=1k,mode=755", "mount the staging tmpfs")
    program.syscall("chdir", base, step="enter the stage")
    for index, layer in enumerate(rootfs.layers):
        _mkdir(program, f"{base}/l{index}")
        _bind(program, str(layer), f"{base}/l{index}")
        _set_attributes(program, f"{base}/l{index}", SAFE_READ_ONLY, f"make layer {index} read-only")
    for index, (source, _target) in enumerate(rootfs.binds):
        _mkdir(program, f"{base}/b{index}")
        _bind(program, source, f"{base}/b{index}", submounts)
        _set_attributes(program, f"{base}/b{index}", SAFE_READ_ONLY, f"make {source} read-only")
    for index, mount in enumerate(mounts):
        _place(program, mount, f"{base}/m{index}")
        _bind(program, mount.source, f"{base}/m{index}", MS_REC)
        attributes = ATTR_NOSUID | ATTR_NODEV | (ATTR_RDONLY if mount.read_only else 0)
        _set_attributes(program, f"{base}/m{index}", attributes, f"restrict {mount.source}")
    if storage is not None:
        _mkdir(program, f"{base}/s")
        _bind(program, str(storage), f"{base}/s")
        _set_attributes(program, f"{base}/s", ATTR_NOSUID | ATTR_NODEV, "restrict the storage")
    _mkdir(program, f"{base}/dev")
    _mount(program, "tmpfs", f"{base}/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "size=64k,nr_inodes=64,mode=755",
           "mount the device directory")  # fmt: skip
    for device in DEVICES:
        program.syscall("mknodat", AT_FDCWD, f"{base}/dev/{device}", 0o100666, 0, step=f"make /dev/{device}")
        _bind(program, f"/dev/{device}", f"{base}/dev/{device}")
        # Devices work as before; what can't be done any more is to change the host's file (its times, for one).
        _set_attributes(program, f"{base}/dev/{device}", ATTR_RDONLY | ATTR_NOSUID | ATTR_NOEXEC, f"keep /dev/{device}")
    for name, target in DEV_LINKS:
        program.syscall("symlinkat", target, AT_FDCWD, f"{base}/dev/{name}", step=f"link /dev/{name}")
    _mkdir(program, f"{base}/dev/pts")
    _mkdir(program, f"{base}/dev/shm")  # noqa: S108 - the mount point, not a file in it
    _mkdir(program, f"{base}/sys")
    _mount(program, "tmpfs", f"{base}/sys", "tmpfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, "size=64k,nr_inodes=64,mode=755",
           "mount the sys directory")  # fmt: skip
    for path in ("", "/devices", "/devices/system", "/fs", "/fs/cgroup", "/kernel", "/kernel/mm"):
        _mkdir(program, f"{base}/sys{path}")
    for visible in SYS_VISIBLE:
        _mkdir(program, base + visible)
        _bind(program, visible, base + visible, submounts, ok=ENOENT)
        _set_attributes(program, base + visible, SAFE_READ_ONLY | ATTR_NOEXEC, f"make {visible} read-only")
    _mkdir(program, f"{base}/z")
    if not rootless:
        _leave_root(program)
    return program


def _leave_root(program: Program) -> None:
    """Become a user that is nobody else's, with all capabilities still, before the user namespace is made.

    The kernel counts what the processes of a user namespace use (inotify instances, for one) against the user who
    made it as well: as root's, one sandbox could use up what the host's root may have. Groups of the daemon's, such
    as `disk`, would stay with every guest.
    """
    unlimited = program.blob(b"\xff" * 16)
    # What root may have of these would bound, as long as the namespaces live, what all guests have together.
    for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_SIGPENDING, resource.RLIMIT_MSGQUEUE):
        program.syscall("prlimit64", 0, limit, unlimited, 0, step="lift a limit of root's", ok=EPERM)
    program.syscall("setgroups", 0, 0, step="leave all groups")
    program.syscall("prctl", PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0, step="keep capabilities")
    program.syscall("setresgid", OWNER_UID, OWNER_UID, OWNER_UID, step="take a group of the nursery's own")
    program.syscall("setresuid", OWNER_UID, OWNER_UID, OWNER_UID, step="take a user of the nursery's own")


def unshare_program(flags: int) -> Program:
    """Leave the host's namespaces."""
    program = Program()
    program.syscall("unshare", flags, step="make namespaces (user namespaces may be switched off)")
    return program


def nursery_program(rootfs: RootFs, mounts: Sequence[Mount] = (), *, storage: bool = False) -> Program:
    """As root of the new user namespace and pid 1 of the new pid namespace: stand inside the template's root.

    Paths are relative to the stage, where `stage_program` left it: the namespace's root may not be let through
    the directories above.
    """
    base = "."
    root = f"{base}/z/root"
    program = Program()
    program.syscall("setresgid", 0, 0, 0, step="become the namespace's root group")
    program.syscall("setresuid", 0, 0, 0, step="become the namespace's root")
    program.syscall("umask", 0o22, step="umask")
    _mount(
        program, "tmpfs", f"{base}/z", "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=755", "mount the nursery's tmpfs"
    )
    for name in ("root", "up", "wk"):
        _mkdir(program, f"{base}/z/{name}")
    lower = ":".join(f"{base}/l{index}" for index in range(len(rootfs.layers)))
    _overlay(program, lower, f"{base}/z/up", f"{base}/z/wk", root)
    for index, (_source, target) in enumerate(rootfs.binds):
        _bind(program, f"{base}/b{index}", root + target)
    for name in ("dev", "sys"):
        _bind(program, f"{base}/{name}", f"{root}/{name}", MS_REC)
        # All guests of this template share them, and where the namespace's root made them its guests own them.
        _set_attributes(program, f"{root}/{name}", ATTR_RDONLY, f"make /{name} read-only")
    _mount(program, "proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "", "mount the nursery's /proc")
    _mkdir(program, f"{root}/.tartarus", 0o700)
    _mount(program, "tmpfs", f"{root}/.tartarus", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=700",
           "mount the nursery's own directory")  # fmt: skip
    for index in range(len(rootfs.layers)):
        _mkdir(program, f"{root}/.tartarus/l{index}")
        _bind(program, f"{base}/l{index}", f"{root}/.tartarus/l{index}")
    for index, mount in enumerate(mounts):
        _place(program, mount, f"{root}/.tartarus/m{index}")
        _bind(program, f"{base}/m{index}", f"{root}/.tartarus/m{index}", MS_REC)
    if storage:
        _mkdir(program, f"{root}/.tartarus/s")
        _bind(program, f"{base}/s", f"{root}/.tartarus/s")
    _mkdir(program, f"{root}/.tartarus/box")
    _mkdir(program, f"{root}/.tartarus/none")
    _pivot(program, root)
    # Guests inherit this empty ring and can't use it; one for each would be counted against their user's quota.
    keyring.add_keyring(program)
    program.syscall("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0, step="be undumpable")
    return program


def zygote_program() -> Program:
    """What the warm interpreter does before it runs any code of the template's."""
    program = Program()
    rlimits.add_queue_limits(program)
    caps.add_zygote_capabilities(program)
    seccomp.add_zygote_seccomp(program)
    return program


def _overlay(program: Program, lower: str, upper: str, work: str, target: str) -> None:
    options = f"lowerdir={lower},upperdir={upper},workdir={work},userxattr"
    _mount(program, "overlay", target, "overlay", MS_NOSUID | MS_NODEV, options, "mount the overlay root")


def _pivot(program: Program, root: str) -> None:
    program.syscall("chdir", root, step="enter the new root")
    program.syscall("pivot_root", ".", ".", step="change root")
    program.syscall("umount2", ".", MNT_DETACH, step="let go of the old root")
    program.syscall("chdir", "/", step="go to /")


def box_program(
    rootfs: RootFs,
    resources: Resources,
    mounts: Sequence[Mount],
    *,
    landlock_abi: int,
    limit_level: Isolation,
    n_entries: int,
    storage: Storage,
    staged_mounts: bool = False,
    build: bool = False,
    secrets: bool = False,
    watched: bool = False,
    recorded: bool = False,
    rules: Sequence[landlock.PathRule] = LANDLOCK_RULES,
) -> Program:
    """What a guest does to itself between its birth and its agent: join its cgroup, box, drop everything.

    `n_entries`: how many cgroup entries were passed, to join by. Without any, the guest waits for one byte on its
    channel, sent when the host has moved it: its cgroup namespace's root is the group it stands in when it takes
    one. `limit_level`: whose rlimits to set; the process level's stand in for the cgroups that a host does not
    give. `mounts` come as passed descriptors, or with `staged_mounts` from this nursery's own stage. `build`: root
    keeps, over the sandbox's own files and users, what installing packages takes. `rules`: the second wall. `watched`
    or `recorded`: the last descriptor takes a filter's listener, of what escapes begin with or of every call.
    """
    box, root = "/.tartarus/box", "/.tartarus/box/m"
    program = Program()
    add_joining(program, FIRST_ENTRY, n_entries)
    program.syscall("umask", 0o22, step="umask")
    if storage is Storage.PASSED:
        program.syscall("move_mount", Fd(FIRST_ENTRY + n_entries), "", AT_FDCWD, box, MOVE_MOUNT_F_EMPTY_PATH,
                        step="attach the sandbox's own storage")  # fmt: skip
        n_entries += 1
    elif storage is Storage.STAGED:
        _bind(program, "/.tartarus/s", box)
    else:
        size = f"size={resources.disk_bytes},nr_inodes={inodes_for(resources)},mode=755"
        _mount(program, "tmpfs", box, "tmpfs", MS_NOSUID | MS_NODEV, size,
               "mount the sandbox's own storage")  # fmt: skip
    for name in ("u", "w", "m"):
        _mkdir(program, f"{box}/{name}")
    side = box
    if build:
        # Its storage is on the host's disk: the guest's own list of mounts would say where.
        side = f"{box}/s"
        _mkdir(program, side)
        _mount(
            program, "tmpfs", side, "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=755", "mount the memory for /dev/shm"
        )
    _mkdir(program, f"{side}/e")
    _mkdir(program, f"{side}/shm", 0o1777)
    program.syscall("fchmodat", AT_FDCWD, f"{side}/shm", 0o1777, step="open /dev/shm to all")
    lower = ":".join(f"/.tartarus/l{index}" for index in range(len(rootfs.layers)))
    _overlay(program, lower, f"{box}/u", f"{box}/w", root)
    for _source, target in rootfs.binds:
        _bind(program, target, root + target)
        _cover(program, target, root + target)
    for name in ("dev", "sys"):
        _bind(program, f"/{name}", f"{root}/{name}", MS_REC)
    _bind(program, f"{side}/shm", f"{root}/dev/shm")  # noqa: S108 - the mount point, not a file in it
    terminals = f"newinstance,ptmxmode=0666,mode=620,max={MAX_TERMINALS}"
    _mount(program, "devpts", f"{root}/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, terminals, "mount /dev/pts")
    _mount(program, "proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "", "mount /proc")
    _network(program, root)
    _mask(program, root, f"{side}/e")
    program.syscall("sethostname", HOSTNAME_PLACEHOLDER, len(HOSTNAME_PLACEHOLDER), step="set the host name")
    for index, mount in enumerate(mounts if staged_mounts else ()):
        _mount_point(program, mount, root)
        _bind(program, f"/.tartarus/m{index}", root + mount.target, MS_REC)
    _pivot(program, root)
    for index, mount in enumerate(() if staged_mounts else mounts):
        _user_mount(program, mount, FIRST_ENTRY + n_entries + index)
    if secrets:
        secretsdir.add_secrets_directory(program, rootfs.template.user)
    program.syscall("unshare", CLONE_NEWCGROUP, step="take a cgroup namespace")
    # From here on the guest has power over nothing: what was mounted and made belongs to the namespace that it leaves.
    program.syscall("setns", Fd(USER_NAMESPACE), CLONE_NEWUSER, step="enter a user namespace of its own")
    rlimits.add_rlimits(program, resources, limit_level)
    hardening = rootfs.hardening
    _become(program, rootfs.template.user, added=hardening.added, build=build)
    landlock.add_landlock(program, landlock_abi, rules)
    listener = Fd(FIRST_ENTRY + n_entries + (0 if staged_mounts else len(mounts)))
    seccomp.add_seccomp(
        program, Isolation.CONTAINER, build=build, broker=listener if watched else None, hardening=hardening
    )
    if recorded:
        recording.add_recording(program, listener)
    return program


def _become(program: Program, user: RunAs, *, added: int, build: bool) -> None:
    """Take the template's user, for good, and let go of all capabilities but those; a `build`'s root keeps a few."""
    if build and user.uid == 0:
        caps.add_build_capabilities(program)
        return
    caps.add_bounding_drop(program, kept=added)
    caps.add_user(program, user)
    caps.add_capability_drop(program, bounding=False, kept=added)


def _cover(program: Program, source: str, target: str) -> None:
    """Show a bound directory through an overlay of its own, where the kernel can do that.

    Through the bind alone a guest would use the host's inodes: it could watch (inotify) which programs the host and
    other guests start, and lock them (flock). It can't be done for one with mounts below it, or on too many overlays.
    """
    if not set(source) & set(":,\\"):
        options = f"lowerdir={source}:/.tartarus/none,userxattr"
        program.syscall("mount", "overlay", target, "overlay", MS_RDONLY | MS_NOSUID | MS_NODEV, options,
                        step=f"cover {source}", ok=EINVAL)  # fmt: skip


def _network(program: Program, root: str) -> None:
    """Loopback up, and its low ports free to use: the guest's root has no capability to take them."""
    sock = program.slot()
    program.syscall("socket", 2, 2, 0, store=sock, step="open a socket")
    request = program.blob(struct.pack("<16sH22x", b"lo", IFF_UP))
    program.syscall("ioctl", sock, SIOCSIFFLAGS, request, step="bring up loopback")
    program.syscall("close", sock, step="close the socket")
    file = program.slot()
    program.syscall("openat", AT_FDCWD, f"{root}/proc/sys/net/ipv4/ip_unprivileged_port_start", 1, 0, store=file,
                    step="open the port range")  # fmt: skip
    program.syscall("write", file, program.blob(b"0"), 1, step="free the low ports")
    program.syscall("close", file, step="close the port range")


def _mask(program: Program, root: str, empty: str) -> None:
    """Hide what this kernel has of `masks`; the guest's kernel is the host's, so its own /proc tells."""
    for path in filter(os.path.exists, masks.READ_ONLY_PATHS):
        _bind(program, root + path, root + path, MS_REC)
        _remount(program, root + path, MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for path in filter(os.path.exists, masks.MASKED_FILES):
        _bind(program, "/dev/null", root + path)
    for path in filter(os.path.exists, masks.MASKED_DIRECTORIES):
        if path.startswith("/proc/"):
            _bind(program, empty, root + path)
            _remount(program, root + path, MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _place(program: Program, mount: Mount, path: str) -> None:
    """Something to mount on: a directory or an empty file, as the source is."""
    if Path(mount.source).is_dir():
        _mkdir(program, path)
    else:
        program.syscall("mknodat", AT_FDCWD, path, 0o100644, 0, step=f"make {path}", ok=EEXIST)


def _mount_point(program: Program, mount: Mount, root: str = "") -> None:
    parts = mount.target.strip("/").split("/")
    for depth in range(1, len(parts)):
        _mkdir(program, f"{root}/" + "/".join(parts[:depth]))
    _place(program, mount, root + mount.target)


def _user_mount(program: Program, mount: Mount, fd_index: int) -> None:
    """Attach a mount that the host prepared; runs in the new root, so the template's links can't lead outside."""
    _mount_point(program, mount)
    program.syscall("move_mount", Fd(fd_index), "", AT_FDCWD, mount.target, MOVE_MOUNT_F_EMPTY_PATH,
                    step=f"mount {mount.source} at {mount.target}")  # fmt: skip
