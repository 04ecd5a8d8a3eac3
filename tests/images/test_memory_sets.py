"""Memory sets on disk: kept whole, packed, put together again, and refused when they are not what was written."""

import asyncio
import hashlib
import os
import shutil
import struct

import msgspec
import pytest
import zstandard

from tartarus.images.memory import Facts, MemorySets, bundle
from tartarus.images.memory.bundle import Seals
from tartarus.images.memory.manifest import GROUP, MAP_ENTRY, entries_of
from tartarus.images.memory.packs import unpacked
from tartarus.images.memory.sparse import content_map
from tartarus.model.errors import GuestFailed, NoSpace, SnapshotNotFound, SnapshotRefused
from tartarus.model.sandbox import Resources

pytestmark = pytest.mark.anyio
FACTS = Facts(isolation="gvisor", needs={"monitor": "runsc 1"}, offer={"template": "host"}, resources=Resources())
MEMORY = 40 * GROUP + 123


def fill(place, seed=1):
    """A sparse memory, a small state, and an empty file."""
    pages = hashlib.shake_256(bytes([seed])).digest(3 * GROUP)
    with open(place / "memory", "wb") as file:
        file.truncate(MEMORY)
        for at, part in ((0, pages[:GROUP]), (7 * GROUP + 4096, pages[GROUP : GROUP + 8192]), (MEMORY - 5, b"tail!")):
            file.seek(at)
            file.write(part)
        file.seek(20 * GROUP)
        file.write(bytes(2 * GROUP))  # zeros that take space
        file.seek(30 * GROUP)
        file.write(pages[:GROUP])  # the first group again
    (place / "devices").write_bytes(pages[2 * GROUP : 2 * GROUP + 5000])
    (place / "nothing").touch()
    return {path.name: path.read_bytes() for path in place.iterdir()}


async def kept(sets, set_id="snap-1", tenant="t", seed=1, facts=FACTS):
    async with sets.staging(tenant) as place:
        content = fill(place, seed)
        return await sets.keep(tenant, set_id, place, facts), content


async def content_of(sets, found, tenant="t"):
    async with sets.taken(tenant, found.id, found.digest) as taken:
        assert taken.facts == found.facts
        taken.confirm()
        return {path.name: path.read_bytes() for path in taken.path.iterdir()}


def at(tmp_path, budget=2**30):
    sets = MemorySets(tmp_path / "memory", budget)
    sets.open()
    return sets


def home(tmp_path, set_id="snap-1", tenant="t"):
    return tmp_path / "memory" / tenant / "sets" / set_id


def leftovers(tmp_path):
    return [path for path in (tmp_path / "memory").rglob("*") if path.name.startswith(".")]


def test_map_names_what_is_not_zero(tmp_path):
    fill(tmp_path)
    fd = os.open(tmp_path / "memory", os.O_RDONLY)
    try:
        found = list(entries_of(content_map(fd)))
    finally:
        os.close(fd)
    assert [number for number, _ in found] == [0, 7, 30, 40]
    assert found[0][1] == found[2][1] == hashlib.sha256((tmp_path / "memory").read_bytes()[:GROUP]).digest()


async def test_set_comes_back_as_it_was(tmp_path):
    sets = at(tmp_path)
    found, content = await kept(sets)
    assert await content_of(sets, found) == content
    later = at(tmp_path)
    assert await content_of(later, found) == content
    assert not leftovers(tmp_path)


async def test_packed_set_is_small_and_comes_back_sparse(tmp_path):
    sets = at(tmp_path)
    found, content = await kept(sets)
    await sets.cool(0)
    assert not (home(tmp_path) / "raw").exists()
    assert sets.used_bytes() < 3 * GROUP + 64 * 1024  # not the zeros, and the first group once
    for store in (sets, at(tmp_path)):
        assert await content_of(store, found) == content
    assert (home(tmp_path) / "raw" / "memory").stat().st_blocks * 512 < 6 * GROUP
    await sets.cool(0)  # it is packed already
    assert await content_of(sets, found) == content


async def test_sets_share_groups_and_outlive_each_other(tmp_path):
    sets = at(tmp_path)
    first, content = await kept(sets, "snap-1")
    await sets.cool(0)
    before = sets.used_bytes()
    second, _ = await kept(sets, "snap-2")
    await sets.cool(0)
    assert sets.used_bytes() - before < GROUP
    await sets.remove("t", "snap-1")
    with pytest.raises(SnapshotNotFound):
        await content_of(sets, first)
    assert await content_of(sets, second) == content
    await sets.remove("t", "snap-2")
    await sets.remove("t", "snap-2")
    assert not list((tmp_path / "memory" / "t" / "packs").iterdir())


