"""The egress proxy's process: locks itself in before it reads a byte of a sandbox's, and serves.

It keeps what it needs: its listening sockets, its word with the daemon, and TCP to others in the router's network
namespace. It has an empty root, no capability, a user of its own, and a system call filter; the daemon's end, however
that comes, is its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import encodings.idna  # noqa: F401 - TLS loads it by name, when there is nothing to load from any more
import errno
import fcntl
import gc
import os
import resource
import socket
import ssl
import sys
import termios

from tartarus.guest.syscalls import machine, table
from tartarus.images.unpack.inside import jail
from tartarus.network.certificates import ca_bundle
from tartarus.network.egress.server import Server
from tartarus.runtimes.confine.bpf import ALLOW, Branch, Match, Rule, assemble, refuse

_SETTING_IDS = 1 << 6 | 1 << 7  # CAP_SETGID, CAP_SETUID
_MEMORY_BYTES = 2 << 30
_ALLOWED = """
read write readv writev close lseek fstat munmap brk mremap madvise futex rt_sigaction rt_sigprocmask rt_sigreturn
sigaltstack restart_syscall epoll_wait epoll_pwait epoll_ctl connect accept accept4 getsockname getpeername
getsockopt setsockopt sendto sendmsg recvfrom recvmsg shutdown fcntl getrandom clock_gettime clock_nanosleep
gettimeofday exit exit_group getpid gettid getuid geteuid getgid getegid sched_yield set_robust_list rseq poll ppoll
"""
_STREAM_TYPES = 0xF
_REFUSED = refuse(errno.EPERM)


def proxy_filter(arch: str) -> bytes:
    """Its system call filter, as an array of struct sock_filter. What is not there is refused with EPERM."""
    no_code: Rule = Branch(Match(2, (0,), mask=4), ALLOW, _REFUSED)  # PROT_EXEC
    rules: dict[str, Rule] = dict.fromkeys(_ALLOWED.split(), ALLOW)
    stream: Rule = Branch(Match(1, (socket.SOCK_STREAM,), mask=_STREAM_TYPES), ALLOW, _REFUSED)
    rules |= {
        "mmap": no_code, "mprotect": no_code,
        "socket": Branch(Match(0, (socket.AF_INET,)), stream, _REFUSED),
        "ioctl": Branch(Match(1, (termios.FIONBIO,)), ALLOW, _REFUSED),
    }  # fmt: skip
    numbers = table(arch)
    return assemble(arch, {numbers[name]: rule for name, rule in rules.items() if name in numbers}, _REFUSED)


def confine(uid: int) -> None:
    """Lock this process in. Raises OSError with the failing step's name as `filename`."""
    for which, most in ((resource.RLIMIT_CORE, 1), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, _MEMORY_BYTES)):
        resource.setrlimit(which, (most, most))
    jail.build_root()
    jail.drop_capabilities(_SETTING_IDS)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    jail.drop_capabilities(0)
    jail.hide_memory()
    jail.enter_landlock(connect=True)
    jail.forget_modules()
    jail.install_filter(proxy_filter(machine()))


def main(uid: int, control: int, asked: int, led: int) -> None:
    """Serve on these descriptors as that user, until the daemon's end of `control` closes."""
    for descriptor in (control, asked, led):
        fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    bundle = ca_bundle(os.environ)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if bundle is not None:  # without, no server proves who it is, and no credential leaves
        context.load_verify_locations(cadata=bundle.decode("ascii"))
    loop = asyncio.new_event_loop()
    gc.freeze()
    os.environ.clear()
    confine(uid)

    async def serve() -> None:
        word, *listening = (socket.socket(fileno=number) for number in (control, asked, led))
        await Server(word, listening[0], listening[1], context).ended

    with contextlib.suppress(KeyboardInterrupt):
        loop.run_until_complete(serve())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
