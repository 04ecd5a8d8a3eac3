"""What a kernel file says of itself: its kind, its release, its modules' needs; and a bzImage without its wrapping.

Formats: the kernel's Documentation/arch/x86/boot.rst (bzImage), Documentation/arch/arm64/booting.rst (Image), ELF(5),
and Documentation/arch/x86/xen notes for PVH. Whoever gives a file may have made it up: nothing is believed unchecked.
"""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import zlib
from enum import Enum
from typing import Final

import lz4.block
import zstandard

from tartarus.model.errors import InvalidRequest

MAX_KERNEL = 256 * 1024 * 1024
"""The largest kernel that is taken, packed or not, in bytes; Debian's has 14 MB, and 50 MB unpacked."""
MAX_MODULE = 64 * 1024 * 1024
RELEASE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~_-]{0,63}")
"""What a release may look like: it becomes the name of a directory."""
_MODULE = re.compile(r"[A-Za-z0-9_]{1,64}")
_MAX_NEEDS = 64
_BANNER = re.compile(rb"Linux version ([A-Za-z0-9][A-Za-z0-9.+~_-]{0,63}) ")
_BOOT_SECTORS = 1024
_ELF, _LITTLE_64 = b"\x7fELF", b"\x02\x01"
_ELF_EXEC, _ELF_DYN, _ELF_X86_64, _ELF_AARCH64 = 2, 3, 62, 183
_PT_NOTE, _PVH_NOTE = 4, 18
_MAX_SEGMENTS = 128
_LZ4_BLOCK = 8 * 1024 * 1024
_CHUNK = 1024 * 1024


class Kind(Enum):
    """What loads it: QEMU and Cloud Hypervisor load a bzImage, Firecracker a vmlinux alone (on x86_64)."""

    BZIMAGE = "bzImage"
    VMLINUX = "vmlinux"
    IMAGE = "Image"


def kind_of(content: bytes) -> Kind:
    """What a file is. Raises InvalidRequest for what is no kernel of a kind that monitors load."""
    if len(content) >= _BOOT_SECTORS and content[0x202:0x206] == b"HdrS" and content[0x1FE:0x200] == b"\x55\xaa":
        version, loaded_high = struct.unpack_from("<H", content, 0x206)[0], content[0x211] & 1
        if version < 0x0208 or not loaded_high:
            raise _no_kernel("its boot protocol is older than 2.08, of 2007")
        return Kind.BZIMAGE
    if content.startswith(_ELF) and len(content) >= 64:
        kind, architecture = struct.unpack_from("<HH", content, 16)
        if content[4:6] != _LITTLE_64 or kind not in {_ELF_EXEC, _ELF_DYN}:
            raise _no_kernel("it is an ELF file, but no 64-bit kernel")
        if architecture not in {_ELF_X86_64, _ELF_AARCH64} or (kind == _ELF_DYN and architecture == _ELF_X86_64):
            raise _no_kernel("it is a program, or of another architecture")
        return Kind.VMLINUX
    if content[56:60] == b"ARMd":
        return Kind.IMAGE
    raise _no_kernel("neither a bzImage, nor a vmlinux, nor an arm64 Image, nor a Debian package")


def release_of(content: bytes) -> str:
    """The release that a kernel names (`uname -r`); empty where it names none."""
    if kind_of(content) is Kind.BZIMAGE:
        at = struct.unpack_from("<H", content, 0x20E)[0] + 0x200
        words = content[at : at + 256].partition(b"\0")[0].split(b" ", 1)
        said = words[0].decode("ascii", "replace")
    else:
        found = _BANNER.search(content)
        said = found[1].decode("ascii") if found else ""
    return said if RELEASE.fullmatch(said) else ""


def vmlinux(content: bytes) -> bytes:
    """The ELF kernel inside a bzImage; a vmlinux or Image as it is. Raises InvalidRequest for one that is damaged."""
    if kind_of(content) is not Kind.BZIMAGE:
        return content
    setup = content[0x1F1] or 4
    offset, length = struct.unpack_from("<II", content, 0x248)
    start = (setup + 1) * 512 + offset
    packed = content[start : start + length]
    if len(packed) != length or length < 8:
        raise _damaged("its payload lies outside of it")
    try:
        unpacked = _unpacked(packed)
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, lz4.block.LZ4BlockError, OSError, ValueError) as error:
        raise _damaged(str(error)) from error
    if not unpacked.startswith(_ELF) or kind_of(unpacked) is not Kind.VMLINUX:
        raise _damaged("what is packed in it is no ELF kernel")
    return unpacked


