"""Starts the programs of this level: confined monitors, and the tool that packs a template's files.

Both are forked by a nursery that is process 1 of a pid namespace: when the daemon dies, however it dies, the kernel
ends them all.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tartarus.guest.program import Fd, Program
from tartarus.runtimes.cgroups import Cgroup, add_joining, admit
from tartarus.runtimes.confine import caps, landlock
from tartarus.runtimes.container.layout import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    unshare_program,
)
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.idmap import OWNER_UID
from tartarus.runtimes.microvm.home import Home
from tartarus.runtimes.nursery import Clone, Nursery

FIRST_UID = OWNER_UID + 1
"""Each monitor runs as a user of its own, from here on: one that its guest took over can't touch another."""
UIDS = 65536
_FLAGS = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
_FIRST_FD = 3
_FILE_SLACK = 64 * 1024 * 1024
"""Beside what it is given, a monitor writes the state of its devices."""
_ENTRIES_AT = 1
_MAY_READ = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt")
_FILES = ("/etc/ld.so.cache",)
_DEVICES = ("/dev/null", "/dev/urandom", "/dev/kvm")


def add_exec(program: Program, argv: Sequence[str], env: Sequence[str] = ()) -> None:
    """End a program by becoming another one."""
    vectors = []
    for words in (argv, env):
        vector = program.blob(bytes(8 * (len(words) + 1)))
        for index, word in enumerate(words):
            program.reloc(program.blob(word.encode() + b"\0"), into=vector, at=8 * index)
        vectors.append(vector)
    program.syscall("execve", argv[0], *vectors, step=f"run {argv[0]}")


def add_limit(program: Program, which: int, limit: int) -> None:
    """Hold a program to a limit, soft and hard."""
    program.syscall("prlimit64", 0, which, program.blob(struct.pack("<QQ", limit, limit)), 0, step="set limits")


def descriptor(index: int) -> int:
    """The number under which a program finds the n-th descriptor that was passed to it."""
    return _FIRST_FD + index


class Own(NamedTuple):
    """What a monitor that is told paths gets beside descriptors: a directory to work in, and where its output goes."""

    home: Home
    output: int


def confined(
    argv: Sequence[str], uid: int, n_entries: int, abi: int, largest_file: int, held: Sequence[int] = (), *, own: bool
) -> Program:
    """What a monitor does to itself before it is executed: its cgroup, its user, no rights, no files but its own.

    Of the passed descriptors, the first is its channel, then come the cgroup's entries, then its own: with `own`, the
    first two of these are those of `Own`. `held`: numbers of those that it may open again.
    """
    program = Program()
    _begin(program, n_entries, own=own)
    add_limit(program, resource.RLIMIT_FSIZE, largest_file)
    caps.add_bounding_drop(program)
    groups = _kvm_groups()
    listed = program.blob(struct.pack(f"<{len(groups)}I", *groups) or bytes(4))
    program.syscall("setgroups", len(groups), listed, step="leave all groups")
    program.syscall("setresgid", uid, uid, uid, step="take a group of its own")
    program.syscall("setresuid", uid, uid, uid, step="become a user of its own")
    caps.add_capability_drop(program, bounding=False)
    rules = [landlock.PathRule(os.path.realpath(path), landlock.RUN) for path in _MAY_READ]
    rules += [landlock.PathRule(path, landlock.READ, file=True) for path in _FILES]
    rules += [landlock.PathRule(path, landlock.DEVICE, file=True) for path in _DEVICES]
    rules.append(landlock.PathRule("/proc", landlock.READ))
    rules.append(landlock.PathRule(os.path.realpath(argv[0]), landlock.RUN, file=True))
    if own:
        rules.append(landlock.PathRule(".", landlock.READ | landlock.WRITE))
    landlock.add_landlock(program, abi, rules, tcp=False, held=held)
    add_exec(program, argv, ["PATH=/usr/bin:/bin"])
    return program


def jailed(argv: Sequence[str], n_entries: int) -> Program:
    """The same for a monitor whose own jailer takes its rights away: that must have them first."""
    program = Program()
    _begin(program, n_entries, own=True)
    add_exec(program, argv, ["PATH=/usr/bin:/bin"])
    return program


