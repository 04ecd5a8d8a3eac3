"""Which system calls exist inside a sandbox: the tables behind the seccomp filter.

Allow-lists, so a call that a future kernel adds is refused until someone has thought about it. A name
in no table gets ENOSYS, as on a kernel built without it: programs and libraries have fallbacks for that
(glibc for clone3 and openat2, libuv and liburing for io_uring, Mesa for kcmp). DENIED holds those that
an ordinary user on an ordinary kernel is refused with EPERM, and that programs expect to fail so.

Left out on purpose, beyond the obvious: io_uring and the older aio (long histories of kernel bugs, and
io_uring's operations bypass filters), vmsplice, remap_file_pages, NUMA placement (reveals and disturbs the
host), process_madvise, kcmp, memfd_secret (memory the host can't inspect), modify_ldt, keyrings
(not namespaced), userfaultfd (turns kernel races into reliable exploits), new mount listing calls.
"""

from __future__ import annotations

from typing import Final

_FILES = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 close close_range lseek
sendfile splice tee copy_file_range readahead fadvise64 fallocate ftruncate truncate fsync fdatasync
sync syncfs sync_file_range flock dup dup2 dup3 fcntl pipe pipe2 memfd_create umask
stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
getdents getdents64 getcwd chdir fchdir rename renameat renameat2 link linkat symlink symlinkat
unlink unlinkat rmdir getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
inotify_init inotify_init1 inotify_add_watch inotify_rm_watch
"""

_METADATA = """
chown lchown fchown fchownat utime utimes futimesat utimensat
setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
"""

_MEMORY = """
brk mmap munmap mremap mprotect madvise mincore msync mlock mlock2 munlock mlockall munlockall mseal
pkey_alloc pkey_free pkey_mprotect membarrier map_shadow_stack
"""

_PROCESSES = """
fork vfork execve execveat exit exit_group wait4 waitid restart_syscall getpid getppid gettid
getpgid getpgrp setpgid getsid setsid kill tkill tgkill pidfd_open pidfd_send_signal
rt_sigaction rt_sigprocmask rt_sigpending rt_sigsuspend rt_sigtimedwait rt_sigreturn rt_sigqueueinfo
rt_tgsigqueueinfo sigaltstack pause arch_prctl set_tid_address set_robust_list get_robust_list rseq
futex futex_waitv futex_wake futex_wait futex_requeue
sched_yield sched_getaffinity sched_setaffinity sched_getparam sched_setparam sched_getscheduler
sched_setscheduler sched_getattr sched_setattr sched_get_priority_max sched_get_priority_min
sched_rr_get_interval getpriority setpriority ioprio_get ioprio_set
getrlimit getrusage times sysinfo uname getcpu getrandom seccomp
landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""

_IDENTITY = """
getuid geteuid getgid getegid getresuid getresgid getgroups setuid setgid setreuid setregid
setresuid setresgid setgroups setfsuid setfsgid capget capset
"""

_TIME = """
time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep alarm getitimer setitimer
timer_create timer_settime timer_gettime timer_getoverrun timer_delete
timerfd_create timerfd_settime timerfd_gettime
"""

_WAITING = """
poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
eventfd eventfd2 signalfd signalfd4
"""

_SOCKETS = """
sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg shutdown getsockname getpeername getsockopt
"""

_NAMING_SOCKETS = "bind connect listen accept accept4"

_SYSTEM_V = """
shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
"""

_DENIED = """
mount umount2 move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick mount_setattr
pivot_root chroot unshare setns open_by_handle_at name_to_handle_at
ptrace process_vm_readv process_vm_writev pidfd_getfd perf_event_open bpf userfaultfd
init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff
acct quotactl quotactl_fd syslog vhangup fanotify_init lookup_dcookie
settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname iopl ioperm
"""

_ORDINARY = """
name_to_handle_at ptrace process_vm_readv process_vm_writev acct quotactl quotactl_fd syslog vhangup lookup_dcookie
settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname
"""

COMMON: Final = frozenset(f"{_FILES} {_MEMORY} {_PROCESSES} {_IDENTITY} {_TIME} {_WAITING} {_SOCKETS}".split())
"""Allowed at every level, whatever the arguments."""

METADATA: Final = frozenset(_METADATA.split())
"""Owners, times and extended attributes of files; Landlock does not mediate them."""

NAMING_SOCKETS: Final = frozenset(_NAMING_SOCKETS.split())
"""Calls that give a socket an address or find one by it."""

SYSTEM_V: Final = frozenset(_SYSTEM_V.split())
"""Objects named in the IPC namespace; they outlive processes, so only a level with a namespace has them."""

DENIED: Final = frozenset(_DENIED.split())
"""Refused with EPERM at every level."""

ESCAPES: Final = DENIED - frozenset(_ORDINARY.split())
"""Of those, what an escape begins with, and a program that was not written to run as root has no use for."""
