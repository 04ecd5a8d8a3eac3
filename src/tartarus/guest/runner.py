"""The warm Python runner: an interpreter that has already imported a template's modules, and waits.

One file, standard library only, Python 3.8 and later, always single-threaded. It is copied into the
template's root file system and runs there, never on the host's side of a sandbox's wall:

``python3 runner.py zygote --control=FD --imports=numpy,pandas`` imports, parks, and answers CLONE requests.
Each clone enters fresh namespaces, runs the confinement program it was handed, and splits in two: one half
becomes the guest agent, the other the sandbox's runner, which executes `python3 ...` command lines as the
real interpreter would, without its start-up and imports.

``python3 runner.py context`` runs code cells: JSON lines in, JSON lines out.

Nothing here may be trusted by the host: once user code runs, this process is the user's.
"""

from __future__ import annotations

import sys

STARTUP_MODULES = frozenset(sys.modules)  # what any python3 has loaded before its script directory counts

import _signal  # noqa: E402  (the modules above this line must be exactly the interpreter's own)
import _socket  # noqa: E402
import ctypes  # noqa: E402
import errno  # noqa: E402
import gc  # noqa: E402
import os  # noqa: E402
import struct  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

# ---------------------------------------------------------------------------------------------- the kernel

ARM = os.uname().machine in ("aarch64", "arm64")
if ARM:
    SYS_CLONE, SYS_EXECVEAT, SYS_PRCTL, SYS_GETTID, SYS_FUTEX, SYS_RSEQ = 220, 281, 167, 178, 98, 293
else:
    SYS_CLONE, SYS_EXECVEAT, SYS_PRCTL, SYS_GETTID, SYS_FUTEX, SYS_RSEQ = 56, 322, 157, 186, 202, 334
SYS_CLOSE_RANGE = 436

CLONE_VM = 0x100
CLONE_PIDFD = 0x1000
CLONE_CHILD_SETTID = 0x01000000
CLONE_NEWPID = 0x20000000
FUTEX_WAKE_PRIVATE = 129
AT_EMPTY_PATH = 0x1000
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
TIOCSCTTY = 0x540E
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


# ------------------------------------------------------------------------------------ confinement programs

PROGRAM_HEADER = struct.Struct("<4sHHI")
OP = struct.Struct("<BBHiiI6B2x6Q")
REPORT = struct.Struct("<IBBHIII")  # a BOOT_FAILED frame: header, step, errno
BOOT_FAILED = 0x82
STEP_PROGRAM, STEP_AGENT, STEP_RUNNER = 0xFFFF0001, 0xFFFF0002, 0xFFFF0003
IMM, BLOB, FD, LOAD = 0, 1, 2, 3
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
    call, get_errno = _syscall, ctypes.get_errno
    for op in OP.iter_unpack(program[PROGRAM_HEADER.size : ops_end]):
        kind, _, ok_errno, number, store_at, step, t0, t1, t2, t3, t4, t5, a0, a1, a2, a3, a4, a5 = op
        if t0 | t1 | t2 | t3 | t4 | t5:
            args = [a0, a1, a2, a3, a4, a5]
            for index, tag in enumerate((t0, t1, t2, t3, t4, t5)):
                if tag == BLOB:
                    args[index] += blob
                elif tag == FD:
                    if args[index] >= n_fds:
                        raise BootFailed(step, errno.EBADF)
                    args[index] += FIRST_FD
                elif tag == LOAD:
                    args[index] = struct.unpack_from("<i", loads, args[index])[0]
            a0, a1, a2, a3, a4, a5 = args
        if kind == 0:
            result = call(number, a0, a1, a2, a3, a4, a5)
            if result == -1:
                failed = get_errno()
                if failed != ok_errno:
                    raise BootFailed(step, failed)
            elif store_at >= 0:
                struct.pack_into("<i", loads, store_at, result)
        elif kind == 1:
            struct.pack_into("<Q", loads, a1, blob + a0)
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
#   clone(flags, 0, 0, child_tid); in the child, or on failure: return
#   while go == 0: futex(&go, FUTEX_WAIT_PRIVATE, 0, NULL)
#   execveat(exe, path, argv, envp, AT_EMPTY_PATH); report[16:20] = errno; write(report_fd, report, 20)
#   exit_group(125)
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
        self.before = ctypes.pythonapi.PyOS_BeforeFork
        self.after = ctypes.pythonapi.PyOS_AfterFork_Child
        self.undo = ctypes.pythonapi.PyOS_AfterFork_Parent
        self.before.restype = self.after.restype = self.undo.restype = None

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

        def places() -> List[int]:
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
        self.before()
        result = self.enter(self.address)  # type: int
        if result == 0:
            self.after()
        else:
            self.undo()
        return result

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
            return result
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
ONE_THREAD = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMEXPR_MAX_THREADS",
    "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS",
)  # fmt: skip


