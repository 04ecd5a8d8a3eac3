"""The warm Python runner: an interpreter that has already imported a template's modules, and waits.

One file, standard library only, Python 3.8 and later, always single-threaded. It is copied into the
template's root file system and runs there, never on the host's side of a sandbox's wall:

``python3 runner.py zygote --control=FD --imports=numpy,pandas`` imports, parks, and answers CLONE requests.
Each clone enters fresh namespaces, runs the confinement program it was handed, and splits in two: one half
becomes the guest agent, the other the sandbox's runner, which executes `python3 ...` command lines as the
real interpreter would, without its start-up and imports. What it can't do exactly, it refuses, and the agent
starts a real interpreter.

``python3 runner.py context`` runs code cells: JSON lines in, JSON lines out.

Two things shape the code. A clone shares its memory with the parked interpreter until it writes, and each
page first written costs 2 microseconds and 4 KiB: so what a run needs is made before parking, and the way
to the user's first bytecode is short. And user code must find a fresh interpreter: no frames, modules,
descriptors, signals or random numbers of ours. Nothing here is trusted by the host: once user code runs,
this process is the user's.
"""


# ruff: noqa: PLR1714 - a formatted string or a set costs more bytecode, which each clone touches anew

from __future__ import annotations

import sys

STARTUP_MODULES = frozenset(sys.modules)  # what any python3 has loaded before its script directory counts

import _signal  # type: ignore[import-not-found]  # noqa: E402  (the line above must come first)
import _socket  # noqa: E402
import atexit  # noqa: E402
import ctypes  # noqa: E402
import errno  # noqa: E402
import gc  # noqa: E402
import os  # noqa: E402
import posix  # noqa: E402
import select  # noqa: E402
import stat  # noqa: E402
import struct  # noqa: E402
from _frozen_importlib import BuiltinImporter  # noqa: E402
from _frozen_importlib_external import SourceFileLoader  # noqa: E402
from _io import BufferedRandom, BufferedWriter, TextIOWrapper  # noqa: E402
from _io import open as open_file  # noqa: E402
from _locale import CODESET, LC_CTYPE, nl_langinfo, setlocale  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType
    from typing import Any, NoReturn

VERSION = sys.version_info[:2]
linecache = None  # type: Any
if VERSION >= (3, 13):  # where start-up loads it too, for a -c program
    import linecache

# ---------------------------------------------------------------------------------------------- the kernel

ARM = os.uname().machine in ("aarch64", "arm64")
if ARM:
    SYS_CLONE, SYS_EXECVEAT, SYS_PRCTL, SYS_GETTID, SYS_FUTEX, SYS_IOCTL, SYS_RT_SIGACTION = (
        220,
        281,
        167,
        178,
        98,
        29,
        134,
    )
else:
    SYS_CLONE, SYS_EXECVEAT, SYS_PRCTL, SYS_GETTID, SYS_FUTEX, SYS_IOCTL, SYS_RT_SIGACTION = (
        56,
        322,
        157,
        186,
        202,
        16,
        13,
    )
SYS_CLOSE_RANGE, SYS_PIDFD_OPEN = 436, 434

CLONE_VM = 0x100
CLONE_PIDFD = 0x1000
CLONE_CHILD_SETTID = 0x01000000
CLONE_NEWPID = 0x20000000
FUTEX_WAKE_PRIVATE = 129
AT_EMPTY_PATH = 0x1000
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
TIOCSCTTY = 0x540E
BUFFERING = (BufferedRandom, BufferedWriter, TextIOWrapper)
SIGINT, SIGKILL, SIGPIPE, SIGCHLD, SIGXFSZ = 2, 9, 13, 17, 25

# PyDLL: the GIL stays held, so a call costs a fraction of a microsecond and no other state is touched.
_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] + [ctypes.c_size_t] * 6
_fflush = _libc.fflush
_fflush.argtypes = [ctypes.c_void_p]
_clearenv = _libc.clearenv
_clearenv.argtypes = []
_memmove = ctypes.memmove
_memset = ctypes.memset


def signals_to_default() -> None:
    """Give every signal its default action; by the kernel's call, as libc keeps 32 and 33 to itself."""
    action = ctypes.create_string_buffer(32)  # struct sigaction of zeros: SIG_DFL
    for number in range(1, 65):
        _syscall(SYS_RT_SIGACTION, number, ctypes.addressof(action), 0, 8, 0, 0)


def close_fds_from(first: int) -> None:
    """Close every descriptor from `first` up."""
    if _syscall(SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0, 0, 0, 0) == 0:
        return
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= first:
            try:
                os.close(int(name))
            except OSError:
                pass  # the descriptor listdir itself used


def rights_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message."""
    fds = []  # type: list[int]
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds.extend(struct.unpack("<%di" % (len(data) // 4), data[: len(data) & ~3]))
    return fds


# ------------------------------------------------------------------------------------ confinement programs

PROGRAM_HEADER = struct.Struct("<4sHHI")
OP = struct.Struct("<BBHiiI6s2x6Q")
SLOT = struct.Struct("<i")
REPORT = struct.Struct("<IBBHIII")  # a BOOT_FAILED frame: header, step, errno
BOOT_FAILED = 0x82
STEP_PROGRAM, STEP_AGENT, STEP_RUNNER = 0xFFFF0001, 0xFFFF0002, 0xFFFF0003
BLOB, FD, LOAD = 1, 2, 3
NO_TAGS = bytes(6)
FIRST_FD = 3


class BootFailed(Exception):
    """A step of the program failed: (step, errno)."""


def run_program(address: int, program: memoryview, n_fds: int) -> None:
    """Run the system calls of a program that lies, writable, at `address`; raise BootFailed at the first failure."""
    magic, version, n_ops, blob_len = PROGRAM_HEADER.unpack_from(program)
    ops_end = PROGRAM_HEADER.size + n_ops * OP.size
    if magic != b"TPRG" or version != 1 or ops_end + blob_len > len(program):
        raise BootFailed(STEP_PROGRAM, errno.EINVAL)
    blob = address + ops_end
    loads = program[ops_end : ops_end + blob_len]
    call, get_errno, load = _syscall, ctypes.get_errno, SLOT.unpack_from
    for kind, _, ok_errno, number, store_at, step, tags, *args in OP.iter_unpack(
        program[PROGRAM_HEADER.size : ops_end]
    ):
        if tags != NO_TAGS:
            for index, tag in enumerate(tags):
                if tag == BLOB:
                    args[index] += blob
                elif tag == FD:
                    if args[index] >= n_fds:
                        raise BootFailed(step, errno.EBADF)
                    args[index] += FIRST_FD
                elif tag == LOAD:
                    args[index] = load(loads, args[index])[0]
        if kind == 0:
            result = call(number, *args)
            if result == -1:
                failed = get_errno()
                if failed != ok_errno:
                    raise BootFailed(step, failed)
            elif store_at >= 0:
                struct.pack_into("<i", loads, store_at, result)
        elif kind == 1:
            struct.pack_into("<Q", loads, args[1], blob + args[0])
        else:
            raise BootFailed(step, errno.EINVAL)


def report_failure(step: int, number: int) -> NoReturn:
    """Tell the host, over the channel, which step failed, and end."""
    try:
        os.write(FIRST_FD, REPORT.pack(8, BOOT_FAILED, 0, 0, 0, step, number))
    finally:
        os._exit(125)


# --------------------------------------------------------------------------------------------------- split

# A clone must become two processes: the agent, which is pid 1, and this interpreter as its child. fork(2)
# would copy every page table again only for execve(2) to throw one copy away. Instead the child is made to
# share the memory (CLONE_VM), and the parent calls execveat at once, touching neither stack nor heap: so it
# can't be C, let alone Python. These are its instructions; `Split.FIELDS` names what they read, 8 bytes each.
# - clone(flags, 0, 0, child_tid): the child, and a parent without one, return;
# - futex(&go, FUTEX_WAIT_PRIVATE, 0) until `go` is not 0;
# - execveat(exe, path, argv, envp, AT_EMPTY_PATH); if that returns, its errno goes into bytes 16 to 19 of the
#   report, which is written to report_fd;
# - exit_group(125).
SPLIT_X86_64 = (
    "534889fbb838000000488b3b31f631d24c8b53084531c00f054885c07e5e488d7b40833f007513b8ca000000be8000000031d24531d2"
    "0f05ebe4b842010000488b7b10488b7318488b53204c8b532841b8001000000f05f7d8488b7330894610488b7b38ba14000000b80100"
    "00000f05b8e7000000bf7d0000000f055bc3"
)
SPLIT_AARCH64 = (
    "e90300aa881b80d2200140f9010080d2020080d2030080d2240540f9010000d41f0000f16d0300542001019101fcdf88e1000035480c80"
    "d2011080d2020080d2030080d2010000d4f8ffff17282380d2200940f9210d40f9221140f9231540f9040082d2010000d4e003004b2119"
    "40f9201000b9201d40f9820280d2080880d2010000d4c80b80d2a00f80d2010000d4c0035fd6"
)
AGENT_ARGV0 = b"tartarus-guest"


class Split:
    """Turns one process into agent (parent) and runner (child) without copying page tables."""

    FIELDS = ("flags", "child_tid", "exe", "path", "argv", "envp", "report", "report_fd", "go")

    def __init__(self) -> None:
        self.usable = False
        self.fields = (ctypes.c_uint64 * len(self.FIELDS))()
        self.address = ctypes.addressof(self.fields)
        self.go = self.address + 8 * self.FIELDS.index("go")
        self.path = ctypes.create_string_buffer(b"")
        self.envp = (ctypes.c_void_p * 1)()
        self.runner_option = ctypes.create_string_buffer(b"--runner=", 32)
        self.pid_option = ctypes.create_string_buffer(b"--runner-pid=2", 32)
        self.report = ctypes.create_string_buffer(REPORT.pack(8, BOOT_FAILED, 0, 0, 0, STEP_AGENT, 0), REPORT.size)
        self.words = [
            ctypes.create_string_buffer(AGENT_ARGV0), ctypes.create_string_buffer(b"agent"),
            ctypes.create_string_buffer(b"--channel=3"), self.runner_option, self.pid_option,
            ctypes.create_string_buffer(b"--shared-pids"),
        ]  # fmt: skip
        self.argv = (ctypes.c_void_p * 7)(*[ctypes.addressof(word) for word in self.words])
        addresses = {name: ctypes.addressof(getattr(self, name)) for name in ("path", "argv", "envp", "report")}
        for index, name in enumerate(self.FIELDS):
            self.fields[index] = addresses.get(name, 0)

    def prepare(self) -> None:
        """Map the instructions and try them out; where that fails, fork(2) is used instead."""
        code = bytes.fromhex(SPLIT_AARCH64 if ARM else SPLIT_X86_64)
        mmap, mprotect = _libc.mmap, _libc.mprotect
        mmap.restype = ctypes.c_void_p
        mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        page = mmap(None, 4096, 3, 0x22, -1, 0)
        if page in (None, ctypes.c_void_p(-1).value):
            return
        ctypes.memmove(page, code, len(code))
        if mprotect(page, 4096, 5) != 0:
            return
        self.enter = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(page)
        self.tid = self.find_tid()
        self.usable = self.tid != 0 and self.works()

    @staticmethod
    def find_tid() -> int:
        """The address where the C library keeps this thread's id: the one that fork(2) changed; 0 if in doubt."""
        pthread_self = _libc.pthread_self
        pthread_self.restype = ctypes.c_size_t
        words = (ctypes.c_uint32 * 224).from_address(pthread_self())

        def places() -> list[int]:
            tid = _syscall(SYS_GETTID, 0, 0, 0, 0, 0, 0)
            return [index for index, word in enumerate(words) if word == tid]

        before = places()
        readable, writable = os.pipe()
        if os.fork() == 0:
            os.write(writable, bytes(set(before) & set(places())))
            os._exit(0)
        os.close(writable)
        found = os.read(readable, 256)
        os.close(readable)
        return ctypes.addressof(words) + 4 * found[0] if len(found) == 1 else 0

    def works(self) -> bool:
        """Split a throw-away child, whose execveat is made to fail: both halves must say so."""
        readable, writable = os.pipe()
        if os.fork() == 0:
            try:
                if self.split(2**32 - 1, 0, writable) == 0:
                    tid = ctypes.c_uint32.from_address(self.tid).value
                    self.release(2)
                    os.write(writable, b"y" if tid == _syscall(SYS_GETTID, 0, 0, 0, 0, 0, 0) else b"n")
            finally:
                os._exit(0)
        os.close(writable)
        said = b""
        while True:
            data = os.read(readable, 64)
            if not data:
                break
            said += data
        os.close(readable)
        report = REPORT.pack(8, BOOT_FAILED, 0, 0, 0, STEP_AGENT, errno.EBADF)
        return said in (b"y" + report, report + b"y")

    def split(self, exe: int, go: int, report_fd: int) -> int:
        """0 in the child; the parent does not return, but becomes `exe` once `go`; a negative errno on failure."""
        fields = self.fields
        fields[0], fields[1] = CLONE_VM | CLONE_CHILD_SETTID | SIGCHLD, self.tid
        fields[2], fields[7], fields[8] = exe, report_fd, go
        return self.enter(self.address)  # type: ignore[no-any-return]

    def release(self, pid: int) -> None:
        """In the child: let the parent go on, with `pid` in its arguments."""
        self.pid_option.value = b"--runner-pid=%d" % pid
        ctypes.c_uint32.from_address(self.go).value = 1
        _syscall(SYS_FUTEX, self.go, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0)

    def divide(self, runner_fd: int, own_pids: bool) -> int:
        """Become the agent, and return 0 in a new child that goes on as the runner."""
        self.runner_option.value = b"--runner=%d" % runner_fd
        if own_pids:
            self.argv[5] = None  # the runner is the second process of its namespace: its number is known
        if self.usable:
            result = self.split(FIRST_FD + 1, int(own_pids), FIRST_FD)
            if result < 0:
                raise OSError(-result, "clone")
            if not own_pids:
                self.release(os.getpid())
            for hook in prepared.fork_hooks:
                hook()
            return 0
        pid = os.fork()
        if pid:
            self.pid_option.value = b"--runner-pid=%d" % pid
            fields = self.fields
            _syscall(SYS_EXECVEAT, FIRST_FD + 1, fields[3], fields[4], fields[5], AT_EMPTY_PATH, 0)
            report_failure(STEP_AGENT, ctypes.get_errno())
        return pid


