"""Whatever a kernel file, a module or a package holds: an answer or our own error, within bounds, and nothing else."""

from __future__ import annotations

import io
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.microvm import kernels

from tartarus.model.errors import InvalidRequest
from tartarus.runtimes.microvm import deb, kernelfetch, kernelfile

QUICK = settings(max_examples=150, deadline=None)
VALID = {
    "bzImage": kernels.bzimage(kernels.lz4_legacy(kernels.elf())),
    "zstd": kernels.bzimage(kernels.packings(kernels.elf())["zstd"]),
    "xz": kernels.bzimage(kernels.packings(kernels.elf())["xz"]),
    "vmlinux": kernels.elf(),
}
PACKAGE = kernels.deb(kernels.tar(kernels.kernel_files()), "")
EDITS = st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)


def edited(content: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    """The same with a few bytes overwritten."""
    changed = bytearray(content)
    for place, piece in edits:
        at = place % len(changed)
        changed[at : at + len(piece)] = piece
    return bytes(changed)


def ask_everything(content: bytes) -> None:
    """Every question that is asked of a kernel."""
    try:
        kernelfile.kind_of(content)
    except InvalidRequest:
        return
    release = kernelfile.release_of(content)
    assert not release or kernelfile.RELEASE.fullmatch(release)
    kernelfile.boots_by_pvh(content)
    try:
        assert kernelfile.vmlinux(content)[:4] == b"\x7fELF" or content[56:60] == b"ARMd"
    except InvalidRequest:
        return


@QUICK
@given(st.sampled_from(sorted(VALID)), EDITS, st.integers(0, 4000))
def test_a_damaged_kernel(name: str, edits: list[tuple[int, bytes]], cut: int) -> None:
    """Headers, offsets, lengths and packed streams that lie, in every combination."""
    content = edited(VALID[name], edits)
    ask_everything(content)
    ask_everything(content[:cut])


@QUICK
@given(st.binary(max_size=2000))
def test_any_bytes(content: bytes) -> None:
    """With each kind's first bytes, and without."""
    ask_everything(content)
    ask_everything(b"\x7fELF\x02\x01" + content)
    head = bytearray(kernels.bzimage(b""))
    struct.pack_into("<I", head, 0x24C, len(content))
    for magic in (b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"]\0\0", b"BZh9"):
        struct.pack_into("<I", head, 0x24C, len(content) + len(magic))
        ask_everything(bytes(head) + magic + content)


@QUICK
@given(st.binary(max_size=300), st.text(max_size=80))
def test_any_module(content: bytes, name: str) -> None:
    """What it needs are names of modules, or it is refused; what its file is called is one, or it is none."""
    for data in (content, b"\0depends=" + content, b"\x7fELF\0depends=" + content + b"\0"):
        try:
            needs = kernelfile.needs_of(data)
        except InvalidRequest:
            continue
        assert all(need and "/" not in need and "." not in need for need in needs)
    for suffix in ("", ".xz", ".zst", ".gz"):
        found = kernelfile.module_name(f"{name}.ko{suffix}")
        assert found is None or ("/" not in found and "." not in found)
        try:
            kernelfile.module(f"x.ko{suffix}", content)
        except InvalidRequest:
            continue


@QUICK
@given(st.lists(st.tuples(st.integers(0, len(PACKAGE)), st.binary(min_size=1, max_size=12)), max_size=6),
       st.integers(0, len(PACKAGE)))  # fmt: skip
def test_a_damaged_package(edits: list[tuple[int, bytes]], cut: int) -> None:
    """Its ar headers, its tar headers, its sizes."""
    for content in (edited(PACKAGE, edits), PACKAGE[:cut]):
        try:
            for member in deb.files(io.BytesIO(content)):
                member.read(4096)
        except InvalidRequest:
            continue


@QUICK
@given(st.text(max_size=500))
def test_any_list_of_packages(text: str) -> None:
    """What apt prints is read by fields, and a name or version is never an option of apt's."""
    fields = kernelfetch.parse_stanza(text)
    assert all("\n" not in value for value in fields.values())
    found = kernelfetch._DEPENDS.search(text)
    assert found is None or (found[1].startswith("linux-image-") and not found[2].startswith("-"))
