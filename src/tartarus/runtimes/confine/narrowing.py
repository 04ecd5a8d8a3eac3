"""A profile over a level's filter: what both allow. Never wider: a call that the level refuses stays refused.

The guest's agent lives behind the same filter, so `AGENT` is a part of every profile.
"""

from __future__ import annotations

import errno
from typing import Final

from tartarus.model.security import SeccompAction
from tartarus.runtimes.confine import calls
from tartarus.runtimes.confine.bpf import ASK, Rule, Verdict, refuse
from tartarus.runtimes.hardening import Hardening

_AGENT_WORDS = """
read write readv writev pread64 pwrite64 lseek close close_range stat lstat fstat newfstatat statx statfs fstatfs
access faccessat faccessat2 readlink readlinkat getcwd chdir open openat unlink unlinkat rename renameat renameat2
mkdir mkdirat rmdir linkat fchmod fchmodat ftruncate getdents64 splice umask fsync pipe pipe2 dup dup2
dup3 fcntl ioctl poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait signalfd4 socketpair
sendto sendmsg recvfrom recvmsg shutdown setsockopt mmap mprotect munmap mremap madvise brk rt_sigaction
rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack clone fork vfork execve execveat exit exit_group wait4
waitid kill tgkill getpid getppid gettid getpgid getpgrp getsockname getsockopt getuid geteuid getgid getegid setsid
prctl arch_prctl set_tid_address set_robust_list rseq futex prlimit64 getrandom clock_gettime clock_nanosleep
nanosleep restart_syscall sched_getaffinity pidfd_open memfd_create uname getrusage
"""
AGENT: Final = frozenset(_AGENT_WORDS.split())
"""What the agent and the warm interpreter beside it call to run programs and move files: no sockets but pairs."""
_FEATURES_WORDS = """
socket connect bind listen accept4 inotify_init1 inotify_add_watch inotify_rm_watch
"""
FEATURES: Final = frozenset(_FEATURES_WORDS.split())
"""What the agent calls for forwarded ports and watched files: where a profile lacks it, such fail, and no more."""
_FALLS_BACK_WORDS = """
clone3 openat2 io_uring_setup io_setup mbind set_mempolicy get_mempolicy set_mempolicy_home_node kcmp memfd_secret
statmount listmount cachestat setxattrat getxattrat listxattrat removexattrat file_getattr file_setattr
process_madvise
"""
FALLS_BACK: Final = frozenset(_FALLS_BACK_WORDS.split())
"""What libraries try where it is there, and do without elsewhere: never a reason to end a program."""

_NONE: Final = refuse(errno.ENOSYS)
_REFUSED: Final = refuse(errno.EPERM)
_ACTIONS: Final = {
    SeccompAction.ERRNO: _REFUSED,
    SeccompAction.TRAP: Verdict(0x0003_0000),
    SeccompAction.KILL: Verdict(0x8000_0000),  # the whole process
}


def narrowed(named: dict[str, Rule], hardening: Hardening, default: Rule) -> tuple[dict[str, Rule], Rule]:
    """The rules by name, and that of a call without one, as the hardening leaves them.

    What a level judges by arguments is judged so still, with the level's own errors.
    """
    if not hardening.filters:
        return named, default
    action = _ACTIONS[hardening.default]
    strict = hardening.default is not SeccompAction.ERRNO
    allowed = None if hardening.calls is None else AGENT | frozenset(hardening.calls)
    found: dict[str, Rule] = {}
    for name, rule in named.items():
        if rule == ASK and name in calls.ESCAPES:
            found[name] = rule  # whoever listens tells of it, and refuses it
        elif is_refused(rule):
            found[name] = action if strict else rule
        elif allowed is None or name in allowed:
            found[name] = rule
        else:
            found[name] = action
    found |= {name: _REFUSED for name in FEATURES if found.get(name) is action}
    found |= {name: _NONE for name in FALLS_BACK if found.get(name, action) is action}
    return found, action if strict else default


def is_refused(rule: Rule) -> bool:
    """Whether a call always fails as one that is not permitted; other errors are those of what is not there."""
    return rule == _REFUSED