class Zygote:
    """The parked interpreter. Everything a clone needs on its way is made here, before parking."""

    def __init__(self, control_fd: int) -> None:
        # High up, so that received descriptors land exactly on 3, 4, 5, ... and need no moving.
        high = self._duplicate_high(control_fd)
        self.control = _socket.socket(fileno=high)
        self.buffer = ctypes.create_string_buffer(MAX_REQUEST)
        self.address = ctypes.addressof(self.buffer)
        self.view = memoryview(self.buffer).cast("B")
        self.pidfd = ctypes.c_int(-1)
        self.pidfd_address = ctypes.addressof(self.pidfd)
        self.ancillary_space = _socket.CMSG_SPACE(4 * MAX_PASSED_FDS)
        self.split = Split()

    @staticmethod
    def _duplicate_high(control_fd: int) -> int:
        import fcntl

        high = fcntl.fcntl(control_fd, fcntl.F_DUPFD_CLOEXEC, 900)
        os.close(control_fd)
        return high

    def fail(self, message: str) -> NoReturn:
        """Refuse to park, with a reason for people."""
        text = message.encode("utf-8", "replace")[:60000]
        self.control.send(struct.pack("<4sI", b"TERR", len(text)) + text)
        os._exit(1)

    def serve(self) -> NoReturn:
        """Answer CLONE requests until the control socket is closed."""
        receive = self.control.recvmsg_into
        buffers = [self.view]
        space = self.ancillary_space
        flags = _socket.MSG_CMSG_CLOEXEC
        while True:
            size, ancillary, message_flags, _ = receive(buffers, space, flags)
            if size == 0:
                os._exit(0)
            fds: List[int] = []
            for level, kind, data in ancillary:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    fds += struct.unpack("<%di" % (len(data) // 4), data[: len(data) & ~3])
            magic, sequence, clone_flags, program_len = REQUEST.unpack_from(self.view)
            if (
                size < REQUEST.size
                or magic != b"TCLN"
                or program_len != size - REQUEST.size
                or len(fds) < 2
                or message_flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC)
            ):
                self.control.send(REPLY.pack(b"TCLD", sequence, errno.EINVAL, 0))
            else:
                pid = _syscall(SYS_CLONE, clone_flags | SIGCHLD | CLONE_PIDFD, 0, self.pidfd_address, 0, 0, 0)
                if pid == 0:
                    self.become_guest(fds, clone_flags, program_len)
                self.reply(sequence, pid)
            for fd in fds:
                os.close(fd)

    def reply(self, sequence: int, pid: int) -> None:
        """Answer one request: the child's pid and pidfd, or why there is none."""
        if pid < 0:
            self.control.send(REPLY.pack(b"TCLD", sequence, ctypes.get_errno(), 0))
            return
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("<i", self.pidfd.value))]
        self.control.sendmsg([REPLY.pack(b"TCLD", sequence, 0, pid)], rights)
        os.close(self.pidfd.value)

    def become_guest(self, fds: List[int], clone_flags: int, program_len: int) -> NoReturn:
        """In the clone: confine, then split into agent (this process) and runner (its child)."""
        step = STEP_PROGRAM
        try:
            n_fds = len(fds)
            if fds != list(range(FIRST_FD, FIRST_FD + n_fds)):
                fds = move_fds(fds)
            close_fds_from(FIRST_FD + n_fds)
            agent_side, runner_side = _socket.socketpair()
            _signal.signal(SIGCHLD, _signal.SIG_DFL)
            start = REQUEST.size
            run_program(self.address + start, self.view[start : start + program_len], n_fds)
            for fd in range(FIRST_FD + 2, FIRST_FD + n_fds):
                os.close(fd)
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


