"""The root file system around the host's /usr: what common programs expect to find, and nothing personal."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from tartarus.images.entries import Entry, directory, symlink, text
from tartarus.images.hostfiles import host_etc
from tartarus.images.interpreter import Interpreter
from tartarus.images.paths import OWN, OWN_BIN, RUNNER

_TOP_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DIRECTORIES = (
    "/boot", "/dev", "/etc", "/home", "/media", "/mnt", "/opt", "/proc", "/run", "/run/lock", "/srv", "/sys", "/usr",
    "/var", "/var/cache", "/var/lib", "/var/local", "/var/log", "/var/mail", "/var/opt", "/var/spool", "/work",
)  # fmt: skip
_STICKY = 0o1777
USER_ID = 1000

# Our own words where the host's file could carry something private, or is not about the sandbox.
HOSTS = """\
127.0.0.1 localhost sandbox
::1 localhost ip6-localhost ip6-loopback
"""
_NSSWITCH = """\
passwd: files
group: files
hosts: files dns
networks: files
protocols: files
services: files
ethers: files
rpc: files
"""
_OPENSSL = """\
# Enough for `openssl req` and its kin; providers and engines are OpenSSL's own defaults.
[req]
distinguished_name = subject
x509_extensions = v3_ca
string_mask = utf8only
[subject]
commonName = Common Name
[v3_ca]
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always,issuer
basicConstraints = critical,CA:true
"""
_PROFILE = """\
if [ -n "${BASH_VERSION-}" ]; then
    PS1='\\u@sandbox:\\w\\$ '
else
    PS1='$ '
fi
"""


def _accounts(shell: str) -> list[Entry]:
    passwd = (
        f"root:x:0:0:root:/root:{shell}\n"
        f"user:x:{USER_ID}:{USER_ID}:user:/home/user:{shell}\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    )
    group = f"root:x:0:\ntty:x:5:\nuser:x:{USER_ID}:\nnogroup:x:65534:\n"
    return [text("/etc/passwd", passwd), text("/etc/group", group), text("/etc/shells", f"/bin/sh\n{shell}\n")]


def _own_etc(host: Path) -> list[Entry]:
    shell = "/bin/bash" if (host / "bin/bash").exists() else "/bin/sh"
    return [
        *_accounts(shell),
        text("/etc/hosts", HOSTS),
        text("/etc/hostname", "sandbox\n"),
        text("/etc/host.conf", "multi on\n"),
        text("/etc/nsswitch.conf", _NSSWITCH),
        text("/etc/resolv.conf", ""),
        text("/etc/machine-id", ""),
        text("/etc/fstab", ""),
        text("/etc/profile", _PROFILE),
        text("/etc/bash.bashrc", _PROFILE),
        text("/etc/ssl/openssl.cnf", _OPENSSL),
        *([text("/etc/pki/tls/openssl.cnf", _OPENSSL)] if (host / "etc/pki/tls").is_dir() else []),
        symlink("/etc/mtab", "/proc/self/mounts"),
    ]


def _top(host: Path) -> tuple[list[Entry], list[tuple[str, str]]]:
    """/bin and its kin: the same links as on the host, or, where they are real directories, read-only binds."""
    entries: list[Entry] = []
    binds: list[tuple[str, str]] = []
    for name in _TOP_LINKS:
        place = host / name
        if place.is_symlink():
            entries.append(symlink(f"/{name}", os.readlink(place)))
        elif place.is_dir():
            entries.append(directory(f"/{name}"))
            binds.append((f"/{name}", f"/{name}"))
    return entries, binds


def _own(interpreter: Interpreter) -> list[Entry]:
    runner = resources.files("tartarus").joinpath("guest", "runner.py").read_bytes()
    entries = [directory(OWN), Entry(RUNNER, "file", 0o644, content=runner)]
    if interpreter.bind:
        entries.append(directory(interpreter.bind))
        entries += [symlink(f"{OWN_BIN}/{name}", interpreter.path) for name in ("python3", "python")]
    return entries


def skeleton(interpreter: Interpreter, host: Path = Path("/")) -> tuple[list[Entry], tuple[tuple[str, str], ...]]:
    """The entries of a root file system for this host, and the read-only binds (host path, path) it needs.

    An entry of our own comes before one of the host's for the same path, and wins.
    """
    top, binds = _top(host)
    entries = [directory(path) for path in _DIRECTORIES]
    entries += [
        directory("/root", 0o700),
        directory("/home/user", 0o755, uid=USER_ID),
        directory("/tmp", _STICKY),  # noqa: S108 - the sandbox's, not ours
        directory("/var/tmp", _STICKY),  # noqa: S108
        symlink("/var/run", "/run"),
        symlink("/var/lock", "/run/lock"),
        *top,
        *_own_etc(host),
        *host_etc(host / "etc"),
        *_own(interpreter),
    ]
    shown = [("/usr", "/usr"), *binds]
    if interpreter.bind:
        shown.append((interpreter.bind, interpreter.bind))
    return entries, tuple(shown)