async def test_damaged_pack_of_another_set_is_not_relied_on(tmp_path):
    sets = at(tmp_path)
    await kept(sets, "snap-1")
    await sets.cool(0)
    (pack,) = (tmp_path / "memory" / "t" / "packs").glob("*.pack")
    pack.write_bytes(bytes(pack.stat().st_size))
    second, content = await kept(sets, "snap-2")
    await sets.cool(0)
    assert await content_of(sets, second) == content


async def test_other_tenants_set_is_not_there(tmp_path):
    sets = at(tmp_path)
    found, _ = await kept(sets, tenant="alice")
    with pytest.raises(SnapshotNotFound):
        await content_of(sets, found, tenant="bob")


def _flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda place: _flip(place / "raw" / "memory", 5),
        lambda place: _flip(place / "raw" / "memory", 21 * GROUP),
        lambda place: os.truncate(place / "raw" / "memory", MEMORY - 1),
        lambda place: os.truncate(place / "raw" / "memory", MEMORY + GROUP),
        lambda place: (place / "raw" / "devices").unlink(),
        lambda place: (place / "raw" / "more").touch(),
        lambda place: _flip(place / "maps" / "memory", 6),
        lambda place: os.truncate(place / "maps" / "memory", MAP_ENTRY.size),
        lambda place: _flip(place / "manifest.json", 40),
        lambda place: os.truncate(place / "manifest.json", 0),
    ],
)
async def test_changed_files_are_refused(tmp_path, damage, restarted):
    sets = at(tmp_path)
    found, _ = await kept(sets)
    damage(home(tmp_path))
    with pytest.raises(SnapshotRefused, match="damaged"):
        await content_of(at(tmp_path) if restarted else sets, found)


@pytest.mark.parametrize("name", ["raw/devices", "maps/devices", "manifest.json"])
async def test_links_are_not_followed(tmp_path, name):
    sets = at(tmp_path)
    found, _ = await kept(sets)
    real = home(tmp_path) / name
    real.rename(tmp_path / "elsewhere")
    real.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotRefused):
        await content_of(sets, found)


async def test_replaced_while_used_is_noticed(tmp_path):
    sets = at(tmp_path)
    found, _ = await kept(sets)
    async with sets.taken("t", found.id, found.digest) as taken:
        content = (taken.path / "devices").read_bytes()
        (taken.path / "devices").unlink()
        (taken.path / "devices").write_bytes(content)
        with pytest.raises(SnapshotRefused, match="changed while it was used"):
            taken.confirm()


async def test_what_is_lent_can_be_opened_by_others_and_is_looked_at_again(tmp_path):
    sets = at(tmp_path)
    found, content = await kept(sets)
    async with sets.taken("t", found.id, found.digest) as taken:
        fd = taken.lend("memory")
        taken.confirm()
        assert {path.name: path.stat().st_mode & 0o777 for path in taken.path.iterdir()} == {
            "memory": 0o666, "devices": 0o600, "nothing": 0o600
        }  # fmt: skip
        for path in (taken.path, *taken.path.parents[:4]):
            assert path.stat().st_mode & 0o77 == 0
    assert await content_of(sets, found) == content
    async with sets.taken("t", found.id, found.digest) as taken:
        again = taken.lend("memory")
        writer = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        os.pwrite(writer, b"another's", 0)
        with pytest.raises(SnapshotRefused, match="changed while it was used"):
            taken.confirm()
        with pytest.raises(SnapshotRefused, match="changed while it was used"):
            taken.lend("memory")
        with pytest.raises(SnapshotRefused):
            taken.lend("unknown")
    for held in (fd, again, writer):
        os.close(held)
    with pytest.raises(SnapshotRefused, match="memory is not what was written"):
        await content_of(sets, found)


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: [_flip(path, 100) for path in place.glob("packs/*.pack")],
        lambda place: [os.truncate(path, 50) for path in place.glob("packs/*.pack")],
        lambda place: [path.unlink() for path in place.glob("packs/*.pack")],
        lambda place: [_flip(path, 3) for path in place.glob("packs/*.index")],
        lambda place: [os.truncate(path, 43) for path in place.glob("packs/*.index")],
        lambda place: (place / "sets/snap-1/packs.json").write_bytes(b'["../../../etc/passwd"]'),
        lambda place: (place / "sets/snap-1/packs.json").write_bytes(b"[]"),
    ],
)
async def test_damaged_packs_are_refused(tmp_path, damage):
    sets = at(tmp_path)
    found, _ = await kept(sets)
    await sets.cool(0)
    damage(tmp_path / "memory" / "t")
    with pytest.raises(SnapshotRefused, match="damaged"):
        await content_of(sets, found)
    assert not (home(tmp_path) / "raw").exists()
    assert not leftovers(tmp_path)