def _begin(program: Program, n_entries: int, *, own: bool) -> None:
    add_joining(program, _ENTRIES_AT, n_entries)
    for index in range(_ENTRIES_AT, _ENTRIES_AT + n_entries):
        program.syscall("close", Fd(index), step="let go of the cgroup")
    for which, limit in ((resource.RLIMIT_CORE, 1), (resource.RLIMIT_NOFILE, 1024), (resource.RLIMIT_MEMLOCK, 65536)):
        add_limit(program, which, limit)
    if own:
        first = _ENTRIES_AT + n_entries
        program.syscall("fchdir", Fd(first), step="enter its directory")
        for number in (1, 2):
            program.syscall("dup3", Fd(first + 1), number, 0, step="send its output where it belongs")


def _kvm_groups() -> list[int]:
    try:
        device = os.stat("/dev/kvm")
    except OSError:
        return []
    return [device.st_gid] if device.st_gid and device.st_mode & stat.S_IRGRP else []


class Ends(NamedTuple):
    """Both ends of a monitor's channel; it finds its own as `descriptor(0)`."""

    ours: socket.socket
    theirs: socket.socket


async def open_nursery(what: str) -> Nursery:
    """A nursery of programs of the host's own, apart in namespaces that end with it. Raises GuestFailed, NoSpace."""
    nursery = await Nursery.spawn(what, shared_pids=False)
    try:
        await nursery.run(unshare_program(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWCGROUP))
        await nursery.fork()
    except BaseException:
        nursery.close()
        await nursery.gone()
        raise
    return nursery


class Launcher:
    """Owns the nursery of all monitors."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._landlock_abi = landlock.abi()
        self._count = 0

    @classmethod
    async def open(cls) -> Launcher:
        """Start it."""
        return cls(await open_nursery("machines"))

    async def start(
        self,
        arguments: Callable[[list[int]], list[str]],
        ends: Ends,
        fds: Sequence[int],
        cgroup: Cgroup | None,
        own: Own | None = None,
        *,
        reopened: Sequence[int] = (),
        jailer: bool = False,
    ) -> Clone:
        """Start a monitor. `arguments` makes its command line from the numbers that `fds` have for it.

        `reopened`: which of `fds` it opens again by their numbers. `own`: it is told paths, and so may open all.
        `jailer`: it is Firecracker's jailer, for a monitor that is to be the home's user.
        No file that it writes to grows beyond the largest that it is given: a disk can't become the host's.
        It tells on its channel why it could not be started (BootFailed).
        """
        entries = [] if cgroup is None else cgroup.entries()
        try:
            first = 1 + len(entries) + (0 if own is None else len(own))
            numbers = [descriptor(first + index) for index in range(len(fds))]
            self._count += 1
            uid = FIRST_UID + self._count % UIDS
            if own is not None:
                own.home.belong_to(uid)
                os.fchown(own.output, uid, uid)
            argv = arguments(numbers)
            if jailer:
                program = jailed(argv, len(entries))
            else:
                again = fds if own is not None else reopened
                held = [number for number, fd in zip(numbers, fds, strict=True) if fd in again]
                largest = max((os.fstat(fd).st_size for fd in fds), default=0) + _FILE_SLACK
                program = confined(argv, uid, len(entries), self._landlock_abi, largest, held, own=own is not None)
            mine = [] if own is None else [own.home.fd, own.output]
            passed = [ends.theirs.fileno(), *entries, *mine, *fds]
            born = await self._nursery.clone(program.encode(), _FLAGS, passed)
            try:
                admit(cgroup, ends.ours, born.pid, len(entries))
            except BaseException:
                os.close(born.pidfd)
                raise
        finally:
            close_all(entries)
        return born

    @property
    def alive(self) -> bool:
        """Whether its nursery lives."""
        return not self._nursery.control.closed.done()

    async def close(self) -> None:
        """End every monitor."""
        self._nursery.close()
        await self._nursery.gone()
