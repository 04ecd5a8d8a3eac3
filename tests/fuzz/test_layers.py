"""Layers of any bytes: read, or refused with a reason; nothing else happens."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.escape.images import contained, refused
from tests.escape.images.archives import END, blob, directory, file, gzipped, long_name, octal, pax, symlink
from tests.escape.images.ground import SMALL, Ground

from tartarus.images.unpack.inside import pax as records
from tartarus.images.unpack.inside import stream as stream_module
from tartarus.images.unpack.inside import tar
from tartarus.images.unpack.inside.refusal import Refused
from tartarus.images.unpack.inside.stream import Stream
from tartarus.model.errors import ImageRefused

_EXAMPLES = settings(max_examples=300, deadline=None)
_VALID = (
    directory(b"d")
    + pax({b"path": b"d/" + b"n" * 150, b"mtime": b"1.5", b"SCHILY.xattr.user.x": b"y"})
    + file(b"f", b"data")
    + long_name(b"l" * 130)
    + symlink(b"l", b"target")
    + pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"4096"})
    + file(b"s", b"1\n1024\n4\n".ljust(512, b"\0") + b"data")
    + END
)


Seen = tuple[bytes, bytes, bytes, int, bytes]


def read(data: bytes) -> tuple[list[Seen], str]:
    """Every entry with its content, and why the rest was refused."""
    seen: list[Seen] = []
    with tempfile.TemporaryFile() as spool:
        spool.write(data)
        spool.seek(0)
        try:
            stream = Stream(spool.fileno(), SMALL, lambda _count: None)
            for member in tar.members(stream, SMALL):
                assert 0 <= member.size < 1 << 62
                assert member.real_size >= 0
                seen.append((member.kind, member.name, member.link, member.mode, stream.take(member.size)))
        except Refused as refusal:
            reason = f"{refusal.what}: {refusal.why}"
        else:
            reason = ""
    assert reason == "" or reason.isprintable()
    return seen, reason


@_EXAMPLES
@given(st.binary(max_size=4096))
@example(b"\x1f\x8b")
@example(b"\x28\xb5\x2f\xfd")
@example(b"")
def test_any_bytes(data: bytes) -> None:
    read(data)


@_EXAMPLES
@given(st.integers(0, len(_VALID) - 1), st.binary(min_size=1, max_size=24), st.booleans())
def test_any_bytes_in_a_good_archive(at: int, noise: bytes, mend: bool) -> None:
    data = bytearray(_VALID)
    data[at : at + len(noise)] = noise
    data = data[: len(_VALID)]
    if mend:
        # A header's checksum is put right, so that what it says is looked at.
        start = at - at % 512
        block = data[start : start + 512]
        block[148:156] = b" " * 8
        data[start + 148 : start + 156] = octal(sum(block), 7) + b" "
    read(bytes(data))


@_EXAMPLES
@given(st.integers(0, len(_VALID)))
def test_any_end_of_a_good_archive(end: int) -> None:
    whole, reason = read(_VALID)
    assert reason == ""
    part, _ = read(_VALID[:end])
    assert part == whole[: len(part)]


@_EXAMPLES
@given(st.binary(max_size=300))
def test_any_extended_header(data: bytes) -> None:
    try:
        for key in records.parse(data):
            assert key
            assert b"\0" not in key
    except Refused:
        return


_NAME = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=70
).filter(lambda name: name not in {".", ".."})  # fmt: skip
_PATH = st.lists(_NAME, min_size=1, max_size=5).map("/".join)


@_EXAMPLES
@given(
    st.lists(st.tuples(_PATH, st.binary(max_size=2000), st.integers(0, 0o7777), st.booleans()), max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_what_an_honest_writer_wrote(entries: list[tuple[str, bytes, int, bool]], format_: int) -> None:
    whole = io.BytesIO()
    wanted = []
    with tarfile.open(fileobj=whole, mode="w", format=format_) as archive:
        for path, content, mode, link in entries:
            info = tarfile.TarInfo(path)
            info.mode = mode
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, path[::-1]
            else:
                info.size = len(content)
            archive.addfile(info, None if link else io.BytesIO(content))
            name, body = path.encode(), b"" if link else content
            wanted.append((b"2" if link else b"0", name, path[::-1].encode() if link else b"", mode, body))
    assert read(whole.getvalue()) == (wanted, "")


@pytest.mark.parametrize("library", ["isal", "zlib"])
def test_gzip_is_the_same_with_and_without_isal(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "zlib":
        monkeypatch.setattr(stream_module, "isal_zlib", None)
    members = [gzip.compress(_VALID[start : start + 700]) for start in range(0, len(_VALID), 700)]
    whole = b"".join(members)
    assert read(whole) == read(_VALID)
    assert read(gzip.compress(_VALID + bytes(1 << 20), 9)) == read(_VALID)
    for damaged in (whole[:-1], whole + b"x", whole[:30] + b"\xff" * 200 + whole[230:]):
        assert read(damaged)[1] != ""


@pytest.mark.anyio
@pytest.mark.needs("user-namespaces")
async def test_damaged_layers_leave_the_host_alone(tmp_path: Path) -> None:
    """Every crafted layer, damaged at random, through the real unpacker."""
    ground = Ground(tmp_path)
    chance = random.Random(7)
    crafted = [layer for layer, _ in refused.refused(os.fsencode(ground.bait)).values()]
    crafted += [layer for layer, _ in contained.contained().values()]
    small = [layer.data for layer in crafted if len(layer.data) < 20_000]
    outcomes = set()
    for _ in range(60):
        first, second = (bytearray(chance.choice(small)) for _ in range(2))
        cut = chance.randrange(0, len(first) + 1) & ~511
        data = first[:cut] + second
        for _ in range(chance.randrange(3)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        layer = chance.choice([blob, gzipped])(bytes(data))
        try:
            await ground.unpack(layer)
            outcomes.add("unpacked")
        except ImageRefused:
            outcomes.add("refused")
    assert outcomes == {"unpacked", "refused"}
    ground.check()