# -------------------------------------------------------------------------------------------------- zygote

REQUEST = struct.Struct("<4sIQI")
REPLY = struct.Struct("<4sIIi")
MAX_REQUEST = 192 * 1024
MAX_PASSED_FDS = 64
HIGH_FD = 900
SPARE_DELAY_MS = 2
ONE_THREAD = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMEXPR_MAX_THREADS",
    "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS",
)  # fmt: skip


class Spare:
    """A clone made ahead of its request: in its namespaces, its memory warm, waiting for its program."""

    def __init__(self, flags: int, pid: int, pidfd: int, link: _socket.socket) -> None:
        self.flags = flags
        self.pid = pid
        self.pidfd = pidfd
        self.link = link
        self.warm = False


class Zygote:
    """The parked interpreter. Everything a clone needs on its way is made here, before parking."""

    def __init__(self, control_fd: int) -> None:
        import fcntl

        # High up, so that received descriptors land exactly on 3, 4, 5, ... and need no moving.
        control = fcntl.fcntl(control_fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
        os.close(control_fd)
        self.duplicate = fcntl.fcntl
        self.above = fcntl.F_DUPFD_CLOEXEC
        self.control = _socket.socket(fileno=control)
        self.buffer = ctypes.create_string_buffer(MAX_REQUEST)
        self.address = ctypes.addressof(self.buffer)
        self.view = memoryview(self.buffer).cast("B")
        self.pidfd = ctypes.c_int(-1)
        self.split = Split()
        self.spare = None  # type: Spare | None
        self.poll = select.poll()
        self.poll.register(control, select.POLLIN)

    def fail(self, message: str) -> NoReturn:
        """Refuse to park, with a reason for people."""
        text = message.encode("utf-8", "replace")[:60000]
        self.control.send(struct.pack("<4sI", b"TERR", len(text)) + text)
        os._exit(1)

    def serve(self) -> NoReturn:
        """Answer CLONE requests until the control socket is closed; when idle, make the next clone ahead."""
        flags = -1
        while True:
            if flags >= 0 and self.spare is None and not self.poll.poll(SPARE_DELAY_MS):
                self.make_spare(flags)
            size, fds, whole = self.receive()
            if size == 0:
                os._exit(0)
            magic, sequence, flags, program_len = REQUEST.unpack_from(self.view)
            well_formed = size >= REQUEST.size and magic == b"TCLN" and program_len == size - REQUEST.size
            if not (well_formed and whole and len(fds) >= 2):
                self.control.send(REPLY.pack(b"TCLD", sequence, errno.EINVAL, 0))
                flags = -1
            elif not self.hand_over(sequence, flags, size, fds):
                pid = self.clone(flags)
                if pid == 0:
                    try:
                        self.become_guest(fds, flags, program_len)
                    finally:
                        os._exit(125)
                self.reply(sequence, pid, self.pidfd.value)
            for fd in fds:
                os.close(fd)
            # Clones to come inherit this memory: they must not read there what was asked for earlier ones.
            _memset(self.address, 0, size)

    def receive(self) -> tuple[int, list[int], bool]:
        """One packet into the buffer: its size, the descriptors that came along, and whether it is whole."""
        size, ancillary, flags, _ = self.control.recvmsg_into(
            [self.view], _socket.CMSG_SPACE(4 * MAX_PASSED_FDS), _socket.MSG_CMSG_CLOEXEC
        )
        return size, rights_in(ancillary), not flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC)

    def clone(self, flags: int) -> int:
        """Fork into new namespaces, with a pidfd: 0 in the child, -1 on failure."""
        pidfd = ctypes.addressof(self.pidfd)
        return _syscall(SYS_CLONE, flags | SIGCHLD | CLONE_PIDFD, 0, pidfd, 0, 0, 0)  # type: ignore[no-any-return]

    def reply(self, sequence: int, pid: int, pidfd: int) -> None:
        """Answer one request: the child's pid and pidfd, or why there is none."""
        if pid < 0:
            self.control.send(REPLY.pack(b"TCLD", sequence, ctypes.get_errno(), 0))
            return
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("<i", pidfd))]
        self.control.sendmsg([REPLY.pack(b"TCLD", sequence, 0, pid)], rights)
        os.close(pidfd)

    def make_spare(self, flags: int) -> None:
        """Clone ahead, in quiet moments: the next request of this kind then waits for neither fork nor faults."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        link = _socket.socket(fileno=self.duplicate(ours.fileno(), self.above, HIGH_FD))
        ours.close()
        pid = self.clone(flags)
        if pid == 0:
            try:
                os.dup2(theirs.fileno(), self.control.fileno(), False)
                theirs.close()
                link.close()
                self.become_spare(flags)
            finally:
                os._exit(125)
        theirs.close()
        if pid > 0:
            self.spare = Spare(flags, pid, self.pidfd.value, link)
        else:
            link.close()

    def become_spare(self, flags: int) -> NoReturn:
        """In the spare: write to every page that the way to a program writes to, then wait for the program."""
        rehearse()
        exercise(LIGHT_EXERCISES)
        self.control.send(b"\0")
        size, fds, _ = self.receive()
        if size == 0:
            os._exit(0)
        self.become_guest(fds, flags, size - REQUEST.size)

    def hand_over(self, sequence: int, flags: int, size: int, fds: list[int]) -> bool:
        """Give a request to the spare, if there is one that fits, lives, and has finished warming."""
        spare = self.spare
        if spare is None:
            return False
        given = False
        try:
            if spare.flags == flags:
                if not spare.warm:
                    spare.link.recv(1, _socket.MSG_DONTWAIT)
                    spare.warm = True
                rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("<%di" % len(fds), *fds))]
                spare.link.sendmsg([self.view[:size]], rights, _socket.MSG_NOSIGNAL)
                given = True
        except BlockingIOError:
            return False
        except OSError:
            pass  # it was killed
        self.spare = None
        spare.link.close()
        if given:
            self.reply(sequence, spare.pid, spare.pidfd)
        else:
            os.close(spare.pidfd)
        return given

    def become_guest(self, fds: list[int], clone_flags: int, program_len: int) -> NoReturn:
        """In the clone: confine, then split into agent (this process) and runner (its child)."""
        step = STEP_PROGRAM
        try:
            n_fds = len(fds)
            if fds[0] != FIRST_FD or fds[-1] != FIRST_FD + n_fds - 1:
                self.move(fds)
            close_fds_from(FIRST_FD + n_fds)
            agent_side, runner_side = _socket.socketpair()
            _signal.signal(SIGCHLD, _signal.SIG_DFL)
            start = REQUEST.size
            run_program(self.address + start, self.view[start : start + program_len], n_fds)
            os.closerange(FIRST_FD + 2, FIRST_FD + n_fds)  # the program may have closed some itself
            step = STEP_RUNNER
            os.set_inheritable(FIRST_FD, True)
            os.set_inheritable(agent_side.fileno(), True)
            self.split.divide(agent_side.fileno(), bool(clone_flags & CLONE_NEWPID))
            agent_side.close()
            os.close(FIRST_FD)
            os.close(FIRST_FD + 1)
        except BootFailed as failure:
            report_failure(failure.args[0], failure.args[1])
        except OSError as failure:
            report_failure(step, failure.errno or errno.EIO)
        except BaseException:
            report_failure(step, errno.EINVAL)
        Runner(runner_side, self.view).serve()

    def move(self, fds: list[int]) -> None:
        """Move descriptors to 3, 4, 5, ... whatever their numbers are; the caller closes the rest."""
        top = FIRST_FD + len(fds)
        high = [self.duplicate(fd, self.above, top) for fd in fds]
        for index, fd in enumerate(high):
            os.dup2(fd, FIRST_FD + index, False)


def zygote_main(control_fd: int, imports: list[str], script: str) -> NoReturn:
    """Import, prepare, park, serve."""
    zygote = Zygote(control_fd)
    try:
        warm_up(zygote, imports, script)
    except BaseException as failure:
        zygote.fail("the warm-up failed: %s: %s" % (type(failure).__name__, failure))
    zygote.control.send(struct.pack("<4sI", b"TRDY", 0))
    zygote.serve()


class Uncloned(Zygote):
    """An interpreter that serves where it is: no nursery asks it for clones, or hears why it could not park."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(MAX_REQUEST)
        self.view = memoryview(self.buffer).cast("B")
        self.split = Split()

    def fail(self, message: str) -> NoReturn:
        """Give up, with a reason for people."""
        os.write(2, message.encode("utf-8", "replace")[:60000])
        os._exit(1)


