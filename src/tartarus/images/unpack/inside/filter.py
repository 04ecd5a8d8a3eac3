"""The jailed child's system call filter: what it takes to read a stream and fill a directory, and nothing else."""

from __future__ import annotations

import struct

from tartarus.images.unpack.inside.calls import number

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOWED = """
read write close fstat lseek munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 pwrite64 readv
writev sched_yield mremap madvise dup getpid exit fcntl ftruncate fchmod fchown umask gettimeofday getuid getgid
geteuid getegid sigaltstack gettid lsetxattr fsetxattr lgetxattr fgetxattr llistxattr flistxattr futex getdents64
restart_syscall fadvise64 clock_gettime clock_nanosleep exit_group openat mkdirat mknodat fchownat newfstatat
unlinkat linkat symlinkat readlinkat fchmodat set_robust_list utimensat getrandom statx rseq
"""
# Memory may be had, but none that code could be put into.
_WITHOUT_EXEC = ("mmap", "mprotect")
_PROT_EXEC = 4
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_AT_NUMBER, _AT_ARCH, _AT_THIRD_ARGUMENT = 0, 4, 32
_KILL, _ALLOW, _REFUSE = 0x80000000, 0x7FFF0000, 0x00050001  # the last: EPERM
_X32 = 0x40000000


def seccomp_filter(machine: str) -> bytes:
    """An array of struct sock_filter. KeyError for an architecture without numbers."""
    code = [
        (_LOAD, 0, 0, _AT_ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for name in _ALLOWED.split():
        code += [(_EQUAL, 0, 1, number(name, machine)), (_RETURN, 0, 0, _ALLOW)]
    for name in _WITHOUT_EXEC:
        code += [
            (_EQUAL, 0, 5, number(name, machine)),
            (_LOAD, 0, 0, _AT_THIRD_ARGUMENT),
            (_AND, 0, 0, _PROT_EXEC),
            (_EQUAL, 0, 1, 0),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _REFUSE),
        ]
    code.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