def move_fds(fds: List[int]) -> List[int]:
    """Move descriptors to 3, 4, 5, ... whatever their numbers are; the rest is closed by the caller."""
    import fcntl

    top = FIRST_FD + len(fds)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, top) for fd in fds]
    for index, fd in enumerate(high):
        os.dup2(fd, FIRST_FD + index, False)
    return list(range(FIRST_FD, top))


def zygote_main(control_fd: int, imports: List[str]) -> NoReturn:
    """Import, prepare, park, serve."""
    zygote = Zygote(control_fd)
    for name in ONE_THREAD:
        os.environ[name] = "1"
    for module in imports:
        try:
            __import__(module)
        except BaseException as failure:
            zygote.fail("the warm-up could not import %s: %s: %s" % (module, type(failure).__name__, failure))
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        zygote.fail(
            "the warm-up left %d threads running; a clone can't carry them over: drop the import that starts them, "
            "or make it start them later" % (threads - 1)
        )
    prepare()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    _signal.signal(SIGCHLD, _signal.SIG_IGN)  # the kernel reaps: no zombies, and no work here
    for number in (SIGINT, SIGPIPE, SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)  # as the agent must find them; programs get Python's own again
    zygote.split.prepare()
    gc.collect()
    gc.disable()
    gc.freeze()
    zygote.control.send(struct.pack("<4sI", b"TRDY", 0))
    zygote.serve()


# ---------------------------------------------------------------------------------------- command lines


class Refused(Exception):
    """This command line is better served by a real, cold interpreter; the argument is an errno."""


class Plan:
    """What a `python3 ...` command line asks for."""

    def __init__(self) -> None:
        self.mode = ""  # "command", "module", "script", "stdin" or "context"
        self.target = ""
        self.args: List[str] = []
        self.flags: Dict[str, int] = {}  # by name of sys.flags
        self.executable = ""


SIMPLE_OPTIONS = {
    "u": (), "B": ("dont_write_bytecode",), "E": ("ignore_environment",), "s": ("no_user_site",), "q": ("quiet",),
    "I": ("isolated", "ignore_environment", "no_user_site", "safe_path"), "P": ("safe_path",),
}  # fmt: skip
SAFE_PATH = sys.version_info >= (3, 11)


def parse_command(argv: List[str]) -> Plan:
    """Read a command line as CPython's getopt does; Refused for every option that start-up would have to see."""
    plan = Plan()
    index = 1
    while index < len(argv) and not plan.mode:
        word = argv[index]
        if word == "-" or not word.startswith("-"):
            break
        index += 1
        if word == "--":
            break
        at = 1
        while at < len(word):
            letter = word[at]
            at += 1
            if letter in "cm":
                plan.mode = "command" if letter == "c" else "module"
                if at == len(word):
                    if index == len(argv):
                        raise Refused(errno.EINVAL)
                    plan.target = argv[index]
                    index += 1
                else:
                    plan.target = word[at:]
                break
            if letter not in SIMPLE_OPTIONS or (letter == "P" and not SAFE_PATH):
                raise Refused(errno.EINVAL)
            for flag in SIMPLE_OPTIONS[letter]:
                if flag != "safe_path" or SAFE_PATH:
                    plan.flags[flag] = 1
            if letter == "u":
                plan.flags["unbuffered"] = 1
    if plan.mode:
        plan.args = ["-" + plan.mode[0]] + argv[index:]
    elif index < len(argv):
        plan.target = argv[index]
        plan.mode = "stdin" if plan.target == "-" else "script"
        plan.args = argv[index:]
    else:
        plan.mode, plan.args = "stdin", [""]
    return plan


# ------------------------------------------------------------------------------- a fresh-looking interpreter

