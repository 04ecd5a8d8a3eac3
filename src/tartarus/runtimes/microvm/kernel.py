"""Guest kernels: what a machine boots, kept under a name with the modules the agent loads.

`install` takes Debian's package of a kernel, or a bare kernel file that has the drivers built in.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec

from tartarus.model.errors import InvalidRequest, IsolationUnavailable

WANTED = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio-rng", "erofs", "overlay", "ext4", "vmgenid",
          "virtio_pci", "virtio_net", "vmw_vsock_virtio_transport")  # fmt: skip
"""What a machine may need. What a kernel does not bring as a module, it has built in, or the boot tells."""
BOOT = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio-rng", "erofs", "overlay", "ext4")
"""What QEMU's microvm machine needs, in the order they are loaded; each after what it depends on."""
_MAX_FILE = 256 * 1024 * 1024
_MAX_MEMBERS = 100_000
_BZIMAGE_AT, _BZIMAGE = 0x202, b"HdrS"
_ELF = b"\x7fELF"


class Kernel(msgspec.Struct, frozen=True):
    """An installed kernel. `modules`: name to the names it depends on."""

    release: str
    image: Path
    directory: Path
    modules: dict[str, tuple[str, ...]]

    def load_order(self, wanted: tuple[str, ...] = BOOT) -> list[tuple[str, bytes]]:
        """File name and content of the modules to load, each after what it needs."""
        ordered: dict[str, None] = {}

        def add(name: str) -> None:
            if name in self.modules and name not in ordered:
                for below in self.modules[name]:
                    add(below)
                ordered[name] = None

        for name in wanted:
            add(name.replace("-", "_"))
        return [(f"{name}.ko", (self.directory / f"{name}.ko").read_bytes()) for name in ordered]


def installed(root: Path) -> list[Kernel]:
    """All kernels below `root`, the newest first."""
    found = [_read(place) for place in root.glob("*/kernel.json")] if root.is_dir() else []
    return sorted(found, key=lambda kernel: kernel.image.stat().st_mtime, reverse=True)


def default(root: Path) -> Kernel:
    """The newest kernel. Raises IsolationUnavailable where there is none."""
    kernels = installed(root)
    if not kernels:
        raise IsolationUnavailable(
            "there is no guest kernel",
            why=f"{root} holds none",
            fix="on Debian: apt-get download linux-image-cloud-amd64's package and tartarus kernel install FILE",
        )
    return kernels[0]


def install(source: Path, root: Path) -> Kernel:
    """Take a kernel package (.deb) or a kernel (bzImage, vmlinux). Raises InvalidRequest for anything else.

    Whole or not at all: it is gathered aside and renamed.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".installing-", dir=root) as scratch:
        place = Path(scratch) / "kernel"
        place.mkdir()
        with source.open("rb") as file:
            start = file.read(8)
        release, modules = _unpack(source, place) if start == b"!<arch>\n" else _bare(source, place)
        facts = {"release": release, "modules": modules}
        (place / "kernel.json").write_bytes(msgspec.json.encode(facts))
        target = root / release
        if target.exists():
            target.rename(Path(scratch) / "old")
        place.rename(target)
    return _read(target / "kernel.json")


def _read(description: Path) -> Kernel:
    facts = msgspec.json.decode(description.read_bytes())
    directory = description.parent
    modules = {name: tuple(below) for name, below in facts["modules"].items()}
    return Kernel(facts["release"], directory / "vmlinuz", directory, modules)


def _bare(source: Path, place: Path) -> tuple[str, dict[str, list[str]]]:
    content = source.read_bytes() if source.stat().st_size <= _MAX_FILE else b""
    if content[_BZIMAGE_AT : _BZIMAGE_AT + 4] != _BZIMAGE and not content.startswith(_ELF):
        raise InvalidRequest(
            f"{source} is no kernel", why="neither a bzImage, nor a vmlinux, nor a Debian package", fix="give one"
        )
    (place / "vmlinuz").write_bytes(content)
    return source.name.removeprefix("vmlinuz-").removeprefix("."), {}


def _unpack(source: Path, place: Path) -> tuple[str, dict[str, list[str]]]:
    release = ""
    modules: dict[str, list[str]] = {}
    names = {name.replace("-", "_") for name in WANTED}
    available: dict[str, bytes] = {}
    for path, content in _kernel_files(source):
        if path.parent.name == "boot" and path.name.startswith("vmlinuz-"):
            release = path.name.removeprefix("vmlinuz-")
            (place / "vmlinuz").write_bytes(content)
        elif ".ko" in path.suffixes:
            available[path.name.partition(".ko")[0].replace("-", "_")] = _module(path, content)
    if not release:
        raise InvalidRequest(
            f"{source} has no kernel in it",
            why="there is no /boot/vmlinuz-…; a meta package only names another",
            fix="give the package it depends on (linux-image-…-cloud-amd64)",
        )
    pending = sorted(names & available.keys())
    while pending:
        name = pending.pop()
        if name in modules or name not in available:
            continue
        modules[name] = _dependencies(available[name])
        (place / f"{name}.ko").write_bytes(available[name])
        pending += modules[name]
    return release, modules


def _kernel_files(package: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The kernel and the modules in a package. dpkg-deb reads what is Debian's own format, of any compression."""
    if shutil.which("dpkg-deb") is None:
        raise InvalidRequest("this host can't read Debian packages", fix="install dpkg, or give the kernel file itself")
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", os.fspath(package)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as unpacking:
        try:
            assert unpacking.stdout is not None
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
                for count, member in enumerate(tar):
                    path = PurePosixPath(member.name)
                    if count > _MAX_MEMBERS or member.size > _MAX_FILE:
                        raise InvalidRequest(f"{package} is not a kernel package", why="it is too large")
                    if member.isfile() and (path.name.startswith("vmlinuz-") or ".ko" in path.suffixes):
                        file = tar.extractfile(member)
                        yield path, file.read() if file is not None else b""
        except tarfile.TarError as error:
            raise InvalidRequest(f"{package} can't be read", why=str(error)) from error
        finally:
            unpacking.kill()


def _module(path: PurePosixPath, content: bytes) -> bytes:
    """A module as the kernel loads it."""
    if path.suffix == ".xz":
        with lzma.open(io.BytesIO(content)) as packed:
            return packed.read(_MAX_FILE)
    return content


def _dependencies(module: bytes) -> list[str]:
    """What it says in its own notes that it needs."""
    start = module.find(b"\0depends=")
    if start < 0:
        return []
    text = module[start + 9 : module.index(b"\0", start + 9)].decode("ascii", "replace")
    return [name.replace("-", "_") for name in text.split(",") if name]
