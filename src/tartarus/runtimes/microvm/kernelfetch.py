"""Fetches Debian's cloud kernel with the host's own apt, which knows where from and whose signatures count.

apt checks the mirror's signature, and the package against it. What is taken over is then checked once more, as the
bytes that are installed: apt's download runs as another user, who owns the directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tartarus.model.errors import InvalidRequest, IsolationUnavailable
from tartarus.runtimes.microvm.deb import MAX_UNPACKED

_META = {"x86_64": "linux-image-cloud-amd64", "aarch64": "linux-image-cloud-arm64"}
_ASK_TIMEOUT_S = 60
_FETCH_TIMEOUT_S = 900
_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
_DEPENDS = re.compile(r"(linux-image-[0-9][a-z0-9.+-]{0,80}) \(= ([A-Za-z0-9.+~:-]{1,80})\)")
_COPY = 1024 * 1024


class Listed(NamedTuple):
    """A package as the mirror's signed list has it. `size`: bytes; `digest`: SHA-256."""

    name: str
    version: str
    size: int
    digest: str


@contextlib.contextmanager
def fetched() -> Iterator[Path]:
    """The package of the newest cloud kernel, in a directory of its own that goes afterwards.

    Raises IsolationUnavailable where there is no apt or no such package, InvalidRequest when it is not what was listed.
    """
    listed = _newest()
    with tempfile.TemporaryDirectory(prefix="tartarus-kernel-") as outer:
        download = Path(outer) / "download"
        download.mkdir()
        with contextlib.suppress(KeyError, PermissionError):
            # apt gives up root for the download, and can only if that user may write here.
            owner = pwd.getpwnam("_apt").pw_uid
            os.chmod(outer, 0o711)
            os.chown(download, owner, -1)
        _apt("apt-get", "-q", "download", f"{listed.name}={listed.version}", cwd=download, timeout_s=_FETCH_TIMEOUT_S)
        package = Path(outer) / f"{listed.name}_{listed.version}.deb"
        _take(download, listed, package)
        yield package


def parse_stanza(text: str) -> dict[str, str]:
    """The first paragraph of what `apt-cache show` prints, its one-line fields."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            break
        name, colon, value = line.partition(": ")
        if colon and not line[0].isspace():
            fields.setdefault(name, value.strip())
    return fields


def _newest() -> Listed:
    meta = _META.get(platform.machine())
    if meta is None or shutil.which("apt-get") is None:
        raise IsolationUnavailable(
            "this host has no kernel package that is known here",
            why="only Debian's cloud kernel is fetched, by apt",
            fix="tartarus kernel install FILE: a Debian kernel package, a bzImage or a vmlinux",
        )
    depends = parse_stanza(_apt("apt-cache", "show", "--no-all-versions", meta)).get("Depends", "")
    found = _DEPENDS.search(depends)
    if found is None:
        raise IsolationUnavailable(
            f"{meta} names no kernel", why=depends[:200] or "apt does not know it", fix="apt-get update, or give a file"
        )
    name, version = found[1], found[2]
    fields = parse_stanza(_apt("apt-cache", "show", f"{name}={version}"))
    size, digest = fields.get("Size", ""), fields.get("SHA256", "")
    if not size.isdigit() or int(size) > MAX_UNPACKED or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise IsolationUnavailable(f"apt's list does not describe {name}", fix="apt-get update")
    return Listed(name, version, int(size), digest)


def _take(download: Path, listed: Listed, target: Path) -> None:
    """Copy what was downloaded to a file of ours, and check that copy."""
    names = [name for name in os.listdir(download) if name.endswith(".deb")]
    if len(names) != 1:
        raise InvalidRequest(f"apt did not fetch {listed.name}", why=f"{len(names)} files came")
    held = os.open(download / names[0], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    seen, left = hashlib.sha256(), listed.size + 1
    with os.fdopen(held, "rb") as source, target.open("xb") as copy:
        while left and (piece := source.read(min(left, _COPY))):
            seen.update(piece)
            copy.write(piece)
            left -= len(piece)
    if left != 1 or seen.hexdigest() != listed.digest:
        raise InvalidRequest(
            f"{listed.name} is not what the mirror's signed list says",
            why="another size or SHA-256",
            fix="apt-get update",
        )


def _apt(*argv: str, cwd: Path | None = None, timeout_s: float = _ASK_TIMEOUT_S) -> str:
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=_ENV, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise IsolationUnavailable(f"{argv[0]} failed", why=str(error)[:300]) from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise IsolationUnavailable(f"{' '.join(argv[:2])} failed", why=said, fix="apt-get update, or give a file")
    return done.stdout.decode("utf-8", "replace")
