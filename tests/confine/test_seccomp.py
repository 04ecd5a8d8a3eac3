"""The real filter in real children: which calls pass, which fail, and how."""

from __future__ import annotations

import array
import errno
import fcntl
import functools
import mmap
import os
import pty
import select
import signal
import socket
import struct
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.confine.child import call, error_of, in_child

from tartarus.guest.syscalls import machine, number, table
from tartarus.model.sandbox import Isolation
from tartarus.runtimes.confine import calls
from tartarus.runtimes.confine.seccomp import (
    add_filter,
    add_seccomp,
    add_zygote_seccomp,
    rules_by_name,
    set_id_filter,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tartarus.guest.program import Program

CONTAINER, PROCESS = Isolation.CONTAINER, Isolation.PROCESS
BOTH = (CONTAINER, PROCESS)
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
NAMES = table()


def filtered(level: Isolation, work: Callable[[], Any], **options: Any) -> Any:
    """`work`'s result in a child under the level's filter."""

    def setup(program: Program) -> None:
        program.syscall("prctl", 38, 1, 0, 0, 0, step="set no_new_privs")
        add_seccomp(program, level, **options)

    return in_child(work, setup=setup)


def errors(level: Isolation, *wanted: tuple[Any, ...], **options: Any) -> list[int]:
    """The errno of each call, made in one child."""
    found: list[int] = filtered(level, lambda: [error_of(*one) for one in wanted], **options)
    return found


# Refused whatever the arguments.


@pytest.mark.parametrize("level", BOTH)
@pytest.mark.parametrize("name", sorted(calls.DENIED & NAMES.keys()))
def test_denied(level: Isolation, name: str) -> None:
    assert errors(level, (name, 0, 0, 0, 0, 0, 0)) == [errno.EPERM]


def test_a_warm_interpreter_can_enter_user_namespaces_alone() -> None:
    def setup(program: Program) -> None:
        program.syscall("prctl", 38, 1, 0, 0, 0, step="set no_new_privs")
        add_zygote_seccomp(program)

    kinds = {"mnt": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "pid": 0x20000000, "net": 1 << 30}
    user = 0x10000000
    attempts = [*kinds.values(), 0, user | kinds["net"], user]
    found = in_child(lambda: [error_of("setns", -1, kind) for kind in attempts], setup=setup)
    assert found == [errno.EPERM] * (len(attempts) - 1) + [errno.EBADF]


def _errors_of(wanted: list[tuple[Any, ...]]) -> list[int]:
    return [error_of(*one) for one in wanted]


def test_a_runtime_with_a_filter_of_its_own_can_make_no_set_id_files(tmp_path: Path) -> None:
    def setup(program: Program) -> None:
        program.syscall("prctl", 38, 1, 0, 0, 0, step="set no_new_privs")
        add_filter(program, set_id_filter())

    (file := tmp_path / "file").touch()
    place = os.fsencode(tmp_path)
    for mode in (0o4755, 0o2755, 0o6777, 0o755):
        wanted: list[tuple[Any, ...]] = [
            ("fchmodat", AT_FDCWD, os.fsencode(file), mode),
            ("mkdirat", AT_FDCWD, b"%s/directory%d" % (place, mode), mode),
            ("mknodat", AT_FDCWD, b"%s/node%d" % (place, mode), mode, 0),
            ("openat", AT_FDCWD, b"%s/made%d" % (place, mode), os.O_CREAT | os.O_WRONLY, mode),
            ("openat", AT_FDCWD, place, os.O_TMPFILE | os.O_WRONLY, mode),
        ]
        found = in_child(functools.partial(_errors_of, wanted), setup=setup)
        assert found == [errno.EPERM if mode & 0o6000 else 0] * len(wanted)
    # Without a file to make the mode is no argument.
    assert in_child(lambda: error_of("openat", AT_FDCWD, os.fsencode(file), os.O_RDONLY, 0o4755), setup=setup) == 0


@pytest.mark.parametrize("level", BOTH)
def test_all_other_calls_do_not_exist(level: Isolation) -> None:
    known = {NAMES[name] for name in rules_by_name(level) if name in NAMES}
    # The kernel makes these two itself, for probes, and lets them past filters; from elsewhere they are SIGILL.
    known |= {NAMES[name] for name in ("uprobe", "uretprobe") if name in NAMES}
    unknown = [nr for nr in [*range(700), 0x4000_0000 + 39, 0x7FFF_FFFF] if nr not in known]
    found = errors(level, *[(nr, 0, 0, 0, 0, 0, 0) for nr in unknown])
    assert {nr: error for nr, error in zip(unknown, found, strict=True) if error != errno.ENOSYS} == {}


@pytest.mark.parametrize("level", BOTH)
@pytest.mark.parametrize(
    "name",
    [
        "clone3", "openat2", "io_uring_setup", "io_uring_enter", "io_uring_register", "io_setup", "keyctl", "add_key",
        "request_key", "kcmp", "memfd_secret", "process_madvise", "process_mrelease", "vmsplice", "mbind", "statmount",
        "set_mempolicy", "migrate_pages", "move_pages", "setxattrat", "listns",
    ],
)  # fmt: skip
def test_fallbacks_are_triggered(level: Isolation, name: str) -> None:
    assert errors(level, (name, 0, 0, 0, 0, 0, 0)) == [errno.ENOSYS]


# Refused for some arguments.

O_CREAT, O_TMPFILE, O_DIRECTORY, O_TRUNC = os.O_CREAT, 0o20000000 | os.O_DIRECTORY, os.O_DIRECTORY, os.O_TRUNC
HIGH = 1 << 40
CASES: list[tuple[str, Isolation | None, tuple[Any, ...], int]] = [
    ("clone into a user namespace", None, ("clone", 0x10000000 | 17, 0, 0, 0, 0), errno.EPERM),
    ("clone into a mount namespace", None, ("clone", 0x20000 | 17, 0, 0, 0, 0), errno.EPERM),
    ("clone into a network namespace", None, ("clone", 0x40000000 | 17, 0, 0, 0, 0), errno.EPERM),
    ("clone into a pid namespace", None, ("clone", 0x20000000 | 17, 0, 0, 0, 0), errno.EPERM),
    ("clone into an ipc namespace", None, ("clone", 0x08000000 | 17, 0, 0, 0, 0), errno.EPERM),
    ("clone into a uts namespace", None, ("clone", 0x04000000 | 17, 0, 0, 0, 0), errno.EPERM),
    ("clone into a cgroup namespace", None, ("clone", 0x02000000 | 17, 0, 0, 0, 0), errno.EPERM),
    ("clone with rubbish above the flags", None, ("clone", HIGH | 0x10000000 | 17, 0, 0, 0, 0), errno.EPERM),
    ("type into a terminal", None, ("ioctl", 0, termios.TIOCSTI, b"x"), errno.EPERM),
    ("type into a terminal, upper bits set", None, ("ioctl", 0, HIGH | termios.TIOCSTI, b"x"), errno.EPERM),
    ("paste into a console", None, ("ioctl", 0, 0x541C, b"\2"), errno.EPERM),
    ("take the console's output", None, ("ioctl", 0, 0x541D, 0), errno.EPERM),
    ("load a line discipline", None, ("ioctl", 0, termios.TIOCSETD, struct.pack("i", 21)), errno.EPERM),
    ("ask a terminal's size of no terminal", None, ("ioctl", -1, termios.TIOCGWINSZ, 0), errno.EBADF),
    ("rewrite the memory map", None, ("prctl", 35, 1, 0, 0, 0), errno.EINVAL),
    ("make a core scheduling group", None, ("prctl", 62, 1, 0, 0, 0), errno.EINVAL),
    ("switch off address randomisation", None, ("personality", 0x40000), errno.EPERM),
    ("ask for the personality", None, ("personality", 0xFFFFFFFF), 0),
    ("keep the personality", None, ("personality", 0), 0),
    ("create set-user-id", None, ("openat", AT_FDCWD, b"f", O_CREAT | os.O_WRONLY, 0o4755), errno.EPERM),
    ("create set-group-id", None, ("openat", AT_FDCWD, b"f", O_CREAT | os.O_WRONLY, 0o2755), errno.EPERM),
    ("create nameless set-user-id", None, ("openat", AT_FDCWD, b".", O_TMPFILE | os.O_RDWR, 0o4700), errno.EPERM),
    ("create plain", None, ("openat", AT_FDCWD, b"f", O_CREAT | os.O_WRONLY, 0o755), 0),
    ("open with rubbish as mode", None, ("openat", AT_FDCWD, b".", os.O_RDONLY, 0o7777), 0),
    ("open a directory with rubbish as mode", None, ("openat", AT_FDCWD, b".", O_DIRECTORY, 0o6000), 0),
    ("make a sticky directory", None, ("mkdirat", AT_FDCWD, b"d", 0o1777), 0),
    ("make a set-group-id directory", None, ("mkdirat", AT_FDCWD, b"d", 0o2755), errno.EPERM),
    ("make a fifo", None, ("mknodat", AT_FDCWD, b"p", 0o010644, 0), 0),
    ("make a socket node", None, ("mknodat", AT_FDCWD, b"s", 0o140644, 0), 0),
    ("make a set-user-id node", None, ("mknodat", AT_FDCWD, b"s", 0o104755, 0), errno.EPERM),
    ("make a character device", None, ("mknodat", AT_FDCWD, b"n", 0o020666, 0x103), errno.EPERM),
    ("make a block device", None, ("mknodat", AT_FDCWD, b"n", 0o060666, 0x800), errno.EPERM),
    ("make a whiteout", None, ("mknodat", AT_FDCWD, b"n", 0o020000, 0), errno.EPERM),
    ("fchmod set-user-id", None, ("fchmod", -1, 0o4755), errno.EPERM),
    ("fchmod plain", CONTAINER, ("fchmod", -1, 0o755), errno.EBADF),
    ("fchmodat set-user-id", CONTAINER, ("fchmodat", AT_FDCWD, b".", 0o4755), errno.EPERM),
    ("fchmodat2 set-group-id", CONTAINER, ("fchmodat2", AT_FDCWD, b".", 0o2755, 0), errno.EPERM),
    ("chmod a missing file", CONTAINER, ("fchmodat", AT_FDCWD, b"missing", 0o755), errno.ENOENT),
    ("internet socket", CONTAINER, ("socket", 2, socket.SOCK_STREAM, 0), 0),
    ("internet socket, TCP", CONTAINER, ("socket", 2, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 6), 0),
    ("internet datagram socket", CONTAINER, ("socket", 2, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 17), 0),
    ("SCTP", CONTAINER, ("socket", 2, socket.SOCK_STREAM, 132), errno.EPROTONOSUPPORT),
    ("multipath TCP", CONTAINER, ("socket", 2, socket.SOCK_STREAM, 262), errno.EPROTONOSUPPORT),
    ("UDP-Lite", CONTAINER, ("socket", 2, socket.SOCK_DGRAM, 136), errno.EPROTONOSUPPORT),
    ("L2TP", CONTAINER, ("socket", 2, socket.SOCK_DGRAM, 115), errno.EPROTONOSUPPORT),
    ("DCCP", CONTAINER, ("socket", 2, 6, 33), errno.ESOCKTNOSUPPORT),
    ("raw internet socket", CONTAINER, ("socket", 2, socket.SOCK_RAW, 1), errno.EPERM),
    ("raw internet socket, upper bits set", CONTAINER, ("socket", HIGH | 2, HIGH | 3, 1), errno.EPERM),
    ("raw IPv6 socket", CONTAINER, ("socket", 10, socket.SOCK_RAW, 58), errno.EPERM),
    ("old packet socket", CONTAINER, ("socket", 2, 10, 0x300), errno.ESOCKTNOSUPPORT),
    ("local socket", CONTAINER, ("socket", 1, socket.SOCK_SEQPACKET, 0), 0),
    ("raw local socket", CONTAINER, ("socket", 1, socket.SOCK_RAW, 0), errno.ESOCKTNOSUPPORT),
    ("route netlink", CONTAINER, ("socket", 16, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0), 0),
    ("audit netlink", CONTAINER, ("socket", 16, socket.SOCK_RAW, 9), errno.EPROTONOSUPPORT),
    ("netfilter netlink", CONTAINER, ("socket", 16, socket.SOCK_RAW, 12), errno.EPROTONOSUPPORT),
    ("uevent netlink", CONTAINER, ("socket", 16, socket.SOCK_DGRAM, 15), errno.EPROTONOSUPPORT),
    ("generic netlink", CONTAINER, ("socket", 16, socket.SOCK_RAW, 16), errno.EPROTONOSUPPORT),
    ("packet filter on a socket", CONTAINER, ("setsockopt", -1, 1, 26, 0, 0), errno.EPERM),
    ("BPF program on a socket", CONTAINER, ("setsockopt", -1, 1, 50, 0, 0), errno.EPERM),
    ("kernel TLS", CONTAINER, ("setsockopt", -1, 6, 31, b"tls", 4), errno.ENOPROTOOPT),
    ("ordinary socket option", CONTAINER, ("setsockopt", -1, 1, 2, 0, 0), errno.EBADF),
    ("no delay", CONTAINER, ("setsockopt", -1, 6, 1, 0, 0), errno.EBADF),
    ("IP option 31 is not TCP's", CONTAINER, ("setsockopt", -1, 0, 31, 0, 0), errno.EBADF),
    ("pair of vsock sockets", CONTAINER, ("socketpair", 40, 1, 0, b"\0" * 8), errno.EAFNOSUPPORT),
    ("pair of TIPC sockets", PROCESS, ("socketpair", 30, 1, 0, b"\0" * 8), errno.EAFNOSUPPORT),
    ("pair of datagram sockets", PROCESS, ("socketpair", 1, 2, 0, b"\0" * 8), errno.ESOCKTNOSUPPORT),
    ("bind", PROCESS, ("bind", -1, 0, 0), errno.EPERM),
    ("connect", PROCESS, ("connect", -1, 0, 0), errno.EPERM),
    ("listen", PROCESS, ("listen", -1, 0), errno.EPERM),
    ("accept", PROCESS, ("accept4", -1, 0, 0, 0), errno.EPERM),
    ("send to an address", PROCESS, ("sendto", -1, b"x", 1, 0, b"\1\0/run/x", 9), errno.EPERM),
    ("send to an address in high memory", PROCESS, ("sendto", -1, b"x", 1, 0, HIGH, 9), errno.EPERM),
    ("send", PROCESS, ("sendto", -1, b"x", 1, 0, 0, 0), errno.EBADF),
    ("System V memory", PROCESS, ("shmget", 0, 4096, 0o1600), errno.ENOSYS),
    ("message queue", PROCESS, ("mq_open", b"q", O_CREAT, 0o600, 0), errno.ENOSYS),
    ("limits of another process", PROCESS, ("prlimit64", 1, 7, 0, b"\0" * 16), errno.EPERM),
    ("own limits", PROCESS, ("prlimit64", 0, 7, 0, bytearray(16)), 0),
    ("priority of another process", PROCESS, ("setpriority", 0, 1, 19), errno.EPERM),
    ("priority of all of the user's", PROCESS, ("setpriority", 2, 0, 19), errno.EPERM),
    ("priority of its group", PROCESS, ("setpriority", 1, 0, 19), errno.EPERM),
    ("own priority", PROCESS, ("setpriority", 0, 0, 19), 0),
    ("I/O priority of all of the user's", PROCESS, ("ioprio_set", 3, 0, 0), errno.EPERM),
    ("own I/O priority", PROCESS, ("ioprio_set", 1, 0, 3 << 13), 0),
    ("CPU set of another process", PROCESS, ("sched_setaffinity", 1, 8, b"\1" + b"\0" * 7), errno.EPERM),
    ("scheduler of another process", PROCESS, ("sched_setscheduler", 1, 5, b"\0" * 4), errno.EPERM),
    ("scheduler of another process, new form", PROCESS, ("sched_setattr", 1, b"\0" * 56, 0), errno.EPERM),
    ("own scheduler", PROCESS, ("sched_setscheduler", 0, 3, b"\0" * 4), 0),
]
CASES += [
    (f"socket of family {family}", CONTAINER, ("socket", family, kind, 0), errno.EAFNOSUPPORT)
    for family in (0, 3, 4, 5, 6, 9, 15, 17, 21, 29, 30, 31, 32, 35, 38, 40, 41, 42, 43, 44, 45, 46, 99)
    for kind in (socket.SOCK_STREAM,)
]
CASES += [
    (f"socket of family {family}", PROCESS, ("socket", family, socket.SOCK_STREAM, 0), errno.EAFNOSUPPORT)
    for family in (1, 2, 10, 16, 17, 38, 40)
]
if machine() == "x86_64":
    CASES += [
        ("open set-user-id", None, ("open", b"f", O_CREAT | os.O_WRONLY, 0o4755), errno.EPERM),
        ("creat set-user-id", None, ("creat", b"f", 0o4755), errno.EPERM),
        ("creat", None, ("creat", b"f", 0o755), 0),
        ("mkdir set-group-id", None, ("mkdir", b"d", 0o2755), errno.EPERM),
        ("mknod a device", None, ("mknod", b"n", 0o020666, 0x103), errno.EPERM),
        ("mknod a fifo", None, ("mknod", b"p", 0o010666, 0), 0),
        ("chmod set-user-id", CONTAINER, ("chmod", b".", 0o4755), errno.EPERM),
        ("set the core limit, old call", None, ("setrlimit", 4, struct.pack("QQ", 0, 0)), 0),
    ]


@pytest.mark.parametrize(
    ("level", "request_", "expected"),
    [
        pytest.param(level, request_, expected, id=f"{level.value}: {what}")
        for what, only, request_, expected in CASES
        for level in ((only,) if only else BOTH)
    ],
)
def test_arguments(level: Isolation, request_: tuple[Any, ...], expected: int, tmp_path: Path) -> None:
    def attempt() -> int:
        os.chdir(tmp_path)
        ready: list[Any] = [bytes(arg) if isinstance(arg, bytearray) else arg for arg in request_]
        return error_of(*ready)

    assert filtered(level, attempt) == expected


@pytest.mark.parametrize("level", BOTH)
def test_the_core_limit_cannot_be_changed_but_seems_to_be(level: Isolation) -> None:
    import resource

    def attempt() -> tuple[int, tuple[int, int]]:
        before = resource.getrlimit(resource.RLIMIT_CORE)
        error = error_of("prlimit64", 0, 4, struct.pack("QQ", 0, 0), 0)
        after = resource.getrlimit(resource.RLIMIT_CORE)
        assert before == after
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))
        return error, resource.getrlimit(resource.RLIMIT_NOFILE)

    assert filtered(level, attempt) == (0, (50, 60))


