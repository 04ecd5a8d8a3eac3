"""Layers as the node asks for them: unpacked once, whole or not at all, whoever asks and whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.escape.images.archives import END, Blob, blob, directory, file, gzipped, sha256
from tests.escape.images.ground import UID_BASE, holders, kinds

from tartarus.images.store import LayerStore
from tartarus.images.unpack.layers import layer_name, unpack_layer, unpack_layers
from tartarus.images.unpack.limits import Limits
from tartarus.images.unpack.removal import remover
from tartarus.model.errors import ImageRefused, NoSpace

pytestmark = [pytest.mark.anyio, pytest.mark.needs("user-namespaces")]

LAYER = gzipped(directory(b"etc") + file(b"etc/motd", b"hello") + END)
LONG = file(b"big", bytes(96 << 20)) + END


def place(folder: Path, layer: Blob) -> Path:
    path = folder / layer.descriptor.digest.removeprefix("sha256:")
    path.write_bytes(layer.data)
    return path


async def unpack(folder: Path, layer: Blob, store: LayerStore, limits: Limits | None = None) -> Path:
    return await unpack_layer(store, place(folder, layer), layer.descriptor, layer.diff_id, UID_BASE, limits)


async def test_a_layer_is_unpacked_once(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store")
    tree = await unpack(tmp_path, LAYER, store)
    assert (tree / "etc" / "motd").read_text() == "hello"
    before = tree.stat().st_ino
    assert (await unpack(tmp_path, LAYER, store)).stat().st_ino == before
    facts = store.manifest(layer_name(LAYER.descriptor, LAYER.diff_id, UID_BASE))
    assert (facts["entries"], facts["bytes"], facts["diff_id"]) == (2, 5, LAYER.diff_id)


async def test_those_who_ask_at_once_share_the_work(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store")
    path = place(tmp_path, LAYER)
    wanted = [(path, LAYER.descriptor, LAYER.diff_id)] * 8
    trees = await unpack_layers(store, wanted, UID_BASE)
    assert len(set(trees)) == 1
    assert len(list((tmp_path / "store").iterdir())) == 1


async def test_many_layers_come_in_their_order(tmp_path: Path) -> None:
    layers = [blob(file(b"f", b"%d" % number) + END) for number in range(6)]
    wanted = [(place(tmp_path, layer), layer.descriptor, layer.diff_id) for layer in layers]
    trees = await unpack_layers(LayerStore(tmp_path / "store"), wanted, UID_BASE)
    assert [(tree / "f").read_text() for tree in trees] == [str(number) for number in range(6)]


async def test_one_bad_layer_fails_all_with_its_reason(tmp_path: Path) -> None:
    bad = blob(file(b"../f") + END)
    wanted = [(place(tmp_path, layer), layer.descriptor, layer.diff_id) for layer in (LAYER, bad, LAYER)]
    with pytest.raises(ImageRefused, match="leads out"):
        await unpack_layers(LayerStore(tmp_path / "store"), wanted, UID_BASE)
    assert holders(tmp_path) == []


async def test_a_blob_poisons_no_layer_but_its_own(tmp_path: Path) -> None:
    # Whoever takes the child over by its blob could claim any content: so the blob is part of the name.
    mine = blob(file(b"a") + END, b"exploit", diff_id=LAYER.diff_id)
    assert layer_name(mine.descriptor, mine.diff_id, 1) != layer_name(LAYER.descriptor, LAYER.diff_id, 1)
    assert layer_name(LAYER.descriptor, LAYER.diff_id, 1) != layer_name(LAYER.descriptor, LAYER.diff_id, None)


async def test_progress_is_told(tmp_path: Path) -> None:
    layer = blob(LONG)
    seen: list[tuple[str, int]] = []
    store = LayerStore(tmp_path / "store")
    path = place(tmp_path, layer)
    await unpack_layer(store, path, layer.descriptor, layer.diff_id, UID_BASE, progress=lambda *what: seen.append(what))
    counts = [count for _, count in seen]
    assert {diff_id for diff_id, _ in seen} == {layer.diff_id}
    assert counts == sorted(counts)
    assert 96 << 20 >= counts[-1] > 64 << 20


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.needs("root")
async def test_a_full_disk_leaves_nothing(tmp_path: Path, full_disk: Path) -> None:
    store = LayerStore(full_disk)
    with pytest.raises(NoSpace, match="no space left for layer sha256"):
        await unpack(tmp_path, blob(file(b"big", b"x" * (3 << 20)) + END), store)
    assert list(full_disk.iterdir()) == []
    # And when there is room, it works.
    assert kinds(await unpack(tmp_path, LAYER, store)) == {"etc": "d", "etc/motd": "f"}


async def test_a_cancelled_unpacking_leaves_nothing(tmp_path: Path) -> None:
    layer = blob(LONG)
    path = place(tmp_path, layer)
    begun = asyncio.Event()
    store = LayerStore(tmp_path / "store")
    work = asyncio.create_task(
        unpack_layer(
            store, path, layer.descriptor, layer.diff_id, UID_BASE, progress=lambda _diff_id, _count: begun.set()
        )
    )
    await begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert list((tmp_path / "store").iterdir()) == []
    assert holders(tmp_path) == []


async def test_a_deadline_ends_it(tmp_path: Path) -> None:
    with pytest.raises(ImageRefused, match="takes too long"):
        await unpack(tmp_path, blob(LONG), LayerStore(tmp_path / "store"), Limits(timeout_s=0.001))
    assert list((tmp_path / "store").iterdir()) == []
    assert holders(tmp_path) == []


_UNPACKER = """
import asyncio, sys
from pathlib import Path
from tartarus.images.oci import Descriptor
from tartarus.images.store import LayerStore
from tartarus.images.unpack.layers import unpack_layer
root, digest, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
base = int(sys.argv[4]) if sys.argv[4] != "None" else None
asyncio.run(unpack_layer(
    LayerStore(root / "store"), root / "blob", Descriptor("application/vnd.oci.image.layer.v1.tar", digest, size),
    digest, base, progress=lambda *_: print("going", flush=True)))
