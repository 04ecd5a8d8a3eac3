"""Arbitrary Python in the jail, as if a decompressor had been taken over: every attempt, and what came of it.

Started by `attempts` as the real child is, through the real `jail.enter`; then it tries what an attacker would.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.escape.images.ground import SMALL, UID_BASE

from tartarus.guest.syscalls import table
from tartarus.images.unpack import idmap, jailed

_PRISONER = """
import ctypes, errno, json, mmap, os, resource, signal, socket, sys
sys.path.append(sys.argv[-1])
for name, place in (("tartarus", sys.argv[1]), ("tartarus.images", sys.argv[2])):
    package = sys.modules[name] = type(sys)(name)
    package.__path__ = [place]
from tartarus.images.unpack.inside import jail, main
from tartarus.images.unpack.limits import Limits
job = json.loads(main._line())
numbers, host = job["numbers"], job["host"]
jail.enter([jail.Place(**place) for place in job["places"]], Limits(*job["limits"]), main._mapped)
libc = jail.call.__globals__["_libc"]

def raw(name, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(numbers[name], *[ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments])
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]

at = os.open("/target", os.O_RDONLY)  # the calls that take a descriptor are those that the filter knows

def attempt(work):
    try:
        result = work()
    except OSError as error:
        return errno.errorcode[error.errno]
    except BaseException as error:
        return type(error).__name__
    return "done" if result is None else str(result)

def write(path, flags=os.O_WRONLY | os.O_CREAT):
    os.close(os.open(path, flags, 0o600))

def planted():
    write("/target/planted.py")
    sys.path.append("/target")
    import planted

def through_a_link(target):
    os.symlink(target, "/target/link", dir_fd=at)
    try:
        os.close(os.open("/target/link", os.O_RDONLY))
    finally:
        os.unlink("/target/link", dir_fd=at)

def too_long():
    fd = os.open("/target/long", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, job["limits"][0] + 1)

def found():
    return sorted(os.listdir("/"))

def from_target(up):
    directory = os.open("/target", os.O_RDONLY)
    os.close(os.open(up + "etc/passwd", os.O_RDONLY, dir_fd=directory))