class Resident(Uncloned):
    """An interpreter that is never cloned here: its whole guest is saved when it has parked, and restored.

    It is the guest's first process, with the channel as one of its descriptors; when it is warm it splits in two.
    """

    def __init__(self, channel: int, agent: str) -> None:
        import fcntl

        super().__init__()
        self.channel = fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
        self.agent = os.open(agent, os.O_RDONLY | os.O_CLOEXEC)
        self.duplicate = fcntl.fcntl
        self.above = fcntl.F_DUPFD_CLOEXEC

    def settle(self) -> NoReturn:
        """Become agent and runner."""
        agent_side, runner_side = _socket.socketpair()
        fds = [self.channel, self.agent, agent_side.detach(), runner_side.detach()]
        self.move(fds)
        close_fds_from(FIRST_FD + len(fds))
        runner_side = _socket.socket(fileno=FIRST_FD + 3)
        os.set_inheritable(FIRST_FD, True)
        os.set_inheritable(FIRST_FD + 2, True)
        self.split.argv[5] = None  # the guest has process ids of its own; but which one is the runner's is not known
        _signal.signal(SIGCHLD, _signal.SIG_DFL)
        try:
            self.split.divide(FIRST_FD + 2, False)
            for fd in (FIRST_FD, FIRST_FD + 1, FIRST_FD + 2):
                os.close(fd)
        except OSError as failure:
            report_failure(STEP_RUNNER, failure.errno or errno.EIO)
        Runner(runner_side, self.view).serve()


def resident_main(channel: int, agent: str, imports: list[str], script: str) -> NoReturn:
    """Import, prepare, and become a guest that waits."""
    resident = Resident(channel, agent)
    try:
        warm_up(resident, imports, script)
    except BaseException as failure:
        resident.fail("the warm-up failed: %s: %s" % (type(failure).__name__, failure))
    resident.settle()


class Companion(Uncloned):
    """The same beside the agent of a virtual machine, which is process 1 already, waits for it and starts nothing else.

    It is told on the socket that the agent's requests come by, too.
    """

    PARKED = b"P"

    def __init__(self, link: int) -> None:
        import fcntl

        super().__init__()
        self.link = fcntl.fcntl(link, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
        os.close(link)

    def settle(self) -> NoReturn:
        """Say so, and serve."""
        os.dup2(self.link, FIRST_FD, False)
        close_fds_from(FIRST_FD + 1)
        _signal.signal(SIGCHLD, _signal.SIG_DFL)
        sock = _socket.socket(fileno=FIRST_FD)
        sock.send(self.PARKED)
        Runner(sock, self.view).serve()


def companion_main(link: int, imports: list[str], script: str) -> NoReturn:
    """Import, prepare, and wait for an agent's requests."""
    companion = Companion(link)
    try:
        warm_up(companion, imports, script)
    except BaseException as failure:
        companion.fail("the warm-up failed: %s: %s" % (type(failure).__name__, failure))
    companion.settle()


def run_script(zygote: Zygote, path: str) -> None:
    """Run a template's warm-up script: what it imports stays loaded, its own variables do not."""
    try:
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec")
        exec(code, {"__name__": "__main__", "__file__": path, "__builtins__": sys.modules["builtins"]})
    except BaseException as failure:
        at = getattr(failure, "__traceback__", None)
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        line = " at line %d" % at.tb_lineno if at is not None and at.tb_frame.f_code.co_filename == path else ""
        zygote.fail("the warm-up script failed%s: %s: %s" % (line, type(failure).__name__, failure))


def warm_up(zygote: Zygote, imports: list[str], script: str) -> None:
    """Everything before parking."""
    environ = dict(os.environ)
    for name in ONE_THREAD:
        os.environ[name] = "1"
    hooks = record_fork_hooks()
    for module in imports:
        try:
            __import__(module)
        except BaseException as failure:
            zygote.fail("the warm-up could not import %s: %s: %s" % (module, type(failure).__name__, failure))
    if script:
        run_script(zygote, script)
    prepare(environ, hooks())
    exercise(EXERCISES)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        zygote.fail(
            "the warm-up left %d threads running, which a clone can't carry over: drop the import that starts them, "
            "or make it start them later" % (threads - 1)
        )
    prepared.look_at_modules()
    prepare_threads()
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    signals_to_default()
    _signal.signal(SIGCHLD, _signal.SIG_IGN)  # the kernel reaps: no zombies, and no work here
    for number in (SIGINT, SIGPIPE, SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)  # as the agent must find them; programs get Python's own again
    zygote.split.prepare()
    rehearse()
    gc.collect()
    gc.disable()
    gc.freeze()


# ------------------------------------------------------------------------------------------- command lines


class Refused(Exception):
    """This command line is better served by a real, cold interpreter; the argument is an errno."""


# The options that can be granted after start-up, and the fields of sys.flags they set.
OPTIONS = {
    "u": ("unbuffered",), "B": ("dont_write_bytecode",), "E": ("ignore_environment",), "s": ("no_user_site",),
    "q": ("quiet",), "I": ("isolated", "ignore_environment", "no_user_site", "safe_path"), "P": ("safe_path",),
}  # fmt: skip
if VERSION < (3, 11):
    del OPTIONS["P"]


class Plan:
    """What a `python3 ...` command line asks for: how the program is found, its sys.argv, and flags."""

    __slots__ = ("args", "flags", "mode", "target")

    def __init__(self, argv: list[str]) -> None:
        self.mode = ""  # "command", "module", "script" or "stdin"
        self.target = ""
        self.flags = {}  # type: dict[str, int]
        index = 1
        while index < len(argv) and not self.mode:
            word = argv[index]
            if word == "-" or not word.startswith("-"):
                break
            index += 1
            if word == "--":
                break
            index = self._options(argv, word, index)
        if self.mode:
            self.args = ["-" + self.mode[0], *argv[index:]]
        elif index < len(argv):
            self.target = argv[index]
            self.mode = "stdin" if self.target == "-" else "script"
            self.args = argv[index:]
        else:
            self.mode, self.args = "stdin", [""]

    def _options(self, argv: list[str], word: str, index: int) -> int:
        """Read one word of options as CPython's getopt does; Refused for those that start-up has to see."""
        for at, letter in enumerate(word[1:], 2):
            if letter in "cm":
                self.mode = "command" if letter == "c" else "module"
                self.target = word[at:]
                if not self.target:
                    if index == len(argv):
                        raise Refused(errno.EINVAL)
                    self.target = argv[index]
                    index += 1
                break
            if letter not in OPTIONS:
                raise Refused(errno.EINVAL)
            for flag in OPTIONS[letter]:
                self.flags[flag] = 1
        return index


# Variables that are read at start-up. The first kind can be honoured after it, or only matters later; the
# second has an underscore in its name, as have many of other people's making that mean nothing to Python.
HONOURED = frozenset(
    ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONNOUSERSITE", "PYTHONUSERBASE", "PYTHONSTARTUP",
     "PYTHONBREAKPOINT", "PYTHONPATH")
)  # fmt: skip
START_UP_ONLY = frozenset(
    ("PYTHON_GIL", "PYTHON_CPU_COUNT", "PYTHON_FROZEN_MODULES", "PYTHON_JIT", "PYTHON_PRESITE", "PYTHON_TLBC",
     "PYTHON_PERF_JIT_SUPPORT", "PYTHON_CONTEXT_AWARE_WARNINGS", "PYTHON_THREAD_INHERIT_CONTEXT",
     "PYTHON_DISABLE_REMOTE_DEBUG")
)  # fmt: skip
# Variables that a preloaded module read when it was imported: with another value, it must be imported anew.
READ_AT_IMPORT = {"MPLBACKEND": "matplotlib", "MATPLOTLIBRC": "matplotlib", "MPLCONFIGDIR": "matplotlib"}