# Metadata at process level, where Landlock does not look.

BY_PATH = [
    ("fchmodat", AT_FDCWD, b"f", 0o777),
    ("fchmodat2", AT_FDCWD, b"f", 0o777, 0),
    ("fchownat", AT_FDCWD, b"f", 1, 1, 0),
    ("utimensat", AT_FDCWD, b"f", struct.pack("4q", 1, 0, 1, 0), 0),
    ("setxattr", b"f", b"user.a", b"b", 1, 0),
    ("lsetxattr", b"f", b"user.a", b"b", 1, 0),
    ("removexattr", b"f", b"user.kept"),
    ("lremovexattr", b"f", b"user.kept"),
]
if machine() == "x86_64":
    BY_PATH += [
        ("chmod", b"f", 0o777),
        ("chown", b"f", 1, 1),
        ("lchown", b"f", 1, 1),
        ("utime", b"f", struct.pack("2q", 1, 1)),
        ("utimes", b"f", struct.pack("4q", 1, 0, 1, 0)),
        ("futimesat", AT_FDCWD, b"f", struct.pack("4q", 1, 0, 1, 0)),
    ]


@pytest.mark.parametrize("request_", BY_PATH, ids=lambda request_: request_[0])
def test_metadata_by_path_is_refused_where_the_user_id_is_shared(request_: tuple[Any, ...], tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.touch(0o600)
    os.utime(file, (5, 5))
    before = file.stat()

    def attempt() -> int:
        os.chdir(tmp_path)
        return error_of(*request_)

    assert filtered(PROCESS, attempt, landlock_abi=7) == errno.EPERM
    assert file.stat() == before


def test_metadata_through_a_descriptor_is_refused_where_the_user_id_is_shared(tmp_path: Path) -> None:
    """A descriptor that may only read is enough for the kernel, and Landlock lets many files be read."""
    (tmp_path / "f").touch(0o600)
    before = (tmp_path / "f").stat()

    def attempt() -> list[int]:
        fd = os.open(tmp_path / "f", os.O_RDONLY)
        return [
            error_of("fchmod", fd, 0o750),
            error_of("fchown", fd, -1, -1),
            error_of("utimensat", fd, 0, struct.pack("4q", 1, 0, 2, 0), 0),
            error_of("fsetxattr", fd, b"user.a", b"b", 1, 0),
            error_of("fremovexattr", fd, b"user.a"),
        ]

    assert filtered(PROCESS, attempt, landlock_abi=7) == [errno.EPERM] * 5
    assert (tmp_path / "f").stat() == before


def test_a_path_descriptor_is_no_way_round(tmp_path: Path) -> None:
    (tmp_path / "f").touch(0o600)

    def attempt() -> list[int]:
        fd = os.open(tmp_path / "f", os.O_PATH)
        times = struct.pack("4q", 1, 0, 2, 0)
        return [
            error_of("fchmod", fd, 0o777),
            error_of("fchown", fd, 1, 1),
            error_of("utimensat", fd, 0, times, 0),
            error_of("fsetxattr", fd, b"user.a", b"b", 1, 0),
            error_of("fchmodat2", fd, b"", 0o777, AT_EMPTY_PATH),
            error_of("fchownat", fd, b"", 1, 1, AT_EMPTY_PATH),
            error_of("utimensat", fd, b"", times, AT_EMPTY_PATH),
        ]

    before = (tmp_path / "f").stat()
    assert filtered(PROCESS, attempt, landlock_abi=7) == [errno.EPERM] * 7
    assert (tmp_path / "f").stat() == before


def test_metadata_works_with_a_user_id_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "f").touch(0o600)

    def attempt() -> None:
        os.chmod(tmp_path / "f", 0o751)
        os.utime(tmp_path / "f", (1, 2))

    filtered(PROCESS, attempt, landlock_abi=7, own_uid=True)
    stat = (tmp_path / "f").stat()
    assert (stat.st_mode & 0o7777, stat.st_mtime) == (0o751, 2)


