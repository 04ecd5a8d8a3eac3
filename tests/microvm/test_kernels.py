"""Installing guest kernels: what is taken, what is refused whole, and what a killed installation leaves."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import stat
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.microvm import kernels
from tests.needs import kernel_package

from tartarus.model.errors import InvalidRequest, IsolationUnavailable
from tartarus.runtimes.microvm import deb, kernel, kernelfetch, kernelfile


def package(place: Path, files: dict[str, bytes] | None = None, packing: str = "xz") -> Path:
    """A package in a file."""
    path = place / "linux-image.deb"
    path.write_bytes(kernels.deb(kernels.tar(kernels.kernel_files() if files is None else files), packing))
    return path


@pytest.mark.parametrize("packing", ["", "xz", "gz", "zst"])
def test_a_package_brings_its_kernel_and_the_modules_machines_want(tmp_path: Path, packing: str) -> None:
    """However it is packed; modules that nobody wants stay out, those that wanted ones need come along."""
    made = kernel.install(package(tmp_path, packing=packing), tmp_path / "kernels")
    assert (made.release, made.facts.kind) == (kernels.RELEASE, kernelfile.Kind.BZIMAGE)
    assert set(made.modules) == {"ext4", "mbcache", "jbd2", "virtio_rng", "virtio_blk"}
    order = [name for name, _ in made.load_order()]
    assert order.index("mbcache.ko") < order.index("ext4.ko")
    assert kernel.default(tmp_path / "kernels") == made
    assert kernelfile.vmlinux(made.image.read_bytes()) == kernels.elf()


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_a_bare_kernel_with_its_modules(tmp_path: Path, suffix: str) -> None:
    """A vmlinux and /lib/modules/RELEASE; modules may be packed."""
    packers: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
    pack = packers[suffix]
    modules = tmp_path / "modules" / "fs"
    modules.mkdir(parents=True)
    (modules / f"ext4.ko{suffix}").write_bytes(pack(kernels.module("crc16")))
    (modules / f"crc16.ko{suffix}").write_bytes(pack(kernels.module()))
    (modules / "overlay.ko").symlink_to("/etc/passwd")
    (tmp_path / "vmlinux").write_bytes(kernels.elf())
    made = kernel.install(tmp_path / "vmlinux", tmp_path / "kernels", tmp_path / "modules")
    assert made.facts.kind is kernelfile.Kind.VMLINUX
    assert [name for name, _ in made.load_order()] == ["crc16.ko", "ext4.ko"]
    assert made.load_order()[0][1] == kernels.module()


def test_modules_that_need_each_other_are_loaded_once(tmp_path: Path) -> None:
    """A made-up circle ends."""
    files = kernels.kernel_files() | {"./lib/ext4.ko": kernels.module("jbd2"), "./lib/jbd2.ko": kernels.module("ext4")}
    files = {name: content for name, content in files.items() if "/fs/" not in name}
    made = kernel.install(package(tmp_path, files), tmp_path / "kernels")
    assert sorted(name for name, _ in made.load_order(("ext4",))) == ["ext4.ko", "jbd2.ko"]


def test_the_default_is_the_chosen_one_else_the_newest(tmp_path: Path) -> None:
    """Choosing lasts until that kernel is removed."""
    root = tmp_path / "kernels"
    with pytest.raises(IsolationUnavailable, match="no guest kernel"):
        kernel.default(root)
    for release in ("6.1.0-1-cloud-amd64", "6.1.0-2-cloud-amd64"):
        kernel.install(package(tmp_path, kernels.kernel_files(release)), root)
    assert kernel.default(root).release == "6.1.0-2-cloud-amd64"
    kernel.choose(root, "6.1.0-1-cloud-amd64")
    assert kernel.default(root).release == "6.1.0-1-cloud-amd64"
    kernel.remove(root, "6.1.0-1-cloud-amd64")
    assert [each.release for each in kernel.installed(root)] == ["6.1.0-2-cloud-amd64"]
    assert kernel.default(root).release == "6.1.0-2-cloud-amd64"
    with pytest.raises(InvalidRequest, match="no kernel"):
        kernel.choose(root, "6.1.0-1-cloud-amd64")
    with pytest.raises(InvalidRequest, match="no kernel"):
        kernel.remove(root, "..")


def test_another_kernel_of_the_same_release_takes_its_place(tmp_path: Path) -> None:
    """Only one goes by a name."""
    root = tmp_path / "kernels"
    first = kernel.install(package(tmp_path), root)
    files = kernels.kernel_files() | {f"./boot/vmlinuz-{kernels.RELEASE}": kernels.bzimage(b"another")}
    second = kernel.install(package(tmp_path, files), root)
    assert [each.facts.digest for each in kernel.installed(root)] == [second.facts.digest]
    assert not first.directory.exists()


def test_what_a_killed_installation_left_is_swept(tmp_path: Path) -> None:
    """And never taken for a kernel."""
    root = tmp_path / "kernels"
    made = kernel.install(package(tmp_path), root)
    left = root / ".installing-abc" / "kernel"
    left.mkdir(parents=True)
    (left / "vmlinuz").write_bytes(b"half")
    (root / ".installing-default").write_text("half")
    assert kernel.installed(root) == [made]
    kernel.choose(root, made.release)
    assert sorted(path.name for path in root.iterdir()) == sorted(["default", made.directory.name])


HOSTILE_NAMES = (
    "./boot/vmlinuz-..", "./boot/vmlinuz-../../../etc/x", "./boot/vmlinuz-", "./boot/vmlinuz-.hidden",
    "./boot/vmlinuz-a b", "/boot/vmlinuz-\n", f"./boot/vmlinuz-{'a' * 200}",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_release_is_no_path(tmp_path: Path, name: str) -> None:
    """It becomes the name of a directory, so a package that says another thing is refused, and nothing is left."""
    with pytest.raises(InvalidRequest):
        kernel.install(package(tmp_path, {name: kernels.bzimage(b"x")}), tmp_path / "kernels")
    assert sorted(os.listdir(tmp_path)) == ["kernels", "linux-image.deb"]
    assert os.listdir(tmp_path / "kernels") == []


def test_a_package_writes_nowhere(tmp_path: Path) -> None:
    """Names that lead out, links and devices are read past: nothing is ever made after a package's word."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, link in (
            ("../../../../../../tmp/tartarus-escaped", tarfile.REGTYPE, ""),
            ("/tmp/tartarus-escaped", tarfile.REGTYPE, ""),
            ("./lib/ext4.ko", tarfile.SYMTYPE, "/etc/passwd"),
            ("./lib/overlay.ko", tarfile.LNKTYPE, "/etc/shadow"),
            ("./lib/erofs.ko", tarfile.CHRTYPE, ""),
            ("../../../../../../tmp/tartarus-escaped.ko", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, link, 0o7777
            archive.addfile(info)
        image = kernels.kernel_files()[f"./boot/vmlinuz-{kernels.RELEASE}"]
        info = tarfile.TarInfo(f"./boot/vmlinuz-{kernels.RELEASE}")
        info.size = len(image)
        archive.addfile(info, io.BytesIO(image))
    path = tmp_path / "hostile.deb"
    path.write_bytes(kernels.deb(out.getvalue()))
    made = kernel.install(path, tmp_path / "kernels")
    assert made.modules == {}
    assert not os.path.lexists("/tmp/tartarus-escaped")
    assert not os.path.lexists("/tmp/tartarus-escaped.ko")
    for each in made.directory.iterdir():
        status = each.lstat()
        assert stat.S_ISREG(status.st_mode)
        assert not status.st_mode & 0o7022


def test_a_bomb_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that pack well are counted as they come out."""
    monkeypatch.setattr(deb, "MAX_UNPACKED", 1024**2)
    for packing in ("xz", "gz", "zst"):
        with pytest.raises(InvalidRequest, match="more than a kernel package"):
            kernel.install(package(tmp_path, {"./zeros": bytes(4 * 1024**2)}, packing), tmp_path / "kernels")
    monkeypatch.undo()
    monkeypatch.setattr(kernelfile, "MAX_KERNEL", 1024**2)
    for packed in kernels.packings(bytes(4 * 1024**2)).values():
        with pytest.raises(InvalidRequest):
            kernelfile.vmlinux(kernels.bzimage(packed))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_name_of_any_length_is_bounded(tmp_path: Path, kind: int) -> None:
    """Long names lie in records of their own, which may claim any size."""
    path = tmp_path / "long.deb"
    path.write_bytes(kernels.deb(kernels.tar({f"./{'x' * 100_000}": b""}, kind=kind)))
    with pytest.raises(InvalidRequest, match="larger than"):
        kernel.install(path, tmp_path / "kernels")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "neither"),
        (b"#!/bin/sh\n", "neither"),
        (b"!<arch>\n", "missing"),
        (b"!<arch>\n" + kernels.ar_member("debian-binary", b"2.0\n", -1), "stands where|missing"),
        (b"!<arch>\n" + kernels.ar_member("debian-binary", b"", 9_999_999_999), "too early"),
        (b"!<arch>\n" + kernels.ar_member("../../etc/passwd", b"x"), "stands where"),
        (kernels.deb(b""), "too early"),
        (kernels.deb(bytes(1024)), "no kernel in it"),
        (kernels.deb(b"x" * 2048), "checksum|header"),
        (kernels.deb(kernels.tar({"./x": b"y"}), "zlib"), "packed as"),
        (kernels.deb(kernels.tar({"./x": b"y" * 4096}))[:-40], "too early|corrupt|Corrupt"),
        (kernels.elf(3), "program"),
        (kernels.elf(1), "no 64-bit kernel"),
        (b"\x7fELF\x01\x01" + bytes(64), "no 64-bit kernel"),
        (kernels.bzimage(b"x", version=0x0200), "2.08"),
    ],
)  # fmt: skip
def test_what_is_no_kernel_is_refused_whole(tmp_path: Path, content: bytes, why: str) -> None:
    """With a reason, and nothing is left behind."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=why):
        kernel.install(path, tmp_path / "kernels")
    assert os.listdir(tmp_path / "kernels") == []


@pytest.mark.parametrize("name", list(kernels.packings(b"")))
def test_every_packing_of_a_kernel_is_unpacked(name: str) -> None:
    """As the kernel's own build makes them."""
    content = kernels.elf(body=os.urandom(1000) * 100)
    assert kernelfile.vmlinux(kernels.bzimage(kernels.packings(content)[name])) == content
    assert kernelfile.boots_by_pvh(content)
    assert not kernelfile.boots_by_pvh(kernels.elf(pvh=False))


def test_a_payload_outside_of_its_kernel_is_refused() -> None:
    """Its place and length are the file's word."""
    for length in (0, 7, 10**6, 2**32 - 1):
        with pytest.raises(InvalidRequest, match="lies outside"):
            kernelfile.vmlinux(kernels.bzimage(b"\x02\x21\x4c\x18abcdefgh", length=length))
    # A block that claims more than a block holds.
    claim = b"\x02\x21\x4c\x18" + struct.pack("<I", 4) + b"\xff\xff\xff\xff" + bytes(8)
    with pytest.raises(InvalidRequest):
        kernelfile.vmlinux(kernels.bzimage(claim))


def test_what_apt_fetched_must_be_what_its_signed_list_says(tmp_path: Path) -> None:
    """Apt's download runs as a user of its own, to whom the directory belongs: the copy of ours is what counts."""
    download = tmp_path / "download"
    download.mkdir()
    (download / "kernel.deb").write_bytes(b"true words")
    listed = kernelfetch.Listed("linux-image-x", "1", 10, hashlib.sha256(b"true words").hexdigest())
    kernelfetch._take(download, listed, tmp_path / "good")
    for index, content in enumerate((b"false word", b"true words and more", b"true")):
        (download / "kernel.deb").write_bytes(content)
        with pytest.raises(InvalidRequest, match="not what the mirror"):
            kernelfetch._take(download, listed, tmp_path / f"bad-{index}")
    (download / "kernel.deb").unlink()
    (download / "kernel.deb").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic"):
        kernelfetch._take(download, listed, tmp_path / "link")


@pytest.mark.needs("microvm")
def test_debians_own_kernel(tmp_path: Path) -> None:
    """The real package: its kernel, and modules for every monitor."""
    source = kernel_package()
    assert source is not None
    made = kernel.install(source, tmp_path / "kernels")
    names = [name for name, _ in made.load_order(kernel.VSOCK_BOOT)]
    assert {"vsock.ko", "vmw_vsock_virtio_transport.ko", "virtio_pci.ko", "erofs.ko"} <= set(names)
    assert names.index("vsock.ko") < names.index("vmw_vsock_virtio_transport.ko")
    unpacked = kernelfile.vmlinux(made.image.read_bytes())
    assert kernelfile.release_of(unpacked) == made.release == kernelfile.release_of(made.image.read_bytes())
    assert kernelfile.boots_by_pvh(unpacked)