# Variables start-up would have read and that can be honoured afterwards, or that only matter later on.
HONOURED = frozenset(
    (
        "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONNOUSERSITE", "PYTHONUSERBASE", "PYTHONSTARTUP",
        "PYTHONBREAKPOINT", "PYTHONPATH",
    )
)  # fmt: skip
START_UP_ONLY = frozenset(
    ("PYTHON_GIL", "PYTHON_CPU_COUNT", "PYTHON_FROZEN_MODULES", "PYTHON_JIT", "PYTHON_PRESITE", "PYTHON_TLBC",
     "PYTHON_PERF_JIT_SUPPORT", "PYTHON_CONTEXT_AWARE_WARNINGS", "PYTHON_THREAD_INHERIT_CONTEXT",
     "PYTHON_DISABLE_REMOTE_DEBUG")
)  # fmt: skip


class Prepared:
    """What is worked out once, before parking, for every command line to come."""

    def __init__(self) -> None:
        self.environ = dict(os.environ)
        self.real_executable = os.path.realpath(sys.executable)
        self.bin = os.path.realpath(os.path.dirname(sys.executable))
        self.path = list(sys.path[1:])
        self.shadowable = frozenset()  # type: frozenset[str]
        self.flag_index = {}  # type: Dict[str, int]


prepared = None  # type: Optional[Prepared]


def prepare() -> Prepared:
    """Make everything that a run needs; called once, before parking (or at start-up of a cold context)."""
    global prepared
    prepared = Prepared()
    names = [name for name, kind in vars(type(sys.flags)).items() if type(kind).__name__ == "member_descriptor"]
    prepared.flag_index = {name: index for index, name in enumerate(names)}
    import _imp

    always = STARTUP_MODULES | frozenset(sys.builtin_module_names)
    loaded = frozenset(name.partition(".")[0] for name in sys.modules)
    prepared.shadowable = frozenset(name for name in loaded - always if not _imp.is_frozen(name))
    sys.path[:] = prepared.path
    return prepared


def check_environment(environ: Dict[str, str], plan: Plan) -> None:
    """Refused when a variable asks for something only a start-up can give."""
    assert prepared is not None
    if "ignore_environment" in plan.flags:
        return
    for name, value in environ.items():
        if name.startswith("PYTHON") and value and prepared.environ.get(name) != value:
            if name in START_UP_ONLY or ("_" not in name and name not in HONOURED):
                raise Refused(errno.ENOTSUP)
    if environ.get("PYTHONUNBUFFERED"):
        plan.flags["unbuffered"] = 1
    if environ.get("PYTHONDONTWRITEBYTECODE"):
        plan.flags["dont_write_bytecode"] = 1
    if environ.get("PYTHONNOUSERSITE"):
        plan.flags["no_user_site"] = 1


def find_executable(name: str, environ: Dict[str, str]) -> str:
    """The absolute path a shell would run for `name`; Refused unless it is the interpreter that runs this."""
    assert prepared is not None
    candidate = name
    if "/" not in name:
        for directory in environ.get("PATH", os.defpath).split(":"):
            candidate = directory + "/" + name
            if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
                break
        else:
            raise Refused(errno.ENOENT)
    if candidate == sys.executable:
        return candidate
    if not candidate.startswith("/"):
        raise Refused(errno.ENOENT)
    here, there = os.path.dirname(sys.executable), os.path.dirname(candidate)
    if not (os.path.samefile(candidate, sys.executable) and os.path.samefile(here, there)):
        raise Refused(errno.ENOEXEC)
    return candidate


def set_locale(environ: Dict[str, str]) -> Tuple[int, str]:
    """Choose the character set as start-up does: (utf8_mode, error handler of stdin and stdout)."""
    from _locale import CODESET, LC_CTYPE, Error, nl_langinfo, setlocale

    lc_all = environ.get("LC_ALL")
    wanted = lc_all or environ.get("LC_CTYPE") or environ.get("LANG") or "C"
    if wanted in ("C.UTF-8", "C.utf8"):
        setlocale(LC_CTYPE, wanted)
        return 0, "surrogateescape"
    if wanted not in ("C", "POSIX"):
        try:
            setlocale(LC_CTYPE, wanted)
        except Error:
            wanted = "C"
        else:
            if nl_langinfo(CODESET) != "UTF-8":
                raise Refused(errno.EILSEQ)
            return 0, "strict"
    if lc_all:
        setlocale(LC_CTYPE, "C")
    else:
        environ["LC_CTYPE"] = "C.UTF-8"
        setlocale(LC_CTYPE, "C.UTF-8")
    return 1, "surrogateescape"