@pytest.mark.parametrize(
    ("request_", "old", "new"),
    [
        (("openat", AT_FDCWD, b"f", os.O_RDONLY | O_TRUNC), errno.EPERM, 0),
        (("openat", AT_FDCWD, b"f", 3 | O_TRUNC), errno.EINVAL, errno.EINVAL),
        (("openat", AT_FDCWD, b"f", os.O_WRONLY | O_TRUNC), 0, 0),
        (("openat", AT_FDCWD, b"f", os.O_RDWR | O_CREAT | O_TRUNC, 0o600), 0, 0),
        (("openat", AT_FDCWD, b"f", os.O_WRONLY | O_CREAT | O_TRUNC, 0o4600), errno.EPERM, errno.EPERM),
        (("truncate", b"f", 0), errno.EPERM, 0),
    ],
)
def test_cutting_files_where_landlock_is_too_old_to_see_it(
    request_: tuple[Any, ...], old: int, new: int, tmp_path: Path
) -> None:
    (tmp_path / "f").write_text("text")

    def attempt() -> int:
        os.chdir(tmp_path)
        return error_of(*request_)

    assert (filtered(PROCESS, attempt, landlock_abi=2), filtered(PROCESS, attempt, landlock_abi=3)) == (old, new)


# What must go on working: the guest agent's calls, then those of ordinary programs.


