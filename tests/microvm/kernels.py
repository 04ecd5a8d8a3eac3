"""Kernels, modules and Debian packages that are made for a test: small, well-formed unless asked otherwise."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
import zlib

import lz4.block
import zstandard

RELEASE = "6.1.0-7-cloud-amd64"


def elf(kind: int = 2, architecture: int = 62, *, pvh: bool = True, body: bytes = b"") -> bytes:
    """A vmlinux: an ELF header, one note segment, and the banner."""
    note = struct.pack("<III", 4, 8, 18 if pvh else 3) + b"Xen\0" + struct.pack("<Q", 0x1000000)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", kind, architecture, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(note), len(note), 4)
    return head + segment + note + b"Linux version %s (debian)\0" % RELEASE.encode() + body


def module(*needs: str) -> bytes:
    """A kernel module that needs others."""
    return elf(1)[:64] + b"\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0"


def bzimage(payload: bytes, release: str = RELEASE, *, version: int = 0x020F, length: int | None = None) -> bytes:
    """A bzImage around a packed payload: one setup sector beside the boot sector."""
    head = bytearray(2048)
    head[0x1F1] = 1
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<H", head, 0x20E, 0x300 - 0x200)
    head[0x211] = 1
    struct.pack_into("<II", head, 0x248, 1024, len(payload) if length is None else length)
    text = release.encode()[:200] + b" (debian) #1 SMP\0"
    head[0x300 : 0x300 + len(text)] = text
    return bytes(head) + payload


def lz4_legacy(content: bytes) -> bytes:
    """As the kernel's build packs it, its size behind it."""
    packed: bytes = lz4.block.compress(content, store_size=False)
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(packed)) + packed + struct.pack("<I", len(content))


def packings(content: bytes) -> dict[str, bytes]:
    """Each way in which a kernel's payload is packed."""
    size = struct.pack("<I", len(content))
    return {
        "lz4": lz4_legacy(content),
        "xz": lzma.compress(content) + size,
        "lzma": lzma.compress(content, lzma.FORMAT_ALONE) + size,
        "zstd": zstandard.compress(content) + size,
        "gzip": gzip.compress(content) + size,
    }


def tar(files: dict[str, bytes], *, kind: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar archive of regular files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def deb(data: bytes, packing: str = "xz") -> bytes:
    """A Debian package around a tar archive."""
    packed = {
        "": lambda: data,
        "xz": lambda: lzma.compress(data),
        "gz": lambda: gzip.compress(data),
        "zst": lambda: zstandard.compress(data),
        "zlib": lambda: zlib.compress(data),
    }[packing]()
    name = f"data.tar.{packing}" if packing else "data.tar"
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", lzma.compress(tar({"./control": b"Package: x\n"})))]
    return b"!<arch>\n" + b"".join(ar_member(*member) for member in [*members, (name, packed)])


def ar_member(name: str, content: bytes, size: int | None = None) -> bytes:
    """One member of an ar archive."""
    said = len(content) if size is None else size
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{said:<10}`\n".encode()
    return head + content + b"\n" * (len(content) % 2)


def kernel_files(release: str = RELEASE) -> dict[str, bytes]:
    """What a kernel's package holds: two modules that machines want, one they need, one that nobody asked for."""
    below = f"./lib/modules/{release}/kernel"
    return {
        f"./boot/vmlinuz-{release}": bzimage(lz4_legacy(elf()), release),
        f"./boot/config-{release}": b"CONFIG_PVH=y\n",
        f"{below}/fs/ext4/ext4.ko": module("mbcache", "jbd2"),
        f"{below}/fs/mbcache.ko": module(),
        f"{below}/fs/jbd2/jbd2.ko": module(),
        f"{below}/drivers/char/hw_random/virtio-rng.ko": module("rng-core"),
        f"{below}/drivers/net/dummy.ko": module(),
        f"{below}/{'deep/' * 30}virtio_blk.ko": module(),
    }