def check_environment(environ: dict[str, str], plan: Plan) -> None:
    """Take flags from variables; Refused when one asks for what only a start-up can give."""
    ours = prepared.environ
    flags = plan.flags
    for name, value in environ.items():
        if name.startswith("PYTHON"):
            if not value or ours.get(name) == value or "ignore_environment" in flags:
                continue
            if name in START_UP_ONLY or ("_" not in name and name not in HONOURED):
                raise Refused(errno.ENOTSUP)
        elif name in READ_AT_IMPORT and READ_AT_IMPORT[name] in sys.modules and ours.get(name) != value:
            raise Refused(errno.ENOTSUP)
    if "ignore_environment" not in flags:
        if environ.get("PYTHONUNBUFFERED"):
            flags["unbuffered"] = 1
        if environ.get("PYTHONDONTWRITEBYTECODE"):
            flags["dont_write_bytecode"] = 1
        if environ.get("PYTHONNOUSERSITE"):
            flags["no_user_site"] = 1


def find_executable(name: str, environ: dict[str, str]) -> str:
    """The path a shell would run for `name`; Refused unless it is, under any name, the interpreter that runs this."""
    ours = sys.executable
    candidate = name
    if "/" not in name:
        for directory in environ.get("PATH", os.defpath).split(":"):
            candidate = directory + "/" + name
            if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
                break
        else:
            raise Refused(errno.ENOENT)
    if candidate == ours:
        return candidate
    if not candidate.startswith("/"):
        raise Refused(errno.ENOENT)
    same = os.path.samefile
    try:
        if not (same(candidate, ours) and same(os.path.dirname(candidate), os.path.dirname(ours))):
            raise Refused(errno.ENOEXEC)
    except OSError as failure:
        raise Refused(failure.errno) from None
    return candidate


def choose_locale(environ: dict[str, str]) -> tuple[int, str]:
    """Choose the character set as start-up does: (utf8_mode, error handler of stdin and stdout).

    Refused unless it gives UTF-8 in the way that this interpreter's start-up did.
    """
    wanted = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG") or "C"
    mode, errors = 0, prepared.locale_errors
    if wanted in ("C", "POSIX"):
        mode = 1
    elif wanted != prepared.locale:
        try:
            setlocale(LC_CTYPE, wanted)
            errors = "surrogateescape" if wanted in COERCED else "strict"
        except Exception:
            mode = 1  # start-up then goes on in C
    if mode != prepared.utf8_mode or (mode == 0 and nl_langinfo(CODESET) != "UTF-8"):
        setlocale(LC_CTYPE, prepared.locale)
        raise Refused(errno.EILSEQ)
    if not mode:
        return 0, errors
    if environ.get("LC_ALL"):
        setlocale(LC_CTYPE, "C")
    else:
        environ["LC_CTYPE"] = "C.UTF-8"
        setlocale(LC_CTYPE, "C.UTF-8")
    return 1, "surrogateescape"


COERCED = ("C.UTF-8", "C.utf8", "UTF-8")


def check_shadows(directories: list[str]) -> None:
    """Refused when a directory that goes first on sys.path has a module of a name that is loaded already."""
    shadowable = prepared.shadowable
    for directory in directories:
        try:
            names = os.listdir(directory or ".")
        except OSError:
            continue
        for name in names:
            if name.partition(".")[0] in shadowable:
                raise Refused(errno.EEXIST)


def check_user_site(environ: dict[str, str], plan: Plan) -> None:
    """Refused when this user's own site-packages exist: start-up would have put them on sys.path."""
    if not prepared.user_site or "no_user_site" in plan.flags:
        return
    base = environ.get("PYTHONUSERBASE") or environ.get("HOME", "") + "/.local"
    if os.path.isdir(base + prepared.user_site):
        raise Refused(errno.EEXIST)


def load_script(path: str) -> CodeType:
    """Read and compile a script; Refused for whatever the real interpreter would treat specially or fail at."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as failure:
        raise Refused(failure.errno) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise Refused(errno.EISDIR)
        source = b""
        while True:
            data = os.read(fd, info.st_size + 1)
            if not data:
                break
            source += data
    except OSError as failure:
        raise Refused(failure.errno) from None
    finally:
        os.close(fd)
    if path.endswith(".pyc") or b"PK\5\6" in source[-65557:]:
        raise Refused(errno.ENOEXEC)
    return compile_or_refuse(source, path)


def compile_or_refuse(source: Any, name: str) -> CodeType:
    """Compile; errors are left to the real interpreter, which words and shows them best."""
    try:
        return compile(source, name, "exec", 0, True)
    except BaseException:
        raise Refused(errno.EINVAL) from None


# ------------------------------------------------------------------------------- a fresh-looking interpreter


class Prepared:
    """What is worked out once, before parking, for every command line to come."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        if sys.flags.utf8_mode:
            self.environ.pop("LC_CTYPE", None)  # start-up put it there
        self.path = list(sys.path[0 if getattr(sys.flags, "safe_path", False) else 1 :])
        self.locale = setlocale(LC_CTYPE, None)
        self.utf8_mode = sys.flags.utf8_mode
        self.locale_errors = "surrogateescape" if self.locale in COERCED else "strict"
        names = [name for name, kind in vars(type(sys.flags)).items() if type(kind).__name__ == "member_descriptor"]
        self.flag_index = {name: index for index, name in enumerate(names)}
        self.user_site = self._user_site()
        self.frames = Frames()
        self.fork_hooks = []  # type: list[Callable[[], object]]
        self.random = None  # type: Any
        self.numpy_state = 0
        self.blas = []  # type: list[ctypes.c_int]
        self.thread_setters = []  # type: list[Any]
        self.threads = self.most_threads = 0
        self.modules = frozenset()  # type: frozenset[str]
        self.shadowable = frozenset()  # type: frozenset[str]

    @staticmethod
    def _user_site() -> str:
        """Where a user's own packages are, below their base directory; empty when start-up does not look there."""
        import site

        return "/lib/python%d.%d/site-packages" % VERSION if site.ENABLE_USER_SITE is not False else ""

    def look_at_modules(self) -> None:
        """Note what the warm-up loaded."""
        import _imp

        always = STARTUP_MODULES | frozenset(sys.builtin_module_names)
        loaded = frozenset(name.partition(".")[0] for name in sys.modules)
        self.shadowable = frozenset(name for name in loaded - always if not _imp.is_frozen(name))
        self.modules = frozenset(sys.modules)
        # Kept, since to let go of them at the end would be to write to all their parts.
        self.kept = [sys.meta_path, sys.path_hooks, sys.path_importer_cache]  # type: list[object]


prepared = None  # type: Any


def prepare(environ: dict[str, str], fork_hooks: list[Callable[[], object]]) -> None:
    """Make everything that a run needs; called once, before parking."""
    global prepared
    prepared = Prepared(environ)
    sys.path[:] = prepared.path
    prepared.fork_hooks = fork_hooks
    prepare_random()


# At a fork, these modules renew locks that can't be held here, or random numbers, which `renew_secrets` does.
NEEDLESS_HOOKS = frozenset(("random", "logging", "threading", "concurrent.futures.thread", "asyncio.events", "weakref"))


def record_fork_hooks() -> Callable[[], list[Callable[[], object]]]:
    """Note what warm-up modules want done in a forked child; the split, which is no fork(2), does it for them."""
    wanted = []  # type: list[Callable[[], object]]
    original = os.register_at_fork

    def register_at_fork(**hooks: Any) -> None:
        original(**hooks)
        hook = hooks.get("after_in_child")
        if hook is not None and getattr(hook, "__module__", None) not in NEEDLESS_HOOKS:
            wanted.append(hook)

    os.register_at_fork = register_at_fork

    def stop() -> list[Callable[[], object]]:
        os.register_at_fork = original
        return wanted

    return stop


def prepare_random() -> None:
    """Find the generators that were seeded at import."""
    random = sys.modules.get("random")
    if random is not None:
        prepared.random = random._inst
    mtrand = sys.modules.get("numpy.random.mtrand")
    if mtrand is not None:
        try:
            generator = mtrand._rand._bit_generator
            address = generator.ctypes.state_address
            if generator.state["state"]["pos"] == ctypes.c_int.from_address(address + 4 * 624).value:
                prepared.numpy_state = address
        except Exception:
            pass  # another layout: seeded the slow way


def renew_secrets() -> None:
    """Give this process random numbers of its own: nothing that was drawn before parking may repeat here."""
    modules = sys.modules  # type: Any
    if prepared.random is not None:
        prepared.random.seed()
    if prepared.numpy_state:
        # The Mersenne Twister's 624 words, and a position that says all of them have been used up.
        _memmove(prepared.numpy_state, os.urandom(4 * 624) + b"\x70\2\0\0", 4 * 625)
    elif "numpy.random.mtrand" in modules:
        modules["numpy.random.mtrand"].seed()
    process = modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)
        process.ORIGINAL_DIR = os.getcwd()
    tempfile = modules.get("tempfile")
    if tempfile is not None:
        tempfile._name_sequence = tempfile.tempdir = None
    if "_ssl" in modules:
        modules["_ssl"].RAND_add(os.urandom(48), 48.0)


def prepare_threads() -> None:
    """Give numeric libraries this machine's CPU count back, without starting their threads.

    OpenBLAS starts them at once, but stops them before a fork(2) and starts them again when they are first
    needed: the split's own trial fork is such a fork. OpenMP's only start when needed.
    """
    count = len(os.sched_getaffinity(0))
    with open("/proc/self/maps") as maps:
        paths = {line.split(None, 5)[-1].strip() for line in maps if "/" in line}
    for path in paths:
        name = os.path.basename(path)
        if not any(part in name for part in ("openblas", "libgomp", "libomp", "libmkl_rt", "libiomp")):
            continue
        library = ctypes.PyDLL(path)
        for symbol in ("omp_set_num_threads", "MKL_Set_Num_Threads"):
            if hasattr(library, symbol):
                prepared.thread_setters.append(getattr(library, symbol))
        for symbol in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads",
                       "openblas_set_num_threads64_", "openblas_set_num_threads"):  # fmt: skip
            setter = getattr(library, symbol, None)
            if setter is None:
                continue
            setter(count)
            if hasattr(library, "blas_cpu_number") and hasattr(library, "blas_num_threads"):
                for variable in ("blas_cpu_number", "blas_num_threads"):
                    prepared.blas.append(ctypes.c_int.in_dll(library, variable))
            else:
                prepared.thread_setters.append(setter)
            break
    for setter in prepared.thread_setters:
        setter(count)
    prepared.threads = prepared.most_threads = count