async def test_copy_cut_short_by_a_crash_is_made_again(tmp_path):
    sets = at(tmp_path)
    found, content = await kept(sets)
    await sets.cool(0)
    await content_of(sets, found)
    os.truncate(home(tmp_path) / "raw" / "memory", GROUP)
    assert await content_of(at(tmp_path), found) == content


async def test_what_a_killed_daemon_left_goes(tmp_path):
    sets = at(tmp_path)
    found, content = await kept(sets)
    await sets.cool(0)
    tenant = tmp_path / "memory" / "t"
    for name in (".staging-1/raw", "sets/.removing-2/raw", "sets/snap-1/.removing-3"):
        (tenant / name).mkdir(parents=True)
        (tenant / name / "memory").touch()
    for name in (".abc.new", "abc.index", "unnamed.index", "unnamed.pack"):
        (tenant / "packs" / name).touch()
    later = at(tmp_path)
    assert not leftovers(tmp_path)
    assert len(list((tenant / "packs").iterdir())) == 2
    assert await content_of(later, found) == content


async def test_sets_that_nobody_knows_go(tmp_path):
    sets = at(tmp_path)
    await kept(sets, "snap-1")
    await kept(sets, "snap-2")
    await kept(sets, "warm-3")
    assert await sets.sweep({"snap-1"}, older_than_s=3600) == []
    assert await sets.sweep({"snap-1"}, older_than_s=0) == ["snap-2"]


async def test_budget_lets_caches_go_and_nothing_else(tmp_path):
    measured = at(tmp_path / "measured")
    await kept(measured)
    sets = at(tmp_path, budget=measured.used_bytes() * 7 // 2)
    await kept(sets, "warm-1", tenant="shared")
    await kept(sets, "snap-1")
    os.utime(home(tmp_path, "warm-1", "shared"), (1, 1))
    await kept(sets, "snap-2", seed=2)
    await kept(sets, "snap-3", seed=3)
    assert not home(tmp_path, "warm-1", "shared").exists()
    with pytest.raises(NoSpace, match="delete some"):
        await kept(sets, "snap-4", seed=4)
    assert not leftovers(tmp_path)
    assert {path.name for path in home(tmp_path).parent.iterdir()} == {"snap-1", "snap-2", "snap-3"}


async def test_failed_save_leaves_nothing(tmp_path):
    sets = at(tmp_path)

    async def save(fill_it, error=None):
        async with sets.staging("t") as place:
            fill_it(place)
            if error is not None:
                raise error
            await sets.keep("t", "snap-1", place, FACTS)

    with pytest.raises(RuntimeError):
        await save(fill, RuntimeError())
    with pytest.raises(GuestFailed):
        await save(lambda place: None)
    with pytest.raises((SnapshotRefused, GuestFailed)):
        await save(lambda place: (place / "dir").mkdir())
    assert not leftovers(tmp_path)
    assert not home(tmp_path).exists()


async def test_removal_waits_for_use(tmp_path):
    sets = at(tmp_path)
    found, content = await kept(sets)
    async with sets.taken("t", found.id, found.digest) as taken:
        removing = asyncio.create_task(sets.remove("t", found.id))
        await asyncio.sleep(0.1)
        assert (taken.path / "memory").read_bytes() == content["memory"]
    await removing
    assert not home(tmp_path).exists()


@pytest.mark.parametrize("frame", [b"", b"no zstd", zstandard.compress(bytes(2**30)), zstandard.compress(b"other")])
def test_hostile_frames_are_refused(frame):
    with pytest.raises(SnapshotRefused):
        unpacked(frame, hashlib.sha256(b"wanted").digest())


def test_frame_that_lies_of_its_size_is_refused():
    honest = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20))
    with pytest.raises(SnapshotRefused):
        unpacked(honest, hashlib.sha256(bytes(2**20)).digest())


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": []},
        {"files": [{"name": "../x", "size": 1, "groups": 0, "digest": ""}]},
        {"files": [{"name": "x", "size": 1, "groups": 2, "digest": ""}]},
        {"files": [{"name": "x", "size": 2**50, "groups": 0, "digest": ""}]},
        {"files": [{"name": "x", "size": -1, "groups": 0, "digest": ""}]},
        {"files": [{"name": f"x{i}", "size": 1, "groups": 0, "digest": ""} for i in range(17)]},
        {"files": [{"name": "x", "size": 2**40, "groups": 2**23, "digest": ""}]},
        {"more": 1},
        {"facts": {"isolation": "gvisor"}},
    ],
)
async def test_lying_manifests_are_refused(tmp_path, change):
    """Also when they are sealed: a set that another version wrote must not get further either."""
    from tartarus.images.memory.manifest import digest_of

    sets = at(tmp_path)
    found, _ = await kept(sets)
    path = home(tmp_path) / "manifest.json"
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | change))
    with pytest.raises(SnapshotRefused):
        await content_of(sets, msgspec.structs.replace(found, digest=digest_of(path.read_bytes())))