"""


@pytest.mark.parametrize("victim", ["host", "child", "group"])
async def test_whatever_is_killed_nothing_is_half_done(tmp_path: Path, victim: str) -> None:
    layer = blob(LONG)
    (tmp_path / "blob").write_bytes(layer.data)
    argv = [sys.executable, "-c", _UNPACKER, str(tmp_path), sha256(LONG), str(len(LONG)), str(UID_BASE)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        if victim == "host":
            process.kill()
        elif victim == "child":
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[0], signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(children[0], signal.SIGKILL)
        process.communicate()
    deadline = time.monotonic() + 30
    while holders(tmp_path):
        assert time.monotonic() < deadline, "the jailed child outlived the daemon"
        await asyncio.sleep(0.01)
    store = LayerStore(tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir() if path.name.startswith(".")] == []
    tree = await unpack_layer(store, tmp_path / "blob", layer.descriptor, layer.diff_id, UID_BASE)
    assert (tree / "big").stat().st_size == 96 << 20


@pytest.mark.needs("root")
async def test_a_layer_is_removed_by_those_who_own_it(tmp_path: Path) -> None:
    assert UID_BASE is not None
    ground = tmp_path / "store"
    await unpack(tmp_path, blob(file(b"d/a", uid=7) + directory(b"d", 0o500, uid=7) + END), LayerStore(ground))
    (layer,) = ground.iterdir()
    (tmp_path / "bait").write_text("untouched")
    (layer / "tree" / "link").symlink_to(tmp_path)
    assert not remover(None)(layer), "who does not own it can't"
    os.chown(layer, UID_BASE, UID_BASE)
    assert remover(UID_BASE)(layer)
    assert list(ground.iterdir()) == []
    assert (tmp_path / "bait").read_text() == "untouched"
    assert remover(UID_BASE)(layer), "what is not there is gone"


_WRITERS = {
    "gnu": ["--format=gnu", "--sparse"],
    "pax 0.0": ["--format=pax", "--sparse", "--sparse-version=0.0"],
    "pax 0.1": ["--format=pax", "--sparse", "--sparse-version=0.1"],
    "pax 1.0": ["--format=pax", "--sparse", "--sparse-version=1.0"],
    "ustar": ["--format=ustar"],
    "v7": ["--format=v7"],
    "attributes": ["--format=pax", "--xattrs", "--xattrs-include=user.*"],
}


@pytest.mark.parametrize("writer", _WRITERS)
async def test_what_gnu_tar_writes_is_read(tmp_path: Path, writer: str) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "plain").write_text("plain")
    os.link(source / "sub" / "plain", source / "hard")
    (source / "soft").symlink_to("sub/plain")
    with (source / "holes").open("wb") as sparse:
        for at in range(40):
            sparse.seek(at << 16)
            sparse.write(b"data")
        sparse.truncate(3 << 20)
    if writer not in {"ustar", "v7"}:
        (source / ("n" * 180)).write_text("long")
    if writer == "attributes":
        os.setxattr(source / "sub" / "plain", "user.note", b"\0=\n")
    archive = tmp_path / "archive"
    tar = [
        "tar",
        *_WRITERS[writer],
        "--numeric-owner",
        "--owner=3",
        "--group=4",
        "-cf",
        str(archive),
        "-C",
        str(source),
        ".",
    ]
    subprocess.run(tar, check=True)
    tree = await unpack(tmp_path, blob(archive.read_bytes()), LayerStore(tmp_path / "store"))
    for path in source.rglob("*"):
        copy = tree / path.relative_to(source)
        if path.is_symlink():
            assert copy.readlink() == path.readlink()
        elif path.is_file():
            assert copy.read_bytes() == path.read_bytes()
            assert copy.stat().st_mtime_ns // 10**9 == path.stat().st_mtime_ns // 10**9
    assert kinds(tree).keys() == kinds(source).keys()
    assert (tree / "hard").stat().st_ino == (tree / "sub" / "plain").stat().st_ino
    if "sparse" in str(_WRITERS[writer]):
        assert (tree / "holes").stat().st_blocks * 512 < 1 << 20
    if writer == "attributes":
        assert os.getxattr(tree / "sub" / "plain", "user.note") == b"\0=\n"
