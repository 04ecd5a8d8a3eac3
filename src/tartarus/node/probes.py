"""Small experiments on this host, each in a child process that takes its changes with it.

A feature that is compiled in may still be refused (a sysctl, AppArmor, a container engine's filter), so
nothing here reads versions to guess: it does the thing, and reports the errno. `doctor.py` turns results
into advice.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from tartarus.guest.syscalls import number
from tartarus.model.sandbox import Isolation
from tartarus.runtimes.confine.seccomp import SET_MODE_FILTER, seccomp_filter

TIMEOUT_S: Final = 10.0
NOBODY: Final = 65534
_MS_REC, _MS_PRIVATE = 16384, 1 << 18
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL_NAMESPACES: Final = _NEWUSER | _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_PR_SET_NO_NEW_PRIVS, _KVM_GET_API_VERSION = 38, 0xAE00


class Result(NamedTuple):
    """How an experiment went: `error` is the errno it failed with (0: it worked), `detail` says more."""

    error: int
    detail: str

    @property
    def works(self) -> bool:
        """Whether it worked."""
        return self.error == 0


def attempt(work: Callable[[], str], *, timeout_s: float = TIMEOUT_S) -> Result:
    """Do something in a forked child, which is killed after `timeout_s`; `work` returns a detail or raises OSError.

    Call it from a process without other threads: a fork copies only the caller.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _work_and_exit(work, writer)
    os.close(writer)
    try:
        answer = _read_all(reader, timeout_s)
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    error, _, detail = answer.partition(" ")
    return Result(int(error), detail) if error.isdigit() else Result(62, f"no answer within {timeout_s:g} s")


def _work_and_exit(work: Callable[[], str], writer: int) -> NoReturn:
    try:
        answer = f"0 {work()}"
    except OSError as error:
        answer = f"{error.errno or 5} {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except BaseException as error:  # noqa: BLE001 - the child must end here, whatever happened
        answer = f"5 {error!r}"
    os.write(writer, answer.encode(errors="replace")[:4000])
    os._exit(0)


def _read_all(reader: int, timeout_s: float) -> str:
    data = b""
    while select.select([reader], [], [], timeout_s)[0]:
        chunk = os.read(reader, 4096)
        if not chunk:
            break
        data += chunk
    return data.decode()


def call(name: str, *args: int | bytes | None) -> int:
    """A system call by name. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    plain = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = int(libc.syscall(ctypes.c_long(number(name)), *plain))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
    return result


def _write(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def _enter_user_namespace(flags: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", flags)
    _write("/proc/self/setgroups", b"deny")
    _write("/proc/self/uid_map", b"0 %d 1" % uid)
    _write("/proc/self/gid_map", b"0 %d 1" % gid)


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)  # from here on, nothing may be imported: our files may be root's
    # A change of user makes a process undumpable, and its /proc files root's; without this it can't map itself.
    call("prctl", 4, 1, 0, 0, 0)


def user_namespaces() -> Result:
    """Make every namespace that the container level uses, in the order it does, as whoever we are."""

    def work() -> str:
        if os.geteuid() == 0:
            call("unshare", _NEWNS)  # root gathers the template's files first; in an engine it may lack the right
        _enter_user_namespace(ALL_NAMESPACES)
        return ""

    return attempt(work)


def user_namespaces_without_root() -> Result:
    """The same as an ordinary user; only root needs to ask, others know from `user_namespaces`."""

    def work() -> str:
        _become_nobody()
        _enter_user_namespace(ALL_NAMESPACES)
        return ""

    return attempt(work)


def fresh_proc() -> Result:
    """Mount a procfs of a new pid namespace; refused where the host's own /proc is partly hidden."""

    def work() -> str:
        _enter_user_namespace(_NEWUSER | _NEWNS | _NEWPID)
        inner = os.fork()
        if inner == 0:
            try:
                call("mount", b"proc", b"/proc", b"proc", 0, None)
            except OSError as error:
                os._exit(error.errno or 5)
            os._exit(0)
        failed = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
        if failed:
            raise OSError(failed, os.strerror(failed), "mount")
        return ""

    return attempt(work)


def overlay(below: Path) -> Result:
    """Mount an overlay on a tmpfs in a user namespace, write to it, and read what lies under it."""

    def work() -> str:
        _enter_user_namespace(_NEWUSER | _NEWNS)
        call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        base = bytes(below)
        call("mount", b"tmpfs", base, b"tmpfs", 0, b"size=1m")
        for name in ("lower", "upper", "work", "merged"):
            (below / name).mkdir()
        (below / "lower" / "file").write_bytes(b"lower")
        options = b"lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work,userxattr" % (base, base, base)
        call("mount", b"overlay", base + b"/merged", b"overlay", 0, options)
        merged = below / "merged" / "file"
        merged.write_bytes(merged.read_bytes() + b" and upper")
        return (below / "upper" / "file").read_bytes().decode()

    return attempt(work)


def seccomp() -> Result:
    """Install the process level's own filter, and see it refuse."""

    def work() -> str:
        code = seccomp_filter(Isolation.PROCESS)
        buffer = ctypes.create_string_buffer(code, len(code))
        call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("seccomp", SET_MODE_FILTER, 0, struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)))
        try:
            call("chroot", b"/")
        except PermissionError:
            return f"{len(code) // 8} instructions"
        raise OSError(5, "the filter is installed and does not refuse")

    return attempt(work)


def run_from_memory() -> Result:
    """Execute a program from a memory file, as every guest agent is started."""

    def work() -> str:
        program = shutil.which("true") or "/bin/true"
        fd = os.memfd_create("probe")
        os.write(fd, Path(program).read_bytes())
        inner = os.fork()
        if inner == 0:
            try:
                os.execve(fd, ["true"], {})
            except OSError as error:
                os._exit(error.errno or 5)
        failed = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
        if failed:
            raise OSError(abs(failed), os.strerror(abs(failed)), "execve of a memfd")
        return ""

    return attempt(work)


def kvm() -> Result:
    """Open /dev/kvm and ask its version. That a guest runs on it is known only after one did."""

    def work() -> str:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        return f"API version {call('ioctl', fd, _KVM_GET_API_VERSION, 0)}"

    return attempt(work)


def tun() -> Result:
    """Open /dev/net/tun; no interface is made."""

    def work() -> str:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        return ""

    return attempt(work)


def make_cgroup(parent: Path) -> Result:
    """Make a group below `parent` and remove it."""
    path = parent / f"tartarus-doctor-{os.getpid()}"
    try:
        path.mkdir()
        path.rmdir()
    except OSError as error:
        return Result(error.errno or 5, f"{error.strerror}: {parent}")
    return Result(0, "")


def hold_user_namespace(use: Callable[[int], None]) -> None:
    """Call `use` with the pid of a child that stands in a new user namespace. Raises what it raises, or OSError."""
    ready, release = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            call("unshare", _NEWUSER)
            os.write(ready[1], b"0")
        except OSError as error:
            os.write(ready[1], str(error.errno).encode())
        os.close(release[1])
        os.read(release[0], 1)
        os._exit(0)
    try:
        failed = int(os.read(ready[0], 16) or b"5") if select.select([ready[0]], [], [], TIMEOUT_S)[0] else 62
        if failed:
            raise OSError(failed, os.strerror(failed), "unshare")
        use(pid)
    finally:
        for fd in (*ready, *release):
            os.close(fd)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
