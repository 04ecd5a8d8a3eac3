"""Starts Firecracker through its official jailer: a chroot that holds what it may open, made by us beforehand.

The jailer hands no descriptors on, so everything is a file in there: linked where its file system lets it be, else
copied. Our own walls (monitor.py) give the same protection without that, so this is for whoever wants the jailer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tartarus.guest.channel import channel_pair
from tartarus.model.errors import IsolationUnavailable
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.microvm import memory
from tartarus.runtimes.microvm.home import Home
from tartarus.runtimes.microvm.launcher import Ends, Launcher, Own
from tartarus.runtimes.microvm.monitor import Born
from tartarus.runtimes.microvm.output import Output

PROGRAM = "jailer"
_MOST_FILES = 1024
_SHELF = "shelf"
_ON_SHELF = 8
_WRITTEN = "scratch"


class Jailed:
    """Starts Firecracker in jails below `base`, which is on the file system of the machines' disks."""

    copies = True

    def __init__(self, launcher: Launcher, base: Path, program: str, jailer: str | None = None) -> None:
        found = jailer or shutil.which(PROGRAM)
        if found is None:
            raise IsolationUnavailable(
                "Firecracker's jailer is missing", fix="install it beside Firecracker, or set microvm.jailer to false"
            )
        self._jailer = found
        # The jailer names its directories after the program that it starts.
        self._exec_name = Path(os.path.realpath(program)).name
        if "firecracker" not in self._exec_name:
            raise IsolationUnavailable(
                "the jailer does not start Firecracker", why=f"it wants its file to be named so, not {self._exec_name}"
            )
        self._launcher = launcher
        self._base = base
        self._shelf: dict[tuple[int, int, int], Path] = {}

    def home(self) -> Home:
        """A jail's root: the jailer wants it at BASE/PROGRAM/ID/root."""
        place = self._base / self._exec_name
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Home(place, "root")

    async def __call__(
        self, home: Home, output: Output, argv: Sequence[str], files: Mapping[str, int], cgroup: Cgroup | None
    ) -> Born:
        """Start it."""

        def arguments(_numbers: list[int]) -> list[str]:
            for name, fd in files.items():
                self._furnish(home, name, fd)
            return self.arguments(home, argv)

        ends = Ends(*channel_pair())
        try:
            own = Own(home, output.write_end)
            return Born(await self._launcher.start(arguments, ends, [], cgroup, own, jailer=True), ends.ours)
        except BaseException:
            ends.ours.close()
            raise
        finally:
            ends.theirs.close()

    def arguments(self, home: Home, argv: Sequence[str]) -> list[str]:
        """The jailer's command line. Its cgroup it has already joined, and it makes none without `--cgroup`."""
        unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        return [
            self._jailer, "--id", home.id, "--exec-file", os.path.realpath(argv[0]),
            "--uid", str(home.uid), "--gid", str(home.uid), "--chroot-base-dir", str(self._base),
            "--cgroup-version", "2" if unified else "1", "--resource-limit", f"no-file={_MOST_FILES}",
            "--", *argv[1:],
        ]  # fmt: skip

    def _furnish(self, home: Home, name: str, fd: int) -> None:
        target = home.path / name
        if name == _WRITTEN:
            os.fchown(fd, home.uid, home.uid)
            if not _link(fd, target):
                _copy(fd, target, 0o600)
                os.chown(target, home.uid, home.uid)
        elif not _link(fd, target):
            os.link(self._shelved(fd), target)

    def _shelved(self, fd: int) -> Path:
        """A copy of a file that nobody writes any more; clones of one machine share it, and its page cache."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino, status.st_ctime_ns)
        if key not in self._shelf:
            while len(self._shelf) >= _ON_SHELF:
                with contextlib.suppress(OSError):
                    self._shelf.pop(next(iter(self._shelf))).unlink()
            place = self._base / _SHELF
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = place / "-".join(f"{part:x}" for part in key)
            path.unlink(missing_ok=True)
            _copy(fd, path, 0o444)
            self._shelf[key] = path
        return self._shelf[key]


def _link(fd: int, target: Path) -> bool:
    """Give a descriptor's file a name in the jail, where it has one already on this file system, or may get one."""
    try:
        # The descriptor of a directory, though none is needed: without, Python calls link(2), which follows nothing.
        os.link(f"/proc/self/fd/{fd}", target, src_dir_fd=fd, follow_symlinks=True)
    except OSError:
        return False
    return True


def _copy(fd: int, target: Path, mode: int) -> None:
    made = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        memory.copy_data(fd, made)
        os.fchmod(made, mode)
    finally:
        os.close(made)