def restore_threads(environ: dict[str, str]) -> None:
    """Let numeric libraries use as many threads as the environment says, or as there are CPUs for this process."""
    if not prepared.blas and not prepared.thread_setters:
        return
    wanted = environ.get("OPENBLAS_NUM_THREADS") or environ.get("OMP_NUM_THREADS") or ""
    count = int(wanted) if wanted.isdigit() and wanted != "0" else len(os.sched_getaffinity(0))
    if count != prepared.threads:
        prepared.threads = count
        for number in prepared.blas:
            number.value = min(count, prepared.most_threads)
        for setter in prepared.thread_setters:
            setter(count)


def set_flags(flags: dict[str, int]) -> None:
    """Make sys.flags, which Python code can't write, say what the command line asked for."""
    for name, value in flags.items():
        index = prepared.flag_index.get(name)
        if index is not None and getattr(sys.flags, name) != value:
            boxed = ctypes.py_object(bool(value) if name == "safe_path" else value)
            ctypes.pythonapi.Py_IncRef(boxed)
            ctypes.pythonapi.PyStructSequence_SetItem(ctypes.py_object(sys.flags), ctypes.c_ssize_t(index), boxed)
    if "dont_write_bytecode" in flags:
        sys.dont_write_bytecode = True


def set_environment(environ: dict[str, str]) -> None:
    """Replace the environment, both Python's and the C library's."""
    _clearenv()
    encode, put = os.fsencode, posix.putenv
    data = {}
    for name, value in environ.items():
        key, content = encode(name), encode(value)
        put(key, content)
        data[key] = content
    ours = os.environ._data  # type: ignore[attr-defined]
    ours.clear()
    ours.update(data)
    posix.environ.clear()
    posix.environ.update(data)
    if environ.get("TZ") != prepared.environ.get("TZ") and "time" in sys.modules:
        sys.modules["time"].tzset()


def open_stream(fd: int, name: str, errors: str, unbuffered: bool) -> Any:
    """One of sys.stdin, stdout and stderr, made as start-up makes them."""
    write = fd != 0
    bare = unbuffered and write
    buffer = open_file(fd, "wb" if write else "rb", 0 if bare else -1, None, None, None, False)  # type: Any
    raw = buffer if bare else buffer.raw
    raw.name = name
    line_buffering = not unbuffered and ((fd == 2 and VERSION >= (3, 9)) or raw.isatty())
    text = TextIOWrapper(buffer, "utf-8", errors, "\n", line_buffering, unbuffered)  # type: Any
    text.mode = "w" if write else "r"
    return text


def open_streams(errors: str, unbuffered: bool) -> None:
    """Make fresh standard streams over descriptors 0, 1 and 2."""
    sys.stdin = sys.__stdin__ = open_stream(0, "<stdin>", errors, unbuffered)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = open_stream(1, "<stdout>", errors, unbuffered)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open_stream(2, "<stderr>", "backslashreplace", unbuffered)  # type: ignore[misc]


def new_main(file: str, stdin: bool) -> dict[str, Any]:
    """A fresh __main__ with what start-up puts in it; returns its namespace."""
    module = type(sys)("__main__")
    names = module.__dict__
    names["__loader__"] = SourceFileLoader("__main__", file) if file else BuiltinImporter
    if VERSION < (3, 14):
        names["__annotations__"] = {}
    names["__builtins__"] = sys.modules["builtins"]
    if file or stdin:
        names["__file__"] = file or "<stdin>"
        if VERSION < (3, 15):
            names["__cached__"] = None
    sys.modules["__main__"] = module
    return names


class Frames:
    """Hides our frames from the program, which start-up would have called with none below.

    The interpreter keeps the current frame in its thread state; with that pointer cleared just before the
    program is called, walks up the stack end where they would in a cold start. The same for the recursion depth.
    Where they are is measured, and whatever does not look as expected is left alone: then, only f_back shows.
    """

    def __init__(self) -> None:
        self.indirect = -1
        self.current = 0  # address of the pointer to the current frame; by way of `indirect` in 3.11 and 3.12
        self.depth = 0  # address of the recursion counter
        self.counts_down = VERSION >= (3, 11)
        other_build = hasattr(sys, "gettotalrefcount") or "t" in sys.abiflags or sys.implementation.name != "cpython"
        if other_build or VERSION > (3, 14):
            return
        get = ctypes.pythonapi.PyThreadState_Get
        get.restype = ctypes.c_void_p
        self.tstate = get()
        self._measure()

    def _measure(self) -> None:
        words = (ctypes.c_size_t * 32).from_address(self.tstate)
        if VERSION < (3, 11):
            if words[3] == id(sys._getframe()):
                self.current = self.tstate + 24
                depth = ctypes.c_int.from_address(self.tstate + 32).value
                self.depth = self.tstate + 32 if 0 < depth < 50 else 0
            return
        if VERSION < (3, 13):
            self.indirect = 8 if VERSION == (3, 11) else 0
        else:
            frame = ctypes.c_size_t.from_address(id(sys._getframe()) + 24).value
            places = [index for index, word in enumerate(words) if word == frame]
            self.current = self.tstate + 8 * places[0] if len(places) == 1 else 0
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(51_239)
        numbers = list((ctypes.c_int * 64).from_address(self.tstate))
        sys.setrecursionlimit(limit)
        places = [index for index, number in enumerate(numbers) if number == 51_239]
        if len(places) == 1 and 51_000 < numbers[places[0] - 1] < 51_239:
            self.depth = self.tstate + 4 * (places[0] - 1)

    def slot(self) -> Any:
        """The pointer to clear, valid in the caller's frame only; something harmless where it was not found."""
        address = self.current
        if self.indirect >= 0:
            address = ctypes.c_size_t.from_address(self.tstate + 56).value + self.indirect
        if address:
            slot = ctypes.c_size_t.from_address(address)
            if VERSION < (3, 11):
                expected = id(sys._getframe())
            else:
                expected = ctypes.c_size_t.from_address(id(sys._getframe()) + 24).value
            if slot.value == expected:
                return slot
        return ctypes.c_size_t()

    def depth_counter(self) -> Any:
        """The recursion counter, and what it holds when nothing is running."""
        start = sys.getrecursionlimit() + (VERSION == (3, 11)) if self.counts_down else -1
        return (ctypes.c_int.from_address(self.depth) if self.depth else ctypes.c_int()), start


# ------------------------------------------------------------------------------------------------- running


class Run:
    """One command line, checked and compiled: whatever can be refused is refused in here."""

    def __init__(self, argv: list[str], environ: dict[str, str], cwd: str, stdin: int) -> None:
        self.argv = argv
        self.environ = environ
        self.plan = plan = Plan(argv)
        check_environment(environ, plan)
        try:
            os.chdir(cwd)
        except OSError as failure:
            raise Refused(failure.errno) from None
        self.executable = find_executable(argv[0], environ)
        self.utf8_mode, self.errors = choose_locale(environ)
        check_user_site(environ, plan)
        self.path = self._path()
        self.code = None  # type: CodeType | None
        self.file = ""
        if plan.mode == "command":
            source = plan.target + "\n"
            if VERSION >= (3, 14):
                source = dedent(source)
            self.code = compile_or_refuse(source, "<string>")
            if linecache is not None:
                named = self.code if hasattr(linecache, "_interactive_cache") else "<string>"
                linecache._register_code(named, source, "<string>")
        elif plan.mode == "script":
            self.file = os.path.join(os.getcwd(), plan.target) if VERSION >= (3, 9) else plan.target
            self.code = load_script(self.file)
        elif plan.mode == "stdin" and os.isatty(stdin):
            raise Refused(errno.ENOTTY)

    def _path(self) -> list[str]:
        """sys.path as this command line gets it."""
        plan = self.plan
        first = []  # type: list[str]
        if "isolated" not in plan.flags and "safe_path" not in plan.flags:
            if plan.mode == "module":
                first = [os.getcwd()]
            elif plan.mode == "script":
                first = [os.path.dirname(os.path.realpath(plan.target))]
            else:
                first = [""]
        extra = "" if "ignore_environment" in plan.flags else self.environ.get("PYTHONPATH", "")
        if not extra:
            check_shadows(first)
            return [*first, *prepared.path]
        path = []  # type: list[str]
        for entry in [os.path.abspath(entry) for entry in extra.split(":")] + prepared.path:
            if entry not in path:
                path.append(entry)
        check_shadows(first + path[: len(path) - len(prepared.path)])
        return first + path

    def enter(self) -> dict[str, Any]:
        """Make the interpreter look freshly started for this command line; returns __main__'s namespace."""
        plan = self.plan
        set_environment(self.environ)
        flags = plan.flags
        flags["utf8_mode"] = self.utf8_mode
        set_flags(flags)
        sys.argv = plan.args
        if VERSION >= (3, 10):
            sys.orig_argv = self.argv
        if sys.executable != self.executable:
            if sys.executable == sys._base_executable:  # type: ignore[attr-defined]
                sys._base_executable = self.executable  # type: ignore[attr-defined]
            sys.executable = self.executable
        sys.path[:] = self.path
        names = new_main(self.file, plan.mode == "stdin")
        renew_secrets()
        restore_threads(self.environ)
        open_streams(self.errors, "unbuffered" in flags)
        set_native_id()
        return names


def set_native_id() -> None:
    """Tell threading this process's id."""
    threading = sys.modules.get("threading")
    if threading is not None:
        threading.main_thread()._set_native_id()


def dedent(source: str) -> str:
    """Remove the indentation that all lines of a -c program share, as Python 3.14 does."""
    lines = source.split("\n")
    margins = [line[: len(line) - len(line.lstrip(" \t"))] for line in lines if line.strip(" \t\f")]
    low, high = (min(margins), max(margins)) if margins else ("", "")
    size = next((at for at, letter in enumerate(low) if high[at : at + 1] != letter), len(low))
    return "\n".join(line[size:] if line.strip(" \t\f") else "" for line in lines)


def read_all(fd: int) -> bytes:
    """Everything up to end of file."""
    parts = []  # type: list[bytes]
    while True:
        data = os.read(fd, 65536)
        if not data:
            return b"".join(parts)
        parts.append(data)


