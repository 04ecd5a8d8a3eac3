"""Built-in profiles, for the roadmap's classes of work: each allows what the one before does, and more.

All are below the container level's own list, and `AGENT` (narrowing.py) is a part of each. They were found by
recording what such work calls (`tartarus seccomp record`), and are tested with real sandboxes.
"""

from __future__ import annotations

from typing import Final

from tartarus.runtimes.confine import calls

_EMBER_WORDS = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek sendfile copy_file_range fadvise64
ftruncate truncate fsync fdatasync fallocate flock umask memfd_create readahead stat fstat lstat newfstatat statx
statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir rename
renameat renameat2 link linkat symlink symlinkat unlink unlinkat rmdir mkdir mkdirat open openat creat chmod fchmod
fchmodat fchmodat2 utime utimes utimensat futimesat getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr brk
mmap munmap mremap mprotect madvise mincore msync membarrier pkey_alloc pkey_free pkey_mprotect fork vfork clone
execve execveat wait4 waitid kill tkill tgkill getpid getppid gettid getpgid getpgrp setpgid getsid setsid
rt_sigaction rt_sigprocmask rt_sigpending rt_sigsuspend rt_sigtimedwait rt_sigreturn sigaltstack pause arch_prctl
prctl set_tid_address set_robust_list get_robust_list rseq futex futex_waitv sched_yield sched_getaffinity
sched_getparam sched_getscheduler getpriority setpriority getrlimit setrlimit prlimit64 getrusage times sysinfo
uname getcpu getrandom personality getuid geteuid getgid getegid getresuid getresgid getgroups capget time
gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep alarm getitimer setitimer timer_create
timer_settime timer_gettime timer_getoverrun timer_delete timerfd_create timerfd_settime timerfd_gettime poll ppoll
select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd
signalfd4 ioctl fcntl dup dup2 dup3 pipe pipe2 close close_range chown lchown fchown fchownat getsockname getsockopt
setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
"""
_EMBER: Final = frozenset(_EMBER_WORDS.split())
_FLAME_WORDS = """
socketpair sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg shutdown getpeername setsockopt mknod mknodat splice
tee sync syncfs sync_file_range pidfd_open pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo inotify_init
inotify_init1 inotify_add_watch inotify_rm_watch sched_setaffinity setuid setgid setreuid setregid setresuid
setresgid setgroups setfsuid setfsgid
"""
_FLAME: Final = _EMBER | frozenset(_FLAME_WORDS.split())
_BLAZE: Final = _FLAME | frozenset({"socket"}) | calls.NAMING_SOCKETS
_EXAMINE_WORDS = """
preadv preadv2 fadvise64 readahead getdents fchdir getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr mincore
getresuid getresgid getgroups getrlimit getpriority times sysinfo time gettimeofday clock_getres sched_yield
get_robust_list capget
"""
_EXAMINE: Final = frozenset(_EXAMINE_WORDS.split())

BUILT_IN: Final[dict[str, tuple[str, frozenset[str] | None]]] = {
    "ember": ("small work on its own files: no sockets, no watches, no other users", _EMBER),
    "flame": ("programs that talk among themselves, become other users, watch files", _FLAME),
    "blaze": ("servers and clients: sockets of the families that the level allows", _BLAZE),
    "inferno": ("heavy work: all that the level allows, shared memory and pinned pages included", None),
    "examine": ("what looks at the evidence of a quarantined sandbox: reads files, and talks to nobody", _EXAMINE),
}
"""Name to what it is for and its calls; None is every call of the level's."""


def built_in(name: str) -> tuple[str, ...] | None:
    """The calls of a built-in profile, sorted; None for all of the level's. Raises LookupError."""
    allowed = BUILT_IN[name][1]
    return None if allowed is None else tuple(sorted(allowed))