def boots_by_pvh(content: bytes) -> bool:
    """Whether a vmlinux names an entry for PVH, which Cloud Hypervisor and QEMU need of one."""
    if kind_of(content) is not Kind.VMLINUX:
        return False
    offset, size, count = struct.unpack_from("<Q", content, 32)[0], *struct.unpack_from("<HH", content, 54)
    if size < 56 or count > _MAX_SEGMENTS or offset + size * count > len(content):
        return False
    for index in range(count):
        kind, _flags, at, _v, _p, length = struct.unpack_from("<IIQQQQ", content, offset + index * size)
        if kind == _PT_NOTE and at + length <= len(content) and _has_note(content[at : at + length]):
            return True
    return False


def needs_of(module: bytes) -> list[str]:
    """The modules that a module says it needs. Raises InvalidRequest for names that no module has."""
    start = module.find(b"\0depends=")
    end = module.find(b"\0", start + 9)
    if start < 0 or end < 0:
        return []
    names = [name.replace("-", "_") for name in module[start + 9 : end].decode("ascii", "replace").split(",") if name]
    if len(names) > _MAX_NEEDS or not all(_MODULE.fullmatch(name) for name in names):
        raise InvalidRequest("a kernel module is damaged", why="it needs what can be no module", fix="fetch it again")
    return names


def module_name(file_name: str) -> str | None:
    """The module that a file of this name holds: `virtio-rng.ko.xz` is virtio_rng; None for what holds none."""
    name, _, packing = file_name.partition(".ko")
    name = name.replace("-", "_")
    return name if packing in {"", ".xz", ".zst", ".gz"} and ".ko" in file_name and _MODULE.fullmatch(name) else None


def module(file_name: str, content: bytes) -> bytes:
    """A module as the kernel loads it. Raises InvalidRequest for what is none, or is too large."""
    try:
        if file_name.endswith((".xz", ".zst", ".gz")):
            content = _unpacked(content, MAX_MODULE)
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, ValueError) as error:
        raise InvalidRequest(f"{file_name} can't be unpacked", why=str(error), fix="fetch it again") from error
    if not content.startswith(_ELF):
        raise InvalidRequest(f"{file_name} is no kernel module", why="it is no ELF file", fix="fetch it again")
    return content


def _has_note(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        if kind == _PVH_NOTE and notes[at + 12 : at + 16] == b"Xen\0" and name_size == 4:
            return True
        at += 12 + -(-name_size // 4) * 4 + -(-size // 4) * 4
    return False


def _unpacked(packed: bytes, most: int = MAX_KERNEL) -> bytes:
    """By what it begins with, as the kernel's scripts/extract-vmlinux does; bounded, whatever it claims."""
    if packed.startswith(b"\x02\x21\x4c\x18"):
        return _lz4_legacy(packed, most)
    if packed.startswith(b"\x28\xb5\x2f\xfd"):
        # After the frame of a kernel stand 4 bytes with its size.
        reader = zstandard.ZstdDecompressor(max_window_size=2 * most).stream_reader(packed, read_across_frames=False)
        return _bounded(reader.read(most + 1), most)
    if packed.startswith(b"\x1f\x8b"):
        return _bounded(zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(packed, most + 1), most)
    if packed.startswith(b"\xfd7zXZ"):
        return _bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ, 2 * most).decompress(packed, most + 1), most)
    if packed.startswith(b"]\0\0"):
        return _bounded(lzma.LZMADecompressor(lzma.FORMAT_ALONE, 2 * most).decompress(packed, most + 1), most)
    if packed.startswith(b"BZh"):
        return _bounded(bz2.BZ2Decompressor().decompress(packed, most + 1), most)
    raise ValueError(f"it is packed in a way that is not known here ({packed[:4].hex()})")


def _lz4_legacy(packed: bytes, most: int) -> bytes:
    """LZ4's legacy frame, as the kernel's build writes it: blocks of 8 MiB, each after its packed size."""
    parts, at, total = [], 4, 0
    while at + 4 < len(packed) and total <= most:
        (size,) = struct.unpack_from("<I", packed, at)
        # The last 4 bytes of a payload are its unpacked size.
        if size > len(packed) - at - 4:
            break
        parts.append(lz4.block.decompress(packed[at + 4 : at + 4 + size], uncompressed_size=_LZ4_BLOCK))
        total += len(parts[-1])
        at += 4 + size
    return _bounded(b"".join(parts), most)


def _bounded(content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise ValueError(f"it holds more than {most >> 20} MiB")
    return content


def _no_kernel(why: str) -> InvalidRequest:
    return InvalidRequest(
        "this is no guest kernel", why=why, fix="give a bzImage, a vmlinux or Debian's package of one"
    )


def _damaged(why: str) -> InvalidRequest:
    return InvalidRequest("the kernel can't be unpacked", why=why, fix="fetch it again, or give its vmlinux")