def check_shadows(directories: List[str]) -> None:
    """Refused when a directory that comes first on sys.path has a module of a name we hold already."""
    assert prepared is not None
    shadowable = prepared.shadowable
    for directory in directories:
        try:
            names = os.listdir(directory or ".")
        except OSError:
            continue
        for name in names:
            if name.partition(".")[0] in shadowable:
                raise Refused(errno.EEXIST)


def load_script(path: str) -> CodeType:
    """Read and compile a script; Refused for whatever the real interpreter would treat specially or fail at."""
    import stat

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise Refused(errno.EISDIR)
            with open(fd, "rb", buffering=0, closefd=False) as file:
                source = file.read()
        finally:
            os.close(fd)
    except OSError as failure:
        raise Refused(failure.errno or errno.EIO) from None
    if path.endswith(".pyc") or b"PK\5\6" in source[-65557:]:
        raise Refused(errno.ENOEXEC)
    return compile_or_refuse(source, path)


def compile_or_refuse(source: Any, name: str) -> CodeType:
    """Compile; errors are left to the real interpreter, which words and shows them best."""
    try:
        code = compile(source, name, "exec", 0, True)  # type: CodeType
    except BaseException:
        raise Refused(errno.EINVAL) from None
    return code


def set_flags(flags: Dict[str, int]) -> None:
    """Make sys.flags, a read-only tuple, say what the command line asked for."""
    assert prepared is not None
    for name, value in flags.items():
        index = prepared.flag_index.get(name)
        if index is not None and getattr(sys.flags, name) != value:
            boxed = bool(value) if name == "safe_path" else value
            reference = ctypes.py_object(boxed)
            ctypes.pythonapi.Py_IncRef(reference)
            ctypes.pythonapi.PyStructSequence_SetItem(ctypes.py_object(sys.flags), ctypes.c_ssize_t(index), reference)
    if flags.get("dont_write_bytecode"):
        sys.dont_write_bytecode = True


def set_environment(environ: Dict[str, str]) -> None:
    """Replace the environment, both Python's and the C library's."""
    import posix

    _clearenv()
    data = {}
    for name, value in environ.items():
        key, content = os.fsencode(name), os.fsencode(value)
        os.putenv(key, content)
        data[key] = content
    for mapping in (os.environ._data, posix.environ):
        mapping.clear()
        mapping.update(data)


def open_stream(fd: int, name: str, errors: str, unbuffered: bool) -> Any:
    """One of sys.stdin, stdout and stderr, made as start-up makes them."""
    import _io

    write = fd != 0
    buffer = _io.open(fd, "wb" if write else "rb", 0 if unbuffered and write else -1, None, None, None, False)
    raw = buffer if unbuffered and write else buffer.raw
    raw.name = name
    line_buffering = fd == 2 and sys.version_info >= (3, 9)
    if not line_buffering:
        line_buffering = not unbuffered and raw.isatty()
    text = _io.TextIOWrapper(buffer, "utf-8", errors, "\n", line_buffering, unbuffered)
    text.mode = "w" if write else "r"
    return text


def open_streams(errors: str, unbuffered: bool) -> None:
    """Make fresh standard streams over descriptors 0, 1 and 2."""
    sys.stdin = sys.__stdin__ = open_stream(0, "<stdin>", errors, unbuffered)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = open_stream(1, "<stdout>", errors, unbuffered)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open_stream(2, "<stderr>", "backslashreplace", unbuffered)  # type: ignore[misc]


def renew_secrets() -> None:
    """Give this process random numbers of its own: nothing that was drawn before parking may repeat here."""
    modules = sys.modules
    process = modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)
        process.ORIGINAL_DIR = os.getcwd()
    tempfile = modules.get("tempfile")
    if tempfile is not None:
        tempfile._name_sequence = tempfile.tempdir = None
    mtrand = modules.get("numpy.random.mtrand")
    if mtrand is not None:
        mtrand.seed()
    if "_ssl" in modules:
        modules["_ssl"].RAND_add(os.urandom(48), 48.0)


