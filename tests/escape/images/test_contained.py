"""Odd layers, through the real unpacker: what they ask for is given only where it is harmless."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tests.escape.images.archives import END, base256, blob, directory, file, hard_link, header, pax, symlink
from tests.escape.images.contained import contained
from tests.escape.images.ground import UID_BASE, Ground, kinds

pytestmark = [pytest.mark.anyio, pytest.mark.needs("user-namespaces")]


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


@pytest.mark.parametrize("name", contained())
async def test_it_is_contained(ground: Ground, name: str) -> None:
    layer, expected = contained()[name]
    tree = await ground.unpack(layer)
    assert kinds(tree) == expected
    ground.check()


async def test_the_last_entry_of_a_path_counts(ground: Ground) -> None:
    archive = file(b"a", b"x", mode=0o777) + hard_link(b"b", b"a") + file(b"a", b"later", mode=0o600)
    tree = await ground.unpack(blob(archive + END))
    assert ((tree / "a").read_text(), (tree / "b").read_text()) == ("later", "x")
    assert stat.S_IMODE((tree / "a").stat().st_mode) == 0o600


async def test_a_directory_made_anew_forgets_what_it_was(ground: Ground) -> None:
    archive = directory(b"d", 0o777, uid=5) + file(b"d/x") + file(b"d", b"x") + directory(b"d", 0o700) + file(b"d/y")
    tree = await ground.unpack(blob(archive + END))
    assert kinds(tree) == {"d": "d", "d/y": "f"}
    assert stat.S_IMODE((tree / "d").stat().st_mode) == 0o700


async def test_what_is_made_anew_after_a_deletion_hides_the_old(ground: Ground) -> None:
    archive = file(b".wh.d") + directory(b"d") + file(b".wh.e") + file(b"e/x") + directory(b"f") + file(b".wh.f")
    tree = await ground.unpack(blob(archive + END))
    assert kinds(tree) == {"d": "d", "e": "d", "e/x": "f", "f": "d"}
    assert [os.getxattr(tree / name, "user.overlay.opaque") for name in "def"] == [b"y"] * 3


async def test_set_id_bits_stay_with_the_owner_in_the_sandbox(ground: Ground) -> None:
    archive = file(b"su", b"x", mode=0o4755) + file(b"sg", b"x", mode=0o2755, gid=42) + directory(b"d", 0o2775, gid=8)
    archive += file(b"d/x", gid=3)
    tree = await ground.unpack(blob(archive + END))
    # Root of a sandbox, whom its mounts (nosuid) and no_new_privs keep from becoming anybody; never the host's.
    base = os.getuid() if UID_BASE is None else UID_BASE
    assert [(tree / name).stat().st_uid for name in ("su", "sg", "d", "d/x")] == [base] * 4
    assert [stat.S_IMODE((tree / name).stat().st_mode) for name in ("su", "sg", "d")] == [0o4755, 0o2755, 0o2775]


@pytest.mark.needs("root")
async def test_owners_are_shifted_and_those_beyond_are_nobody(ground: Ground) -> None:
    assert UID_BASE is not None
    archive = file(b"a", uid=1000, gid=100) + file(b"b", uid=base256(1 << 40, 8)) + symlink(b"c", b"x")
    archive += header(b"d", b"6", uid=7) + pax({b"uid": b"65535"}) + file(b"e")
    layer = blob(archive + END)
    tree = await ground.unpack(layer)
    found = {
        name: ((tree / name).lstat().st_uid - UID_BASE, (tree / name).lstat().st_gid - UID_BASE) for name in "abcde"
    }
    assert found == {"a": (1000, 100), "b": (65534, 0), "c": (0, 0), "d": (7, 0), "e": (65535, 0)}
    assert ground.facts(layer)["nobodys"] == 1


async def test_what_is_left_out_is_counted(ground: Ground) -> None:
    archive = header(b"dev/null", b"3", device=(1, 3)) + pax({b"SCHILY.xattr.trusted.x": b"y"}) + file(b"a")
    layer = blob(archive + END)
    await ground.unpack(layer)
    facts = ground.facts(layer)
    assert (facts["devices_left_out"], facts["attributes_left_out"], facts["implied_directories"]) == (1, 1, 1)


async def test_attributes_of_users_are_kept(ground: Ground) -> None:
    archive = pax({b"SCHILY.xattr.user.x": b"\0\xff="}) + file(b"a", b"x")
    archive += pax({b"SCHILY.xattr.user.y": b"1"}) + directory(b"d") + file(b"d/.wh..wh..opq")
    tree = await ground.unpack(blob(archive + END))
    assert os.getxattr(tree / "a", "user.x") == b"\0\xff="
    assert sorted(os.listxattr(tree / "d")) == ["user.overlay.opaque", "user.y"]


async def test_names_stay_the_bytes_that_they_are(ground: Ground) -> None:
    names = [b"\xff\xfe", b"new\nline", b"\x1b[2J", "é".encode(), "é".encode("latin-1")]
    tree = await ground.unpack(blob(b"".join(file(name) for name in names) + END))
    assert sorted(os.listdir(os.fsencode(tree))) == sorted(names)


async def test_a_file_may_be_sparse(ground: Ground) -> None:
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": b"new",
               b"GNU.sparse.realsize": b"4194304"}  # fmt: skip
    mapped = b"1\n2097152\n4\n".ljust(512, b"\0") + b"data"
    places = b"%011o\0%011o\0" % (1 << 20, 4) + bytes(72)
    tail = bytes(386 - 345) + places + b"\0" + b"%011o\0" % (4 << 20)
    archive = pax(records) + file(b"x", mapped) + file(b"old", b"data", kind=b"S", magic=b"ustar  \0", tail=tail)
    tree = await ground.unpack(blob(archive + END))
    for name, at in (("new", 2 << 20), ("old", 1 << 20)):
        content = (tree / name).read_bytes()
        assert content == (bytes(at) + b"data").ljust(4 << 20, b"\0")
        assert (tree / name).stat().st_blocks * 512 < 1 << 20


async def test_times_and_modes_are_kept(ground: Ground) -> None:
    archive = (
        directory(b"d", 0o555, mtime=1_000_000_000) + pax({b"mtime": b"1700000000.25"}) + file(b"d/f", b"x", mode=0)
    )
    tree = await ground.unpack(blob(archive + END))
    assert (tree / "d").stat().st_mtime == 1_000_000_000
    assert (tree / "d" / "f").stat().st_mtime_ns == 1_700_000_000_250_000_000
    assert [stat.S_IMODE((tree / name).stat().st_mode) for name in ("d", "d/f")] == [0o555, 0]