def compile_stdin(run: Run) -> CodeType:
    """Read and compile a program from standard input; one with errors is given to a real interpreter whole."""
    source = read_all(0)
    try:
        return compile(source, "<stdin>", "exec", 0, True)
    except BaseException:
        memory = os.memfd_create("stdin")
        os.write(memory, source)
        os.lseek(memory, 0, os.SEEK_SET)
        os.dup2(memory, 0)
        _signal.signal(SIGPIPE, _signal.SIG_DFL)
        _signal.signal(SIGXFSZ, _signal.SIG_DFL)
        os.execv(run.executable, run.argv)


def execute(run: Run) -> NoReturn:
    """Run the program to its end and exit, as CPython's own main function does. Descriptors 0 to 2 are its own."""
    _syscall(SYS_PRCTL, PR_SET_DUMPABLE, 1, 0, 0, 0, 0)  # as execve would: confinement may have cleared it
    names = run.enter()
    gc.enable()
    status = 0
    mode = run.plan.mode
    code = run.code  # type: Any
    module = None  # type: Any
    if mode == "stdin":
        code = compile_stdin(run)
    elif mode == "module":
        import runpy

        module = map(runpy._run_module_as_main, (run.plan.target,))  # type: ignore[attr-defined]
    frames = prepared.frames
    counter, start = frames.depth_counter()
    del run
    # Whatever is called from here on is called from C, by way of map and iter, with the pointer to this frame
    # cleared: else Python functions would see it below their own.
    slot = frames.slot()
    slot.value = 0
    counter.value = start
    try:
        if module is not None:
            next(module)
        else:
            exec(code, names)
    except BaseException as failure:
        slot.value = 0
        trace = failure.__traceback__
        failure.__traceback__ = trace.tb_next if trace is not None else None
        del trace
        status = next(map(handle_exception, (failure,), (mode,)))
    if mode == "script" or mode == "stdin":
        flush_quietly()
        names.pop("__file__", None)
        names.pop("__cached__", None)
    del code, names, module
    for step in stop_threads, atexit._run_exitfuncs:
        try:
            slot.value = 0
            next(iter(step, 1))
        except BaseException:
            pass  # it has been shown
    finish(status)


def flush_quietly() -> None:
    """Flush both streams, as after the last statement: errors are for the flush at the end to show."""
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except BaseException:
            pass


def handle_exception(failure: BaseException, mode: str) -> int:
    """Show the exception that ended the program, and return the exit status, negative for a signal."""
    if mode == "script" or mode == "stdin":
        flush_quietly()
    if isinstance(failure, SystemExit):
        return exit_status(failure)
    kind, trace = type(failure), failure.__traceback__
    sys.last_type, sys.last_value, sys.last_traceback = kind, failure, trace
    if VERSION >= (3, 12):
        sys.last_exc = failure  # type: ignore[attr-defined]
    status = -SIGINT if kind is KeyboardInterrupt else 1
    hook = getattr(sys, "excepthook", None)
    if hook is None:
        sys.stderr.write("sys.excepthook is missing\n")
        hook = sys.__excepthook__
    try:
        next(map(hook, (kind,), (failure,), (trace,)))
    except SystemExit as another:
        return exit_status(another)
    except BaseException as another:
        ours = another.__traceback__
        another.__traceback__ = ours.tb_next if ours is not None else None
        another.__context__ = None if another.__context__ is failure else another.__context__
        sys.stderr.write("Error in sys.excepthook:\n")
        sys.__excepthook__(type(another), another, another.__traceback__)
        sys.stderr.write("\nOriginal exception was:\n")
        sys.__excepthook__(kind, failure, trace)
    return status


def exit_status(failure: SystemExit) -> int:
    """What SystemExit asks for: a status, or a last word on stderr."""
    code = failure.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(2**63) <= code < 2**63 else 255
    if sys.stderr is None:
        os.write(2, os.fsencode("%s\n" % (code,)))
        return 1
    for text in (code, "\n"):
        try:
            sys.stderr.write(str(text))
        except BaseException:
            pass
    return 1


def stop_threads() -> None:
    """Wait for the program's threads, except daemons."""
    threading = sys.modules.get("threading")
    if threading is not None:
        try:
            threading._shutdown()
        except BaseException as failure:
            unraisable(failure, threading)


