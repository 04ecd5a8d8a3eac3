"""Guest kernels: what a machine boots, kept with the modules that the agent loads.

`install` takes Debian's package of a kernel, or a kernel file with, if need be, a directory of its modules. An
installed kernel is a directory that is never changed: another one with the same release takes its place when it is
whole, and goes by the same name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tartarus.durable import sync_directory
from tartarus.model.errors import InvalidRequest, IsolationUnavailable, NoSpace
from tartarus.runtimes.microvm import deb
from tartarus.runtimes.microvm.kernelfile import (
    MAX_KERNEL,
    MAX_MODULE,
    RELEASE,
    Kind,
    kind_of,
    module,
    module_name,
    needs_of,
    release_of,
)

WANTED = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio-rng", "erofs", "overlay", "ext4", "vmgenid",
          "virtio_pci", "virtio_net", "vmw_vsock_virtio_transport", "vsock_loopback")  # fmt: skip
"""What a machine may need. What a kernel does not bring as a module, it has built in, or the boot tells."""
BOOT = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio-rng", "erofs", "overlay", "ext4")
"""What QEMU's microvm machine needs, in the order they are loaded; each after what it depends on."""
CARD = ("virtio_net",)
"""What a machine with a network card needs beside."""
VSOCK_BOOT = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio-rng", "erofs", "overlay", "ext4",
              "vmw_vsock_virtio_transport")  # fmt: skip
"""What Firecracker's and Cloud Hypervisor's machines need."""
_MAX_MODULES = 20_000
_DESCRIPTION = "kernel.json"
_IMAGE = "vmlinuz"
_DEFAULT = "default"
_ASIDE = ".installing-"


class Facts(msgspec.Struct, frozen=True):
    """What is kept beside an installed kernel. `digest`: SHA-256 of its file; `installed_at`: Unix time, seconds."""

    release: str
    kind: Kind
    digest: str
    source: str
    installed_at: float
    modules: dict[str, tuple[str, ...]]


class Kernel(msgspec.Struct, frozen=True):
    """An installed kernel. `modules`: name to the names it depends on."""

    release: str
    image: Path
    directory: Path
    modules: dict[str, tuple[str, ...]]
    facts: Facts

    def load_order(self, wanted: tuple[str, ...] = BOOT) -> list[tuple[str, bytes]]:
        """File name and content of the modules to load, each after what it needs."""
        ordered: dict[str, None] = {}
        pending = [name.replace("-", "_") for name in reversed(wanted)]
        entered: set[str] = set()
        while pending:
            name = pending[-1]
            below = [need for need in self.modules.get(name, ()) if need not in entered and need in self.modules]
            if name in entered or name not in self.modules or not below:
                pending.pop()
                if name in self.modules:
                    ordered[name] = None
            else:
                pending += reversed(below)
            entered.add(name)
        return [(f"{name}.ko", (self.directory / f"{name}.ko").read_bytes()) for name in ordered]


def installed(root: Path) -> list[Kernel]:
    """All kernels below `root`, the newest first, one for each release."""
    found = [_read(place) for place in root.glob(f"*/{_DESCRIPTION}")] if root.is_dir() else []
    newest: dict[str, Kernel] = {}
    for kernel in sorted(found, key=lambda kernel: kernel.facts.installed_at, reverse=True):
        newest.setdefault(kernel.release, kernel)
    return list(newest.values())


def default(root: Path) -> Kernel:
    """The kernel that machines boot: the chosen one, else the newest. Raises IsolationUnavailable without any."""
    kernels = installed(root)
    if not kernels:
        raise IsolationUnavailable(
            "there is no guest kernel", why=f"{root} holds none", fix="sudo tartarus kernel install"
        )
    with contextlib.suppress(OSError):
        chosen = (root / _DEFAULT).read_text(encoding="ascii").strip()
        return next((kernel for kernel in kernels if kernel.release == chosen), kernels[0])
    return kernels[0]