def _fork_and_wait() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _execute_a_memfd() -> int:
    fd = os.memfd_create("program")
    os.write(fd, Path("/bin/true").read_bytes())
    pid = os.fork()
    if pid == 0:
        os.execve(fd, ["true"], {})
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _event_loop() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    mask = struct.pack("Q", 1 << (signal.SIGCHLD - 1))
    signals, _ = call("signalfd4", -1, mask, 8, os.O_CLOEXEC)
    assert signals >= 0
    with select.epoll() as poll:
        poll.register(signals, select.EPOLLIN)
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        ready = poll.poll(10)
        os.waitpid(pid, 0)
        return len(ready)


def _pidfd() -> int:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    fd = os.pidfd_open(pid)
    signal.pidfd_send_signal(fd, signal.SIGTERM)
    os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _inotify() -> bool:
    fd, _ = call("inotify_init1", 0)
    with tempfile.TemporaryDirectory() as directory:
        watch, _ = call("inotify_add_watch", fd, directory.encode(), 0x100)
        Path(directory, "f").touch()
        return watch > 0 and len(os.read(fd, 4096)) > 0


def _pipes() -> bytes:
    first, second, third = os.pipe(), os.pipe(), os.pipe()
    os.write(first[1], b"through")
    assert call("tee", first[0], second[1], 100, 0) == (7, 0)
    os.splice(second[0], third[1], 100)
    fcntl.fcntl(third[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    size = array.array("i", [0])
    fcntl.ioctl(third[0], termios.FIONREAD, size)
    return os.read(third[0], size[0])


def _pass_a_descriptor() -> bytes:
    left, right = socket.socketpair()
    reader, writer = os.pipe()
    socket.send_fds(left, [b"x"], [writer])
    _data, fds, _flags, _address = socket.recv_fds(right, 1, 1)
    os.write(fds[0], b"passed")
    return os.read(reader, 6)


def _terminal() -> bytes:
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 30, 90, 0, 0))
    pid = os.fork()
    if pid == 0:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        os.dup2(slave, 1)
        os.tcsetpgrp(1, os.getpgrp())
        os.write(1, struct.pack("2H", *os.get_terminal_size(1)))
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(master, 100)