def new_main(loader: Any) -> Dict[str, Any]:
    """A fresh __main__, with what start-up puts in it; returns its namespace."""
    import builtins

    module = type(sys)("__main__")
    names = module.__dict__
    names["__loader__"] = loader
    if sys.version_info < (3, 14):
        names["__annotations__"] = {}
    names["__builtins__"] = builtins
    sys.modules["__main__"] = module
    return names


# ------------------------------------------------------------------------------------------------- running


class Run:
    """One command line, checked and compiled: everything that can still be refused is behind it."""

    def __init__(self, argv: List[str], environ: Dict[str, str], cwd: str) -> None:
        assert prepared is not None
        self.argv = argv
        self.environ = environ
        self.plan = plan = parse_command(argv)
        check_environment(environ, plan)
        try:
            os.chdir(cwd)
        except OSError as failure:
            raise Refused(failure.errno) from None
        plan.executable = find_executable(argv[0], environ)
        self.utf8_mode, self.errors = set_locale(environ)
        self.path = self._path()
        self.code = None  # type: Optional[CodeType]
        self.file = ""
        if plan.mode == "command":
            self.code = compile_or_refuse(plan.target + "\n", "<string>")
        elif plan.mode == "script":
            self.file = os.path.join(os.getcwd(), plan.target) if sys.version_info >= (3, 9) else plan.target
            self.code = load_script(self.file)
        elif os.isatty(0):
            raise Refused(errno.ENOTTY)

    def _path(self) -> List[str]:
        """sys.path as this command line gets it."""
        assert prepared is not None
        plan = self.plan
        first = [] if "isolated" in plan.flags or "safe_path" in plan.flags else [self._first_entry()]
        extra = "" if "ignore_environment" in plan.flags else self.environ.get("PYTHONPATH", "")
        more = [os.path.abspath(entry) for entry in extra.split(":")] if extra else []
        check_shadows(first + more)
        path = []  # type: List[str]
        for entry in more + prepared.path:
            if entry not in path:
                path.append(entry)
        return first + path

    def _first_entry(self) -> str:
        plan = self.plan
        if plan.mode == "module":
            return os.getcwd()
        return os.path.dirname(os.path.realpath(plan.target)) if plan.mode == "script" else ""

    def start(self) -> NoReturn:
        """Become the program. Descriptors 0 to 2 are already its own."""
        plan = self.plan
        set_environment(self.environ)
        flags = dict(plan.flags)
        unbuffered = bool(flags.pop("unbuffered", 0))
        flags["utf8_mode"] = self.utf8_mode
        set_flags(flags)
        sys.argv = plan.args
        if sys.version_info >= (3, 10):
            sys.orig_argv = self.argv
        if sys.executable == sys._base_executable:  # type: ignore[attr-defined]
            sys._base_executable = plan.executable  # type: ignore[attr-defined]
        sys.executable = plan.executable
        sys.path[:] = self.path
        if plan.mode == "script":
            from importlib.machinery import SourceFileLoader

            names = new_main(SourceFileLoader("__main__", self.file))
            names["__file__"] = self.file
            names["__cached__"] = None
        else:
            from importlib.machinery import BuiltinImporter

            names = new_main(BuiltinImporter)
        renew_secrets()
        open_streams(self.errors, unbuffered)
        gc.enable()
        execute(self, names)


def execute(run: Run, names: Dict[str, Any]) -> NoReturn:
    """Run the program to its end, as CPython's own main function does, and exit."""
    status = 0
    try:
        if run.code is not None:
            exec(run.code, names)
        elif run.plan.mode == "module":
            import runpy

            runpy._run_module_as_main(run.plan.target, True)  # type: ignore[attr-defined]
        else:
            exec(compile(sys.stdin.buffer.read(), "<stdin>", "exec", 0, True), names)
    except BaseException as failure:
        trace = failure.__traceback__
        failure.__traceback__ = trace.tb_next if trace is not None else None
        status = handle_exception(failure)
    finish(status)


def handle_exception(failure: BaseException) -> int:
    """Show an exception that ended the program; the exit status, or -signal."""
    if isinstance(failure, SystemExit):
        code = failure.code
        if code is None:
            return 0
        if isinstance(code, int):
            return code & 0xFF
        print(code, file=sys.stderr)
        return 1
    sys.last_type, sys.last_value, sys.last_traceback = type(failure), failure, failure.__traceback__
    sys.excepthook(type(failure), failure, failure.__traceback__)
    return -SIGINT if isinstance(failure, KeyboardInterrupt) else 1