# Export and import


async def exported(sets, found, seals, tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        async for piece in sets.export("t", found.id, found.digest, seals):
            file.write(piece)
    return path


@pytest.mark.parametrize("packed", [False, True])
async def test_exported_set_comes_back_elsewhere(tmp_path, packed):
    sets, seals = at(tmp_path), Seals(tmp_path / "keys")
    found, content = await kept(sets)
    if packed:
        await sets.cool(0)
    path = await exported(sets, found, seals, tmp_path)
    there = at(tmp_path / "there")
    again = await there.bring("other", "snap-9", path, seals)
    assert (again.facts, again.digest, again.size_bytes) == (found.facts, found.digest, found.size_bytes)
    assert await content_of(there, again, "other") == content


async def test_only_trusted_hosts_files_are_read(tmp_path):
    sets, seals = at(tmp_path), Seals(tmp_path / "keys")
    found, _ = await kept(sets)
    path = await exported(sets, found, seals, tmp_path)
    elsewhere = Seals(tmp_path / "their-keys")
    elsewhere.own()
    with pytest.raises(SnapshotRefused, match="trusted"):
        await sets.bring("t", "snap-2", path, elsewhere)
    shutil.copy(tmp_path / "keys" / "host.key", tmp_path / "their-keys" / "friend.key")
    await sets.bring("t", "snap-2", path, elsewhere)
    assert (tmp_path / "keys" / "host.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("offset", [0, 9, 20, 300, 900, 6000, -1, -40])
async def test_changed_export_is_refused(tmp_path, offset):
    sets, seals = at(tmp_path), Seals(tmp_path / "keys")
    found, _ = await kept(sets)
    path = await exported(sets, found, seals, tmp_path)
    _flip(path, offset)
    with pytest.raises(SnapshotRefused):
        await sets.bring("t", "snap-2", path, seals)
    assert not home(tmp_path, "snap-2").exists()
    assert not leftovers(tmp_path)


async def test_cut_off_exports_and_links_are_refused(tmp_path):
    sets, seals = at(tmp_path), Seals(tmp_path / "keys")
    found, _ = await kept(sets)
    path = await exported(sets, found, seals, tmp_path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(SnapshotRefused):
        await sets.bring("t", "snap-2", tmp_path / "link", seals)
    whole = path.read_bytes()
    for size in (0, 10, 47, 48, 500, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SnapshotRefused):
            await sets.bring("t", "snap-2", path, seals)
    path.write_bytes(whole + b"more")
    with pytest.raises(SnapshotRefused):
        await sets.bring("t", "snap-2", path, seals)


def _resealed(whole, seals, change):
    """What a host whose key was stolen could write: the seal fits, the content lies."""
    import hmac

    content = change(bytearray(whole[:-32]))
    return bytes(content) + hmac.new(seals.own(), bytes(content), hashlib.sha256).digest()


def _first_frame(data):
    (length,) = struct.unpack_from(">I", data, 16)
    files = msgspec.json.decode(bytes(data[20 : 20 + length]))["files"]
    return 20 + length + sum(entry["groups"] for entry in files) * MAP_ENTRY.size


def _bomb(data):
    at = _first_frame(data)
    (length,) = struct.unpack_from(">I", data, at)
    bomb = zstandard.compress(bytes(2**30))
    return data[:at] + struct.pack(">I", len(bomb)) + bomb + data[at + 4 + length :]


def _other_map(data):
    data[_first_frame(data) - 1] ^= 1
    return data


def _long_manifest(data):
    struct.pack_into(">I", data, 16, 2**31)
    return data


def _long_frame(data):
    struct.pack_into(">I", data, _first_frame(data), 2**31)
    return data


@pytest.mark.parametrize("change", [_bomb, _other_map, _long_manifest, _long_frame, lambda data: data + b"\0" * 8])
async def test_sealed_lies_are_refused(tmp_path, change):
    sets, seals = at(tmp_path), Seals(tmp_path / "keys")
    found, _ = await kept(sets)
    path = await exported(sets, found, seals, tmp_path)
    path.write_bytes(_resealed(path.read_bytes(), seals, change))
    with pytest.raises(SnapshotRefused):
        await sets.bring("t", "snap-2", path, seals)
    assert not leftovers(tmp_path)
    assert not list((tmp_path / "memory" / "t" / "packs").iterdir())


async def test_import_keeps_to_the_budget(tmp_path):
    sets, seals = at(tmp_path), Seals(tmp_path / "keys")
    found, _ = await kept(sets)
    path = await exported(sets, found, seals, tmp_path)
    with pytest.raises(NoSpace):
        await at(tmp_path / "there", budget=1000).bring("t", "snap-2", path, seals)


def test_host_key_is_made_once(tmp_path):
    seals = Seals(tmp_path / "keys")
    assert seals.own() == seals.own() == Seals(tmp_path / "keys").own()
    assert bundle.id_of(seals.own()) != seals.own()[:8]
    (tmp_path / "keys" / "host.key").write_bytes(b"short")
    with pytest.raises(SnapshotRefused, match="damaged"):
        seals.own()


async def test_removing_one_set_while_another_is_packed_loses_nothing(tmp_path):
    sets = at(tmp_path)
    for turn in range(10):
        first, _ = await kept(sets, f"snap-{turn}-a")
        await sets.cool(0)
        second, content = await kept(sets, f"snap-{turn}-b")
        await asyncio.gather(sets.cool(0), sets.remove("t", first.id))
        assert await content_of(sets, second) == content
        await sets.remove("t", second.id)
    assert not list((tmp_path / "memory" / "t" / "packs").iterdir())


async def test_a_set_that_can_not_say_what_it_needs_keeps_others_from_nothing(tmp_path):
    sets = at(tmp_path)
    broken, _ = await kept(sets, "snap-1")
    await sets.cool(0)
    (home(tmp_path) / "packs.json").write_bytes(b"{")
    found, content = await kept(sets, "snap-2", seed=2)
    await sets.cool(0)
    assert await content_of(sets, found) == content
    await sets.remove("t", found.id)
    with pytest.raises(SnapshotRefused):
        await content_of(sets, broken)
    await sets.remove("t", broken.id)
    assert not list((tmp_path / "memory" / "t" / "packs").iterdir())


async def test_a_damaged_set_is_not_packed_and_others_are(tmp_path):
    sets = at(tmp_path)
    await kept(sets, "snap-1")
    found, content = await kept(sets, "snap-2", seed=2)
    _flip(home(tmp_path) / "raw" / "memory", 5)
    with pytest.raises(SnapshotRefused):
        await sets.cool(0)
    assert (home(tmp_path) / "raw").exists()
    assert not (home(tmp_path, "snap-2") / "raw").exists()
    assert await content_of(sets, found) == content
    assert not leftovers(tmp_path)


async def test_copies_of_packed_sets_give_way_first(tmp_path):
    measured = at(tmp_path / "measured")
    await kept(measured)
    sets = at(tmp_path, budget=measured.used_bytes() * 17 // 10)
    first, content = await kept(sets, "snap-1")
    await sets.cool(0)
    assert await content_of(sets, first) == content  # it lies there twice now
    await kept(sets, "snap-2", seed=2)
    assert not (home(tmp_path) / "raw").exists()
    assert await content_of(sets, first) == content


async def test_packing_ends_with_the_daemon(tmp_path):
    sets = at(tmp_path)
    found, content = await kept(sets)
    sets.stop()
    await sets.cool(0)
    assert (home(tmp_path) / "raw").exists()
    assert await content_of(sets, found) == content
