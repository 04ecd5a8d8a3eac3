"""What a sandbox may see of the host's /etc: public files by name, never a secret.

The list says what to take; everything else stays out. On top of it, a file is refused, listed or not, when
not everyone on the host may read it, when a directory above it is closed, when its name speaks of a secret,
or when it holds a private key.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from tartarus.images.entries import Entry, directory, symlink

# What programs of /usr expect to find. Deliberately not: ld.so.preload, environment, gitconfig, pip.conf,
# npmrc, wgetrc, shadow, ssh, hosts, resolv.conf, machine-id, fstab.
FILES = (
    "ld.so.cache", "os-release", "debian_version", "alpine-release", "fedora-release", "redhat-release",
    "localtime", "timezone", "locale.alias", "protocols", "services", "rpc", "mime.types",
    # Debian's R keeps these outside /usr, and does not start without; its site files may hold passwords, and stay out.
    "R/ldpaths", "R/Renviron", "R/Makeconf", "R/repositories",
)  # fmt: skip
TREES = (
    "alternatives", "ssl/certs", "pki/tls/certs", "pki/ca-trust/extracted", "crypto-policies/back-ends", "fonts",
)  # fmt: skip
TREE_PATTERNS = ("java-*-openjdk",)
FILE_PATTERNS = ("ld-musl-*.path",)

_LARGEST = 8 * 1024**2
_SECRET_NAME = re.compile(
    r"passw|secret|credential|shadow|token|private|keystore|netrc|\.key$|\.p12$|\.pfx$", re.IGNORECASE
)
_SHOWN = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib32/", "/lib64/", "/libx32/")


def host_etc(etc: Path = Path("/etc")) -> list[Entry]:
    """The public files of the host's /etc, as entries below the sandbox's /etc."""
    found = [entry for name in FILES for entry in _file(etc, etc / name)]
    for pattern in FILE_PATTERNS:
        found += [entry for path in sorted(etc.glob(pattern)) for entry in _file(etc, path)]
    trees = [etc / name for name in TREES]
    for pattern in TREE_PATTERNS:
        trees += sorted(etc.glob(pattern))
    found += [entry for tree in trees for entry in _tree(etc, tree)]
    return found


def _inside(etc: Path, path: Path) -> str:
    return f"/etc/{path.relative_to(etc)}"


def _tree(etc: Path, top: Path) -> Iterator[Entry]:
    if not _open_directory(top) or top.is_symlink():
        return
    yield directory(_inside(etc, top))
    for path in sorted(top.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _tree(etc, path)
        else:
            yield from _file(etc, path)


def _file(etc: Path, path: Path) -> Iterator[Entry]:
    if path.is_symlink():
        target = os.readlink(path)
        if _leads_to_shown(_inside(etc, path), target) or _leads_beside(path, target):
            yield symlink(_inside(etc, path), target)
            return
    content = public_content(path)
    if content is not None:
        yield Entry(_inside(etc, path), "file", 0o644, content=content)


def _leads_to_shown(inside: str, target: str) -> bool:
    """Whether a link such as ../usr/lib/os-release ends, in the sandbox, below a directory that sandboxes see."""
    return os.path.normpath(os.path.join(os.path.dirname(inside), target)).startswith(_SHOWN)


def _leads_beside(path: Path, target: str) -> bool:
    """Whether a link leads to a name in its own directory, as the hash links of certificates do."""
    return "/" not in target and public_content(path) is not None


def _open_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode) and bool(os.stat(path).st_mode & stat.S_IXOTH)
    except OSError:
        return False


def public_content(path: Path) -> bytes | None:
    """The bytes of a file that everyone on the host may read and that is no secret; None for all others."""
    try:
        real = path.resolve(strict=True)
        status = os.stat(real)
        readable = stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IROTH and status.st_size <= _LARGEST
        if not readable or not all(_open_directory(parent) for parent in real.parents):
            return None
        if _SECRET_NAME.search(path.name) or _SECRET_NAME.search(real.name):
            return None
        content = real.read_bytes()
    except (OSError, RuntimeError):
        return None
    return None if b"PRIVATE KEY" in content else content