def choose(root: Path, release: str) -> Kernel:
    """Make an installed kernel the one that machines boot. Raises InvalidRequest for one that is not there."""
    with _locked(root):
        kernel = _find(root, release)
        aside = root / f"{_ASIDE}{_DEFAULT}"
        with aside.open("w", encoding="ascii") as file:
            file.write(f"{release}\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(root / _DEFAULT)
        sync_directory(root)
        return kernel


def remove(root: Path, release: str) -> None:
    """Remove an installed kernel; machines that booted it go on. Raises InvalidRequest for one that is not there."""
    with _locked(root):
        _find(root, release)
        for place in root.glob(f"*/{_DESCRIPTION}"):
            if _read(place).release == release:
                # Renamed first, so that a removal that is cut short leaves nothing that looks installed.
                gone = place.parent.rename(root / f"{_ASIDE}{place.parent.name}")
                shutil.rmtree(gone)
        sync_directory(root)


def install(source: Path, root: Path, modules: Path | None = None) -> Kernel:
    """Take a kernel package (.deb) or a kernel with a directory of its modules. Raises InvalidRequest for others.

    Whole or not at all: it is gathered aside, written out, and renamed.
    """
    with _locked(root), tempfile.TemporaryDirectory(prefix=_ASIDE, dir=root) as scratch:
        gathered = _Gathered(Path(scratch))
        try:
            if deb.is_package(source):
                if modules is not None:
                    raise InvalidRequest(f"{source} is a package", why="it brings its own modules", fix="no --modules")
                _from_package(source, gathered)
            else:
                _from_files(source, modules, gathered)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise NoSpace("a kernel can't be installed", why=f"{root} is full", fix="make room there") from error
            raise InvalidRequest(f"{source} can't be read", why=error.strerror or str(error)) from error
        facts = gathered.finish(source.name)
        target = root / f"{facts.release}_{facts.digest[:12]}"
        if target.exists():
            target.rename(Path(scratch) / "same")
        gathered.place.rename(target)
        for old in root.glob(f"*/{_DESCRIPTION}"):
            if old.parent != target and _read(old).release == facts.release:
                old.parent.rename(Path(scratch) / old.parent.name)
        sync_directory(root)
    return _read(target / _DESCRIPTION)


class _Gathered:
    """A kernel on its way in: its file, and every module it came with, until it is known which are wanted."""

    def __init__(self, scratch: Path) -> None:
        self.place = scratch / "kernel"
        self._all = scratch / "modules"
        self.place.mkdir()
        self._all.mkdir()
        self._found: dict[str, str] = {}
        self._image = b""
        self.release = ""

    def image(self, content: bytes, release: str) -> None:
        kind_of(content)
        if self._image:
            raise InvalidRequest("there is more than one kernel in it", fix="give one")
        self._image = content
        self.release = release

    def module(self, file_name: str, read: Callable[[], bytes]) -> None:
        name = module_name(file_name)
        if name is not None and name not in self._found and len(self._found) < _MAX_MODULES:
            # Named by us: what a package calls a file is never a path here.
            kept = f"{len(self._found)}.ko{file_name.partition('.ko')[2]}"
            (self._all / kept).write_bytes(read())
            self._found[name] = kept

    def finish(self, source: str) -> Facts:
        """Keep the modules that machines want, and those that these need; write everything out."""
        if not RELEASE.fullmatch(self.release):
            raise InvalidRequest(
                "the kernel does not say its release", why="none is in it", fix="name it vmlinuz-RELEASE"
            )
        wanted: dict[str, tuple[str, ...]] = {}
        pending = sorted(name.replace("-", "_") for name in WANTED)
        while pending:
            name = pending.pop()
            if name in wanted or name not in self._found:
                continue
            kept = self._found[name]
            content = module(kept, (self._all / kept).read_bytes())
            wanted[name] = tuple(needs_of(content))
            _write(self.place / f"{name}.ko", content)
            pending += wanted[name]
        digest = hashlib.sha256(self._image).hexdigest()
        facts = Facts(self.release, kind_of(self._image), digest, source, round(time.time(), 3), wanted)
        _write(self.place / _IMAGE, self._image)
        _write(self.place / _DESCRIPTION, msgspec.json.encode(facts))
        sync_directory(self.place)
        return facts


def _from_package(source: Path, gathered: _Gathered) -> None:
    with source.open("rb") as package:
        for member in deb.files(package):
            if member.path.parent.name == "boot" and member.path.name.startswith("vmlinuz-"):
                gathered.image(member.read(MAX_KERNEL), member.path.name.removeprefix("vmlinuz-"))
            elif ".ko" in member.path.name:
                gathered.module(member.path.name, lambda member=member: member.read(MAX_MODULE))  # type: ignore[misc]
    if not gathered.release:
        raise InvalidRequest(
            f"{source} has no kernel in it",
            why="there is no /boot/vmlinuz-…; a meta package only names another",
            fix="give the package it depends on (linux-image-…-cloud-amd64)",
        )


def _from_files(source: Path, modules: Path | None, gathered: _Gathered) -> None:
    content = _content(source, MAX_KERNEL)
    named = source.name.removeprefix("vmlinuz-").removeprefix("vmlinux-").removeprefix("bzImage-")
    gathered.image(content, release_of(content) or named)
    if modules is None:
        return
    if not modules.is_dir():
        raise InvalidRequest(f"{modules} is no directory", fix="give /lib/modules/RELEASE of that kernel")
    for directory, _, names in os.walk(modules):
        for name in names:
            path = Path(directory) / name
            if ".ko" in name and not path.is_symlink():
                gathered.module(name, lambda path=path: _content(path, MAX_MODULE))  # type: ignore[misc]


def _content(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InvalidRequest(f"{path} is larger than {most >> 20} MiB", why="nothing that machines boot is")
    return content


def _find(root: Path, release: str) -> Kernel:
    for kernel in installed(root):
        if kernel.release == release:
            return kernel
    names = ", ".join(kernel.release for kernel in installed(root)) or "none"
    raise InvalidRequest(f"no kernel {release!r} is installed", why=f"there is: {names}", fix="tartarus kernel list")


def _read(description: Path) -> Kernel:
    facts = msgspec.json.decode(description.read_bytes(), type=Facts)
    directory = description.parent
    return Kernel(facts.release, directory / _IMAGE, directory, facts.modules, facts)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One at a time; what an earlier one left when it was killed goes first."""
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    held = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        for left in root.glob(f"{_ASIDE}*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        yield
    finally:
        os.close(held)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
