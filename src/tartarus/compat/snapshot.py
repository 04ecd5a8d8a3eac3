"""A containerd snapshot as a tar: `python -m tartarus.compat.snapshot` mounts it where nobody else sees it.

The mount is read-only, in a mount namespace of the process's own, and goes with it however that ends. What is read
there is hostile, and live: every name is opened below its directory's descriptor, and no link is followed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NamedTuple

from tartarus.compat.engines import shown
from tartarus.images import rootfs
from tartarus.model.errors import EngineFailed, TartarusError

_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_SAFE = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
# It is there on every host, and in our own mount namespace nobody misses it.
_PLACE = "/proc"


class _Mount(NamedTuple):
    kind: str
    directories: tuple[str, ...]


def archive_argv(mounts: str) -> list[str]:
    """What runs this module for a snapshot, from what ``ctr snapshots mounts`` printed. Raises EngineFailed."""
    found = _parsed(mounts)
    return [sys.executable, "-P", "-m", "tartarus.compat.snapshot", found.kind, *found.directories]


def _parsed(text: str) -> _Mount:
    """``mount -t overlay overlay /mnt -o lowerdir=…,upperdir=…``, or a bind mount of one directory."""
    lines = text.strip().splitlines()
    words = lines[0].split(" ") if len(lines) == 1 else []
    if len(words) != 7 or words[:2] != ["mount", "-t"] or words[5] != "-o":
        raise EngineFailed("containerd's snapshot can't be read", why=f"its mounts are {shown(text)!r}")
    kind, source, options = words[2], words[3], words[6].split(",")
    if kind == "bind":
        directories = [source]
    elif kind == "overlay":
        said = dict(option.partition("=")[::2] for option in options)
        directories = [*filter(None, [said.get("upperdir", "")]), *said.get("lowerdir", "").split(":")]
    else:
        raise EngineFailed("containerd's snapshot can't be read", why=f"it is mounted as {shown(kind, 40)}")
    if not all(directory.startswith("/") and "\\" not in directory for directory in directories):
        raise EngineFailed("containerd's snapshot can't be read", why="a directory of it has no absolute path")
    return _Mount(kind, tuple(directories))


def main() -> int:
    """Mount, pack to standard output, and say on standard error what failed."""
    kind, *directories = sys.argv[1:]
    try:
        _enter(kind, directories)
        fd = os.open(_PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        rootfs.pack(fd, StandardOutput())
    except TartarusError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        return 1
    return 0


def _enter(kind: str, directories: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def done(result: int) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def mount(source: str, kind: str, flags: int, data: str = "") -> None:
        done(libc.mount(source.encode(), _PLACE.encode(), kind.encode(), flags, data.encode()))

    done(libc.unshare(_CLONE_NEWNS))
    done(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    if kind == "bind" or len(directories) == 1:
        mount(directories[0], "", _MS_BIND)
        mount("none", "", _MS_BIND | _MS_REMOUNT | _SAFE)
        return
    # Relative names: a mount's options have to fit a page.
    common = os.path.commonpath(directories)
    os.chdir(common)
    lower = ":".join(os.path.relpath(directory, common) for directory in directories)
    # The writable layer is the topmost lower one here, so that nothing can be written.
    mount("overlay", "overlay", _SAFE, f"lowerdir={lower}")


class StandardOutput:
    """Standard output as a sink."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes) -> None:
        """Write all of it."""
        self.size += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


if __name__ == "__main__":
    sys.exit(main())