say = {}
attacks = {
    "works: write in the target": lambda: write("/target/file"),
    "works: delete something": lambda: os.mknod("/target/gone", 0o020000, 0, dir_fd=at),
    "works: read the source": lambda: os.close(os.open("/source/file", os.O_RDONLY)),
    "sees": found,
    "read the host's shadow": lambda: os.close(os.open("/etc/shadow", os.O_RDONLY)),
    "read by dot-dot": lambda: os.close(os.open("/target/../../../etc/passwd", os.O_RDONLY)),
    "read by a descriptor's dot-dot": lambda: from_target("../../../../../../"),
    "read through a link": lambda: through_a_link("/source/file"),
    "read through a link up": lambda: through_a_link("../source/file"),
    "read /proc": lambda: os.listdir("/proc"),
    "write beside the target": lambda: write("/file"),
    "make a directory beside it": lambda: os.mkdir("/beside", dir_fd=at),
    "write in the source": lambda: write("/source/file", os.O_WRONLY),
    "make in the source": lambda: write("/source/new"),
    "change a mode in the source": lambda: os.chmod("/source/file", 0o777, dir_fd=at),
    "remove from the source": lambda: os.unlink("/source/file", dir_fd=at),
    "link from the source": lambda: os.link("/source/file", "/target/linked", src_dir_fd=at, dst_dir_fd=at),
    "make a disk": lambda: os.mknod("/target/disk", 0o060600, os.makedev(254, 0), dir_fd=at),
    "make a terminal": lambda: os.mknod("/target/null", 0o020600, os.makedev(1, 3), dir_fd=at),
    "make a socket": lambda: os.mknod("/target/socket", 0o140600, 0, dir_fd=at),
    "give to a stranger": lambda: os.chown("/target/file", 70000, 0, dir_fd=at),
    "give to the host's root": lambda: os.chown("/target/file", 2**32 - 2, 0, dir_fd=at),
    "set a capability": lambda: os.setxattr(os.open("/target/file", os.O_RDONLY), "security.capability", b"\\1\\0\\0\\2" + b"\\xff" * 16),
    "set a trusted attribute": lambda: os.setxattr(os.open("/target/file", os.O_RDONLY), "trusted.overlay.redirect", b"/"),
    "write beyond the limit": too_long,
    "take memory": lambda: bytearray(1 << 30) and None,
    "make code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close(),
    "import what was unpacked": planted,
    "fork": lambda: raw("fork") if "fork" in numbers else raw("clone", 17, 0, 0, 0, 0),
    "clone a namespace": lambda: raw("clone", 0x10000011, 0, 0, 0, 0),
    "clone3": lambda: raw("clone3", bytes(88), 88),
    "execute": lambda: raw("execve", b"/target/file", 0, 0),
    "execute by descriptor": lambda: raw("execveat", 3, b"", 0, 0, 0x1000),
    "kill the host's process": lambda: raw("kill", host, 9),
    "kill everything": lambda: raw("kill", 2**64 - 1, 9),
    "stop its parent": lambda: raw("tgkill", 1, 1, 19),
    "find a process": lambda: raw("pidfd_open", host, 0),
    "trace": lambda: raw("ptrace", 16, host, 0, 0),
    "read another's memory": lambda: raw("process_vm_readv", host, 0, 0, 0, 0, 0),
    "unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "internet socket": lambda: socket.socket(socket.AF_INET).close(),
    "netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "mount": lambda: raw("mount", b"x", b"/target", b"tmpfs", 0, 0),
    "unmount": lambda: raw("umount2", b"/target", 2),
    "remount writable": lambda: raw("mount", 0, b"/source", 0, 0x1020, 0),
    "copy a mount": lambda: raw("open_tree", 2**64 - 100, b"/target", 1),
    "file system by the new calls": lambda: raw("fsopen", b"tmpfs", 0),
    "change the root": lambda: raw("chroot", b"/target"),
    "pivot": lambda: raw("pivot_root", b".", b"."),
    "enter a namespace": lambda: raw("setns", 0, 0),
    "new namespaces": lambda: raw("unshare", 0x10000000),
    "open by handle": lambda: raw("open_by_handle_at", 3, bytes(64), 0),
    "become another": lambda: raw("setresuid", 1000, 1000, 1000),
    "take capabilities": lambda: raw("capset", bytes(8), bytes(24)),
    "raise a limit": lambda: raw("prlimit64", 0, 1, 0, 0),
    "keys": lambda: raw("keyctl", 0, 0, 0, 0, 0),
    "bpf": lambda: raw("bpf", 0, 0, 0),
    "io_uring": lambda: raw("io_uring_setup", 1, bytes(128)),
    "userfaultfd": lambda: raw("userfaultfd", 0),
    "perf": lambda: raw("perf_event_open", bytes(128), 0, 0, 0, 0),
    "ioctl": lambda: raw("ioctl", 1, 0x5413, bytes(8)),
    "memfd": lambda: raw("memfd_create", b"x", 0),
    "another filter": lambda: raw("seccomp", 1, 0, 0),
    "no more no_new_privs": lambda: raw("prctl", 38, 0, 0, 0, 0),
}
for name, work in attacks.items():
    say[name] = attempt(work)
main.say(**say)
"""


def attempts(target: Path, source: Path) -> dict[str, str]:
    """Every attempt by name: ``done``, or the name of the error that it met."""
    package = Path(jailed.__file__).parents[1]
    library = str(Path(json.__file__).parents[1])
    argv = [sys.executable, "-I", "-S", "-c", _PRISONER, str(package.parent), str(package), library]
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env={}, cwd="/"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    places = [
        {"path": str(target), "at": "/target", "write": True},
        {"path": str(source), "at": "/source"},
    ]
    told = {"places": places, "limits": list(SMALL), "numbers": table(), "host": process.pid}
    with process, process.stdin, process.stdout:
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"type": "map"}
        idmap.apply(process.pid, UID_BASE)
        process.stdin.write(b".")
        process.stdin.flush()
        answers: dict[str, str] = json.loads(process.stdout.readline())
        assert process.wait(10) == 0
    return answers