def finish(status: int) -> NoReturn:
    """End the process as the interpreter's finalisation would, without tearing down what was preloaded."""
    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()
    import atexit

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _fflush(None)
    if status < 0:
        _signal.signal(-status, _signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# -------------------------------------------------------------------------------------------------- runner

EXEC_TTY, EXEC_STDIN, EXEC_WARM, EXEC_ONCE = 1, 2, 4, 8
EXEC_HEAD = struct.Struct("<IHHI")
ANSWER = struct.Struct("<IiI")
STARTED, EXITED, REFUSED = 1, 2, 3


def decode_exec(payload: bytes) -> Tuple[int, str, List[str], Dict[str, str]]:
    """(flags, cwd, argv, env) of an EXEC payload."""
    flags = EXEC_HEAD.unpack_from(payload)[0]
    at = EXEC_HEAD.size
    length = struct.Struct("<I").unpack_from

    def text() -> str:
        nonlocal at
        size = length(payload, at)[0]
        at += 4 + size
        return os.fsdecode(payload[at - size : at])

    def texts() -> List[str]:
        nonlocal at
        count = length(payload, at)[0]
        at += 4
        return [text() for _ in range(count)]

    cwd, argv = text(), texts()
    environ = {}
    for item in texts():
        name, equals, value = item.partition("=")
        if equals and name:
            environ.setdefault(name, value)
    return flags, cwd, argv, environ


class Runner:
    """Serves the agent: runs each command line in a child, or, for the last one, in itself."""

    def __init__(self, sock: _socket.socket, buffer: memoryview) -> None:
        _syscall(SYS_PRCTL, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0)  # it ends with the agent, whatever happens
        self.sock = sock
        self.buffers = [buffer]
        self.children = {}  # type: Dict[int, int]  # pid by pidfd
        self.fds = []  # type: List[int]

    def serve(self) -> NoReturn:
        """Answer requests until the agent is gone."""
        while True:
            payload = self.receive()
            flags, cwd, argv, environ = decode_exec(payload)
            self.run(flags, cwd, argv, environ)
            for fd in self.fds:
                os.close(fd)

    def receive(self) -> bytes:
        """The next request's payload; its three descriptors are kept in `fds`."""
        size, ancillary, _, _ = self.sock.recvmsg_into(self.buffers, _socket.CMSG_SPACE(12), _socket.MSG_CMSG_CLOEXEC)
        data = bytes(self.buffers[0][:size])
        self.fds = []
        for level, kind, rights in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                self.fds += struct.unpack("<%di" % (len(rights) // 4), rights)
        while len(data) < 4:
            data += self.more()
        size = struct.unpack_from("<I", data)[0] + 4
        while len(data) < size:
            data += self.more()
        return data[4:]

    def more(self) -> bytes:
        data = self.sock.recv(65536)
        if not data:
            os._exit(0)
        return data

    def run(self, flags: int, cwd: str, argv: List[str], environ: Dict[str, str]) -> None:
        try:
            run = Run(argv, environ, cwd)
        except Refused as refused:
            self.sock.send(ANSWER.pack(REFUSED, refused.args[0], 0))
            return
        _signal.signal(SIGINT, _signal.default_int_handler)
        _signal.signal(SIGPIPE, _signal.SIG_IGN)
        _signal.signal(SIGXFSZ, _signal.SIG_IGN)
        os.setsid()
        for fd in (0, 1, 2):
            os.dup2(self.fds[fd], fd)
        self.sock.send(ANSWER.pack(STARTED, os.getpid(), 0))
        for fd in self.fds:
            os.close(fd)
        self.sock.close()
        run.start()


def main(argv: List[str]) -> NoReturn:
    """Dispatch on the mode."""
    if argv[:1] == ["zygote"]:
        options = dict(word.lstrip("-").split("=", 1) for word in argv[1:])
        zygote_main(int(options["control"]), [name for name in options.get("imports", "").split(",") if name])
    sys.exit("usage: runner.py zygote --control=FD [--imports=A,B] | context")


if __name__ == "__main__":
    main(sys.argv[1:])