def _subreaper() -> tuple[int, int]:
    return error_of("prctl", 36, 1, 0, 0, 0), error_of("prctl", 4, 1, 0, 0, 0)


def _threads() -> int:
    found: list[int] = []
    workers = [threading.Thread(target=found.append, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(found)


def _memory() -> bytes:
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as area:
        area[:4] = b"code"
        area.madvise(mmap.MADV_WILLNEED)
        return area[:4]


def _own_filters() -> tuple[int, int]:
    allow_all = struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)
    import ctypes

    code = ctypes.create_string_buffer(allow_all)
    filter_ = struct.pack("<HxxxxxxQ", 1, ctypes.addressof(code))
    return error_of("seccomp", 1, 0, filter_), error_of("landlock_create_ruleset", b"\1" + b"\0" * 7, 8, 0)


def _system_v() -> bool:
    identity, error = call("shmget", 0, 4096, 0o1600)
    assert error == 0
    return error_of("shmctl", identity, 0, 0) == 0


def _loopback() -> bytes:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with client, accepted:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(b"hello")
            return accepted.recv(5)


def _local_datagrams() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.bind(f"{directory}/s")
        with receiver, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"hello", f"{directory}/s")
            return receiver.recv(5)


@pytest.mark.parametrize("level", BOTH)
@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (_fork_and_wait, 7),
        (_execute_a_memfd, 0),
        (_event_loop, 1),
        (_pidfd, -signal.SIGTERM),
        (_inotify, True),
        (_pipes, b"through"),
        (_pass_a_descriptor, b"passed"),
        (_terminal, struct.pack("2H", 90, 30)),
        (_subreaper, (0, 0)),
        (_threads, 6),
        (_memory, b"code"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_agent_and_programs_need(level: Isolation, work: Callable[[], Any], expected: Any) -> None:
    assert filtered(level, work) == expected


@pytest.mark.parametrize(
    ("work", "expected"),
    [(_system_v, True), (_loopback, b"hello"), (_local_datagrams, b"hello"), (socket.if_nameindex, None)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_only_the_container_level_has(work: Callable[[], Any], expected: Any) -> None:
    found = filtered(CONTAINER, work)
    assert found == expected if expected is not None else found


@pytest.mark.parametrize("level", BOTH)
def test_programs_may_confine_themselves_further(level: Isolation) -> None:
    assert filtered(level, _own_filters)[0] == 0


@pytest.mark.parametrize("level", BOTH)
def test_the_filter_cannot_be_taken_off(level: Isolation) -> None:
    assert filtered(level, lambda: error_of("prctl", 22, 0, 0, 0, 0)) == errno.EINVAL


@pytest.mark.parametrize("level", BOTH)
def test_the_filter_holds_across_execve(level: Isolation) -> None:
    code = (
        f"import ctypes; l=ctypes.CDLL(None, use_errno=True); l.syscall({number('mount')}); print(ctypes.get_errno())"
    )

    def attempt() -> int:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(writer, 1)
            os.execv(sys.executable, [sys.executable, "-S", "-c", code])
        os.waitpid(pid, 0)
        return int(os.read(reader, 100))

    assert filtered(level, attempt) == errno.EPERM


def test_32_bit_entry_is_killed(tmp_path: Path) -> None:
    if machine() != "x86_64":
        return  # aarch64 has no second entry that a 64-bit process could use
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # mov eax, 20 (getpid of i386); int 0x80; ret

    def attempt() -> None:
        import ctypes

        area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        area[: len(code)] = code
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        ctypes.CFUNCTYPE(ctypes.c_int)(address)()

    with pytest.raises(AssertionError, match="SIGSYS"):
        filtered(CONTAINER, attempt)


def test_no_filter_for_a_level_without_one() -> None:
    with pytest.raises(ValueError, match="no system call filter for level auto"):
        rules_by_name(Isolation.AUTO)


@pytest.mark.parametrize("level", BOTH)
def test_every_name_in_the_tables_is_a_system_call(level: Isolation) -> None:
    assert rules_by_name(level).keys() - table("x86_64").keys() == set()


def test_no_call_is_in_two_tables() -> None:
    tables = [calls.COMMON, calls.METADATA, calls.NAMING_SOCKETS, calls.SYSTEM_V, calls.DENIED]
    names = [name for one in tables for name in one]
    assert len(names) == len(set(names))
