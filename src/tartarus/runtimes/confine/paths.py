"""Host paths that a process-level guest may use: what programs need to run, and nothing that tells of others.

There is no mount namespace at that level, so this list is what separates a program from the host's files.
`/etc` is given name by name: it also holds tokens (npmrc, pip.conf), keys and host identities. Of `/proc` only
files about the machine, not the processes' directories: command lines of the whole host stand there. That
costs `/proc/self`, too; programs cope (see tests/confine/test_programs.py). `/dev/pts` holds the user's own
terminals, so it is open only to a sandbox with a user id of its own. `/dev/shm` is shared by the whole host.
"""

from __future__ import annotations

import glob
import os
from functools import cache
from typing import Final

_RUN: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/nix/store", "/gnu/store")

_READ: Final = (
    *(f"/etc/{name}" for name in (
        "ImageMagick-*", "alternatives", "bash.bashrc", "ca-certificates", "crypto-policies", "debian_version", "fonts",
        "gai.conf", "group", "host.conf", "hosts", "inputrc", "java*", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
        "locale.alias", "locale.conf", "localtime", "magic", "magic.mime", "matplotlibrc", "mime.types", "networks",
        "nsswitch.conf", "os-release", "passwd", "perl", "pki/ca-trust", "pki/tls", "profile", "profile.d", "protocols",
        "python3*", "services", "shells", "ssl/certs", "ssl/openssl.cnf", "system-release", "terminfo", "texmf",
        "timezone", "vim", "xattr.conf",
    )),
    *(f"/proc/{name}" for name in (
        "cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "sys", "uptime", "version", "vmstat",
    )),
    "/run/systemd/resolve/stub-resolv.conf",
    "/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/kernel/mm/transparent_hugepage",
    "/var/cache/fontconfig", "/var/lib/ca-certificates",
)  # fmt: skip

DEVICES: Final = ("/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero")
TERMINALS: Final = ("/dev/ptmx", "/dev/pts")


def _present(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The paths of this host that match; a link into another of the list needs no rule of its own."""
    found = sorted({path for pattern in patterns for path in glob.glob(pattern)})
    kept = [path for path in found if not (os.path.islink(path) and os.path.realpath(path).startswith("/usr/"))]
    return tuple(kept)


@cache
def runnable() -> tuple[str, ...]:
    """Directories of programs and libraries. Looked up once: a host does not change its layout under a daemon."""
    return _present(_RUN)


@cache
def readable() -> tuple[str, ...]:
    """Settings and facts of the machine."""
    return _present(_READ)