def finish(status: int) -> NoReturn:
    """End as the interpreter's finalisation would, but without tearing down what was loaded before parking."""
    broken = not flush_streams(True)
    try:
        tear_down()
        flush_files()
    except BaseException:
        pass  # the program's own doing, such as a module that can't be emptied
    _fflush(None)
    if status < 0:
        _signal.signal(-status, _signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(120 if broken else status)


def flush_streams(speak: bool) -> bool:
    """Flush sys.stdout and sys.stderr; False when one of them could not be."""
    fine = True
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as failure:
            fine = False
            if speak and name == "stdout":
                failure.__traceback__ = None  # the interpreter flushes without a frame
                if VERSION < (3, 13):
                    unraisable(failure, stream)
                else:
                    how = "on" if VERSION == (3, 13) else "while"
                    unraisable(failure, None, "Exception ignored %s flushing sys.stdout" % how)
    return fine


def unraisable(failure: BaseException, where: object, message: str | None = None) -> None:
    """Report an exception that nobody can catch, as the interpreter does."""
    caught = []  # type: list[Any]

    class Probe:
        def __del__(self) -> None:
            raise ValueError

    hook, sys.unraisablehook = sys.unraisablehook, caught.append
    Probe()
    sys.unraisablehook = hook
    hook(type(caught[0])((type(failure), failure, failure.__traceback__, message, where)))


def tear_down() -> None:
    """Let go of what the program made, so that its destructors run and its files are written.

    The order is finalisation's: forget the modules; collect; then empty those that something still holds.
    """
    import _weakref

    for name in ("path", "argv", "ps1", "ps2", "last_exc", "last_type", "last_value", "last_traceback", "path_hooks",
                 "path_importer_cache", "meta_path", "__interactivehook__"):  # fmt: skip
        if hasattr(sys, name):
            setattr(sys, name, None)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    known = prepared.modules
    modules = sys.modules
    # From the end, as they were imported: to look at all modules would be to write to (a count in) all of them.
    names = ["__main__"]
    for name in reversed(modules):
        if name in known:
            break
        names.append(name)
    weak = []
    module = None  # type: Any
    for name in names:
        module = modules.pop(name, None)
        if isinstance(module, type(sys)):
            weak.append(_weakref.ref(module))
    module = None
    if len(sys._current_frames()) > 1:
        return  # daemon threads still use all this
    gc.collect()
    for reference in weak:
        module = reference()
        if module is not None:
            empty(module.__dict__)
        module = None
    gc.collect()


def empty(names: dict[str, Any]) -> None:
    """Take the values out of a module, private names first."""
    for private in (True, False):
        for name in list(names):
            if (name[:1] == "_" and name[1:2] != "_") == private and name != "__builtins__":
                names[name] = None


def flush_files() -> None:
    """Write what is still buffered in files that outlived the program: finalisation would have closed them."""
    for found in gc.get_objects():
        if type(found) in BUFFERING:
            try:
                found.flush()
            except BaseException:
                pass  # as a file's destructor does


# ------------------------------------------------------------------------------------------------ contexts

ALLOW_AWAIT, ONLY_AST, CO_COROUTINE = 0x2000, 0x400, 0x80
MAX_FORM = 16 * 1024 * 1024
FORMS = (
    ("text/html", "_repr_html_"), ("text/markdown", "_repr_markdown_"), ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"), ("image/jpeg", "_repr_jpeg_"), ("application/pdf", "_repr_pdf_"),
    ("text/latex", "_repr_latex_"), ("application/json", "_repr_json_"),
    ("application/javascript", "_repr_javascript_"),
)  # fmt: skip
HERE = __file__


class Context:
    """Runs cells one after the other in one namespace.

    Descriptors 1 and 2 are pipes while user code runs, so that what C libraries and child processes print is
    caught too. A second process, the pump, turns them into events: it can't be held up by code that never
    lets go of the interpreter, and it is the only writer of the host's pipe, so events keep their order.
    """

    def __init__(self, names: dict[str, Any], commands: int, link: int) -> None:
        import __future__

        import json
        import linecache

        self.futures = 0  # the flags that `from __future__ import` leaves in code
        for name in __future__.all_feature_names:
            self.futures |= getattr(__future__, name).compiler_flag
        self.names = names
        self.commands = open(commands, "rb")  # noqa: SIM115
        self.link = link
        self.count = 0
        self.id = None  # type: Any
        self.flags = 0
        self.loop = None  # type: Any
        self.loads, self.dumps = json.loads, json.dumps
        self.sources = linecache.cache
        names["display"] = self.display
        watch_pyplot(self.show_figures)

    def serve(self) -> None:
        """Run cells until there are no more."""
        for line in self.commands:
            try:
                request = self.loads(line)
                code, self.id, limit = request["code"], request.get("id"), request.get("timeout_s")
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            self.count += 1
            # To the pump: whose output this is from now on, and when to interrupt.
            self.tell(b"I%s\nT%s\n" % (self.dumps(self.id).encode(), b"%f" % limit if limit else b""))
            self.run(code, limit)
            self.tell(b"T\n")
            self.send({"type": "done", "execution_count": self.count})

    def run(self, code: str, limit: float | None) -> None:
        """Run one cell, and show how it ended."""
        import time

        began = time.monotonic()
        try:
            _signal.signal(SIGINT, _signal.default_int_handler)
            try:
                self.execute(code)
                self.show_figures()
            finally:
                _signal.signal(SIGINT, _signal.SIG_IGN)
        except BaseException as failure:
            late = limit and isinstance(failure, KeyboardInterrupt) and time.monotonic() - began >= limit
            self.show_error(failure, "the cell ran longer than %g s" % limit if limit and late else "")

    def execute(self, code: str) -> None:
        """Compile and run; the last expression's value is a result."""
        import _ast

        name = "<cell %d>" % self.count
        self.sources[name] = (len(code), None, [line + "\n" for line in code.split("\n")], name)
        tree = compile(code, name, "exec", self.flags | ALLOW_AWAIT | ONLY_AST, True)  # type: Any
        last = None
        if tree.body and isinstance(tree.body[-1], _ast.Expr) and not code.rstrip().endswith(";"):
            last = _ast.Expression(body=tree.body.pop().value)
        body = compile(tree, name, "exec", self.flags | ALLOW_AWAIT, True)
        self.flags |= body.co_flags & self.futures
        self.evaluate(body)
        if last is not None:
            value = self.evaluate(compile(last, name, "eval", self.flags | ALLOW_AWAIT, True))
            if value is not None:
                self.names["___"], self.names["__"] = self.names.get("__"), self.names.get("_")
                self.names["_"] = value
                self.show(value, True)

    def evaluate(self, code: CodeType) -> Any:
        """Run compiled code; in an event loop when it awaits."""
        value = eval(code, self.names)
        if not code.co_flags & CO_COROUTINE:
            return value
        import asyncio

        if self.loop is None or self.loop.is_closed():
            self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        task = self.loop.create_task(value)
        try:
            return self.loop.run_until_complete(task)
        except BaseException:
            if not task.done():
                task.cancel()
                try:
                    self.loop.run_until_complete(task)
                except BaseException:
                    pass  # the first exception is the one to show
            raise

    def display(self, *values: Any) -> None:
        """Show values in the middle of a cell."""
        for value in values:
            self.show(value, False)

    def show(self, value: Any, is_main: bool) -> None:
        """Send a value in every form that it knows."""
        forms = rich_forms(value)
        self.send({"type": "result", "data": forms, "is_main": is_main})

    def show_figures(self) -> None:
        """Send the open matplotlib figures as images, and close them."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is None or not hasattr(pyplot, "get_fignums"):
            return
        import io

        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            image = io.BytesIO()
            figure.savefig(image, format="png", bbox_inches="tight")
            data = {"image/png": base64(image.getvalue()), "text/plain": repr(figure)}
            pyplot.close(figure)
            self.send({"type": "result", "data": data, "is_main": False})

    def show_error(self, failure: BaseException, late: str) -> None:
        """Send an exception, its traceback without our frames."""
        import traceback

        trace = failure.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == HERE:
            trace = trace.tb_next
        try:
            text = "".join(traceback.format_exception(type(failure), failure, trace))
        except BaseException:
            text = type(failure).__name__
        try:
            value = str(failure)
        except BaseException:
            value = "<unprintable>"
        name = "CellTimeout" if late else type(failure).__name__
        self.send({"type": "error", "name": name, "value": late or value, "traceback": text})

    def send(self, event: dict[str, Any]) -> None:
        """Send an event, after everything printed so far."""
        flush_streams(False)
        _fflush(None)
        event["id"] = self.id
        try:
            line = self.dumps(event, default=repr, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            # A form that JSON can't hold: keep the ones that are text.
            event["data"] = {mime: form for mime, form in event["data"].items() if isinstance(form, str)}
            line = self.dumps(event, ensure_ascii=False)
        self.tell(line.encode("utf-8", "replace") + b"\n")
        if event["type"] == "result":
            os.read(self.link, 1)  # passed on: what is printed next comes after it

    def tell(self, line: bytes) -> None:
        """Write a whole line to the pump."""
        while line:
            line = line[os.write(self.link, line) :]


def rich_forms(value: Any) -> dict[str, Any]:
    """A value's forms by MIME type; a form whose making fails is left out, except the plain one."""
    forms = {"text/plain": repr(value)}  # type: dict[str, Any]
    if isinstance(value, type):
        return forms
    bundle = call_form(value, "_repr_mimebundle_")
    if isinstance(bundle, dict):
        forms.update(bundle)
    for mime, method in FORMS:
        if mime not in forms:
            form = call_form(value, method)
            if form is not None:
                forms[mime] = form
    return {
        str(mime): base64(form) if isinstance(form, bytes) else form
        for mime, form in forms.items()
        if not isinstance(form, (str, bytes)) or len(form) <= MAX_FORM
    }


def call_form(value: Any, method: str) -> Any:
    """What a `_repr_..._` method makes, or None."""
    try:
        made = getattr(value, method, None)
        form = made() if callable(made) else None
    except Exception:
        return None
    return form[0] if isinstance(form, tuple) and form else form


def base64(data: bytes) -> str:
    """Base 64, in one line."""
    import binascii

    return binascii.b2a_base64(data, newline=False).decode()


class PyplotWatch:
    """A finder that replaces pyplot's show as soon as pyplot is imported: ours sends images."""

    def __init__(self, show: Callable[..., None]) -> None:
        self.show = show

    def find_spec(self, name: str, *_: Any) -> Any:
        """Find pyplot as others would, and add to its loading; nothing else is for us."""
        if name != "matplotlib.pyplot":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_replace(module: Any) -> None:
                load(module)
                module.show = self.show

            spec.loader.exec_module = load_and_replace  # type: ignore[method-assign]
        return spec


def watch_pyplot(show: Callable[..., None]) -> None:
    """Have figures shown by `show`, however and whenever pyplot is imported."""

    def plain_show(*_: Any, **__: Any) -> None:
        show()

    pyplot = sys.modules.get("matplotlib.pyplot")  # type: Any
    if pyplot is not None:
        pyplot.show = plain_show
    else:
        sys.meta_path.insert(0, PyplotWatch(plain_show))


PARENT_LOOK_MS = 50  # how often the context is looked at where the kernel has no pidfd_open


class Pump:
    """Turns what is printed, and the events that the context sends, into lines for the host."""

    def __init__(self, out: int, err: int, link: int, events: int, context: int) -> None:
        import codecs
        from _json import encode_basestring_ascii

        decoder = codecs.getincrementaldecoder("utf-8")
        self.outputs = {out: (b"stdout", decoder("replace")), err: (b"stderr", decoder("replace"))}
        self.quote = encode_basestring_ascii
        self.link = link
        self.events = events
        self.context = context
        self.pending = []  # type: list[bytes]
        self.id = b"null"
        self.deadline = 0.0

    def run(self) -> NoReturn:
        """Until the context is gone."""
        import time

        poll = select.poll()
        alive = _syscall(SYS_PIDFD_OPEN, self.context, 0, 0, 0, 0, 0)
        for fd in (*self.outputs, self.link, *([alive] if alive >= 0 else [])):
            poll.register(fd, select.POLLIN)
        while True:
            wait = max(0, int((self.deadline - time.monotonic()) * 1000) + 1) if self.deadline else -1
            if alive < 0:
                wait = min(wait, PARENT_LOOK_MS) if wait >= 0 else PARENT_LOOK_MS
            ready = {fd for fd, _ in poll.poll(wait)}
            if self.deadline and time.monotonic() >= self.deadline:
                self.deadline = 0.0
                os.kill(self.context, SIGINT)
            if self.link in ready and not self.take_events():
                poll.unregister(self.link)
            for fd in self.outputs:
                if fd in ready:
                    self.forward(fd)
            if alive in ready or (alive < 0 and os.getppid() != self.context):
                for fd in self.outputs:
                    self.forward(fd)
                os._exit(0)

    def forward(self, fd: int) -> None:
        """Pass on what was printed to one pipe so far."""
        count = ctypes.c_int()
        _syscall(SYS_IOCTL, fd, 0x541B, ctypes.addressof(count), 0, 0, 0)
        if count.value:
            kind, decoder = self.outputs[fd]
            text = decoder.decode(os.read(fd, count.value))
            if text:
                self.write(b'{"id":%s,"type":"%s","text":%s}\n' % (self.id, kind, self.quote(text).encode()))

    def take_events(self) -> bool:
        """Pass on what the context sent, after all that it printed before; False at its end."""
        import time

        data = os.read(self.link, 1 << 20)
        self.pending.append(data)
        if b"\n" not in data:
            return bool(data)
        lines = b"".join(self.pending).split(b"\n")
        self.pending = [lines.pop()]
        for line in lines:
            if line[:1] == b"{":
                for fd in self.outputs:
                    self.forward(fd)
                self.write(line + b"\n")
                if line.startswith(b'{"type": "result"'):
                    os.write(self.link, b"\n")
            elif line[:1] == b"I":
                self.id = line[1:]
            else:
                self.deadline = time.monotonic() + float(line[1:]) if len(line) > 1 else 0.0
        return bool(data)

    def write(self, data: bytes) -> None:
        """Write all of it to the host."""
        while data:
            data = data[os.write(self.events, data) :]


def context_main(names: dict[str, Any]) -> NoReturn:
    """Serve cells: commands on descriptor 0, events on descriptor 1."""
    import fcntl

    # Out of the way of user code, which knows descriptors 0 to 2 and may close any others it sees.
    commands, events, trouble = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in (0, 1, 2))
    (out, out_sink), (err, err_sink) = os.pipe(), os.pipe()
    ours, theirs = _socket.socketpair()
    context = os.getpid()
    if os.fork() == 0:
        try:
            _signal.signal(SIGINT, _signal.SIG_IGN)
            os.dup2(trouble, 2)
            for fd in (commands, out_sink, err_sink, ours.fileno()):
                os.close(fd)
            os.dup2(os.open("/dev/null", os.O_RDWR), 0)
            os.dup2(0, 1)
            Pump(out, err, theirs.fileno(), events, context).run()
        finally:
            os._exit(1)
    os.dup2(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), 0)
    os.dup2(out_sink, 1)
    os.dup2(err_sink, 2)
    link = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, 200)
    for fd in (out, err, out_sink, err_sink, events, trouble):
        os.close(fd)
    ours.close()
    theirs.close()
    open_streams("surrogateescape", False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _signal.signal(SIGINT, _signal.SIG_IGN)
    os.environ.setdefault("MPLBACKEND", "agg")
    Context(names, commands, link).serve()
    stop_threads()
    atexit._run_exitfuncs()
    finish(0)


class ContextRun:
    """A context asked for in the place of a command line."""

    def __init__(self, environ: dict[str, str], cwd: str) -> None:
        self.environ = environ
        try:
            os.chdir(cwd)
        except OSError as failure:
            raise Refused(failure.errno) from None

    def enter(self) -> dict[str, Any]:
        """Make the interpreter look freshly started; returns __main__'s namespace."""
        set_environment(self.environ)
        sys.argv = [""]
        if VERSION >= (3, 10):
            sys.orig_argv = [sys.executable]
        sys.path[:] = ["", *prepared.path]
        names = new_main("", False)
        renew_secrets()
        restore_threads(self.environ)
        set_native_id()
        return names


# -------------------------------------------------------------------------------------------------- runner

EXEC_TTY, EXEC_STDIN, EXEC_WARM, EXEC_ONCE = 1, 2, 4, 8
EXEC_HEAD = struct.Struct("<IHHI")
LENGTH = struct.Struct("<I")
ANSWER = struct.Struct("<IiI")
STARTED, EXITED, REFUSED = 1, 2, 3
CHILD_LOOK_MS = 5  # how often children are looked at where the kernel has no pidfd_open
CONTEXT_ARGV0 = "tartarus-context"


def take_texts(payload: bytes, at: int, count: int) -> tuple[list[str], int]:
    """`count` strings, each with its length before it, and where they end."""
    texts = []
    for _ in range(count):
        size = LENGTH.unpack_from(payload, at)[0]
        at += 4 + size
        texts.append(os.fsdecode(payload[at - size : at]))
    return texts, at


def decode_exec(payload: bytes) -> tuple[int, str, list[str], dict[str, str]]:
    """(flags, cwd, argv, env) of an EXEC payload."""
    cwd, at = take_texts(payload, EXEC_HEAD.size, 1)
    argv, at = take_texts(payload, at + 4, LENGTH.unpack_from(payload, at)[0])
    items, at = take_texts(payload, at + 4, LENGTH.unpack_from(payload, at)[0])
    environ = {}  # type: dict[str, str]
    for item in items:
        name, equals, value = item.partition("=")
        if equals and name:
            environ.setdefault(name, value)
    return EXEC_HEAD.unpack_from(payload)[0], cwd[0], argv, environ


def encode_exec(flags: int, cwd: str, argv: list[str], environ: dict[str, str]) -> bytes:
    """The other way round."""
    parts = [EXEC_HEAD.pack(flags, 24, 80, 1 << 20)]
    items = [name + "=" + value for name, value in environ.items()]
    for count, texts in ((None, [cwd]), (len(argv), argv), (len(items), items)):
        if count is not None:
            parts.append(LENGTH.pack(count))
        for text in texts:
            data = os.fsencode(text)
            parts += [LENGTH.pack(len(data)), data]
    return b"".join(parts)


class Runner:
    """Serves the agent: runs each command line in a child of its own or, asked for ONCE, in this very process."""

    def __init__(self, sock: _socket.socket, buffer: memoryview) -> None:
        _syscall(SYS_PRCTL, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0)  # it ends with the agent, whatever happens
        self.sock = sock
        self.buffers = [buffer]
        self.children = {}  # type: dict[int, int]  # pid by pidfd
        self.poll = None  # type: Any
        self.verdicts = None  # type: Any

    def serve(self) -> NoReturn:
        """Answer requests until the agent is gone."""
        while True:
            if self.children:
                self.wait()
            payload, fds = self.receive()
            flags, cwd, argv, environ = decode_exec(payload)
            if flags & EXEC_ONCE:
                self.run(flags, cwd, argv, environ, fds)
            else:
                self.run_in_child(flags, cwd, argv, environ, fds)
            for fd in fds:
                os.close(fd)

    def receive(self) -> tuple[bytes, list[int]]:
        """The next request's payload and its three descriptors."""
        size, ancillary, _, _ = self.sock.recvmsg_into(self.buffers, _socket.CMSG_SPACE(12), _socket.MSG_CMSG_CLOEXEC)
        data = self.buffers[0][:size].tobytes() or self.more()
        while len(data) < 4:
            data += self.more()
        size = LENGTH.unpack_from(data)[0] + 4
        while len(data) < size:
            data += self.more()
        return data[4:], rights_in(ancillary)

    def more(self) -> bytes:
        """More of a request that came in pieces; ends the process when the agent is gone."""
        data = self.sock.recv(65536)
        if not data:
            os._exit(0)
        return data

    def run(self, flags: int, cwd: str, argv: list[str], environ: dict[str, str], fds: list[int]) -> None:
        """Run a command line in this process; returns only when it is refused."""
        try:
            context = argv[0] == CONTEXT_ARGV0
            run = ContextRun(environ, cwd) if context else Run(argv, environ, cwd, fds[0])  # type: Any
        except Exception as failure:
            # Refused, or something unforeseen: then too, a real interpreter is the better answer.
            reason = failure.args[0] if isinstance(failure, Refused) and failure.args else errno.EINVAL
            if self.verdicts is not None:
                self.verdicts[os.getpid() % len(self.verdicts)] = 1
            self.sock.send(ANSWER.pack(REFUSED, reason or errno.EINVAL, 0))
            return
        _signal.signal(SIGINT, _signal.default_int_handler)
        _signal.signal(SIGPIPE, _signal.SIG_IGN)
        _signal.signal(SIGXFSZ, _signal.SIG_IGN)
        os.setsid()
        for fd in (0, 1, 2):
            os.dup2(fds[fd], fd)
        if flags & EXEC_TTY:
            _syscall(SYS_IOCTL, 0, TIOCSCTTY, 0, 0, 0, 0)
        self.sock.send(ANSWER.pack(STARTED, os.getpid(), 0))
        for fd in fds:
            os.close(fd)
        self.sock.close()
        if context:
            names = run.enter()
            gc.enable()
            context_main(names)
        execute(run)

    def run_in_child(self, flags: int, cwd: str, argv: list[str], environ: dict[str, str], fds: list[int]) -> None:
        """Fork, and run a command line there."""
        if self.poll is None:
            self.poll = select.poll()
            self.poll.register(self.sock.fileno(), select.POLLIN)
            # Shared with the children: one that refused says so here, since no EXITED must follow a REFUSED.
            self.verdicts = shared_bytes(65536)
        pid = os.fork()
        if pid == 0:
            try:
                for pidfd in self.children:
                    if pidfd >= 0:
                        os.close(pidfd)
                self.run(flags, cwd, argv, environ, fds)
            finally:
                os._exit(0)
        pidfd = _syscall(SYS_PIDFD_OPEN, pid, 0, 0, 0, 0, 0)
        if pidfd < 0:  # gVisor has none: this child is looked at again and again
            self.children[-pid] = pid
            return
        self.children[pidfd] = pid
        self.poll.register(pidfd, select.POLLIN)

    def wait(self) -> None:
        """Wait for the next request; meanwhile reap children, and tell."""
        while True:
            unseen = [key for key in self.children if key < 0]
            ready = [fd for fd, _ in self.poll.poll(CHILD_LOOK_MS if unseen else None)]
            for pidfd in (*ready, *unseen):
                pid = self.children.get(pidfd, 0)
                if not pid:
                    continue
                ended, status = os.waitpid(pid, 0 if pidfd >= 0 else os.WNOHANG)
                if not ended:
                    continue
                del self.children[pidfd]
                if pidfd >= 0:
                    self.poll.unregister(pidfd)
                    os.close(pidfd)
                if self.verdicts[pid % len(self.verdicts)]:
                    self.verdicts[pid % len(self.verdicts)] = 0
                else:
                    self.sock.send(ANSWER.pack(EXITED, pid, status))
            if self.sock.fileno() in ready or not self.children:
                return


def shared_bytes(size: int) -> Any:
    """Memory that children share with this process."""
    address = _libc.mmap(None, size, 3, 0x21, -1, 0)
    return (ctypes.c_ubyte * size).from_address(address)


# ----------------------------------------------------------------------------------------------- rehearsal


def rehearse() -> None:
    """Walk the way of a run once, up to the program itself, so that its code and its memory are warm.

    Done before parking, it specialises bytecode and fills caches; done in a spare, it takes the page faults.
    """
    main, path = sys.modules["__main__"], list(sys.path)
    for name in (os.path.basename(sys.executable), sys.executable):
        payload = encode_exec(EXEC_ONCE, "/", [name, "-c", "pass"], prepared.environ)
        _, cwd, argv, environ = decode_exec(payload)
        try:
            run = Run(argv, environ, cwd, 0)
            break
        except Refused:
            pass
    else:
        return  # so will programs be, unless they bring other variables
    names = run.enter()
    frames = prepared.frames
    frames.depth_counter()
    frames.slot()
    exec(run.code or "", names)
    flush_streams(True)
    sys.modules["__main__"] = main
    sys.path[:] = path


# What programs commonly do first with these. Done before parking, it loads what they load late and fills caches;
# done in a spare it takes the page faults, but each page counts there: so that is less.
EXERCISES = {
    "numpy": """
a = numpy.arange(6.0).reshape(2, 3)
str(a), a.sum(), a.mean(axis=0), numpy.sqrt(a) + 1, a[a > 2], numpy.array([1, 2, 3]).tolist()
""",
    "pandas": """
import io
s = pandas.Series(range(10))
int(s.sum()), float(s.mean()), str(s.describe())
f = pandas.read_csv(io.StringIO("k,v\\na,1.5\\nb,2\\na,3\\n"))
str(f.groupby("k")["v"].sum()), str(f.head()), f.describe(), f[f.v > 1].sort_values("v"), f.to_dict()
""",
}
LIGHT_EXERCISES = {"numpy": "str(numpy.arange(3).sum())", "pandas": "str(pandas.Series(range(3)).sum())"}


def exercise(exercises: dict[str, str]) -> None:
    """Use the preloaded modules a little, on one thread."""
    for number in prepared.blas:
        number.value = 1
    for name, source in exercises.items():
        if name in sys.modules:
            try:
                exec(source, {name: sys.modules[name]})
            except Exception:
                pass  # another version of it: slower, nothing else
    for number in prepared.blas:
        number.value = prepared.threads


def main(argv: list[str]) -> NoReturn:
    """Dispatch on the mode."""
    if argv == ["context"]:
        prepare(dict(os.environ), [])
        prepared.look_at_modules()
        sys.path.insert(0, "")
        sys.argv = [""]
        context_main(new_main("", False))
    if argv[:1] in (["zygote"], ["resident"], ["companion"]):
        options = dict(word.lstrip("-").split("=", 1) for word in argv[1:])
        imports = [name for name in options.get("imports", "").split(",") if name]
        if argv[0] == "resident":
            resident_main(int(options["channel"]), options["agent"], imports, options.get("script", ""))
        if argv[0] == "companion":
            companion_main(int(options["link"]), imports, options.get("script", ""))
        zygote_main(int(options["control"]), imports, options.get("script", ""))
    sys.exit(
        "usage: runner.py zygote --control=FD [--imports=A,B] [--script=FILE]\n"
        "       runner.py resident --channel=FD --agent=FILE [--imports=A,B] [--script=FILE]\n"
        "       runner.py companion --link=FD [--imports=A,B] [--script=FILE]\n"
        "       runner.py context"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
