"""Pulls that are killed, that meet at one store, and that find the disk full."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import random
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.images.registries import Answer, MadeImage, Request, Server, Shelf, make_image, write_layout

from tartarus.images.blobs import BlobStore
from tartarus.images.oci import Platform
from tartarus.images.reference import Reference
from tartarus.images.registry import RegistrySettings, pull
from tartarus.images.sources import load
from tartarus.model.errors import NoSpace

pytestmark = pytest.mark.anyio

AMD64 = Platform()
MADE = make_image(*({f"f{number}": os.urandom(3_000_000)} for number in range(6)), compress=False)
PULLER = """
import asyncio, sys
from pathlib import Path
from tartarus.images.blobs import BlobStore
from tartarus.images.oci import Platform
from tartarus.images.reference import Reference
from tartarus.images.registry import RegistrySettings, pull

async def main():
    blobs = BlobStore(Path(sys.argv[1]))
    print("up", flush=True)
    image = await pull(Reference.parse(sys.argv[2]), blobs, RegistrySettings(), platform=Platform())
    print(image.digest, flush=True)

asyncio.run(main())
"""


def slowly(request: Request) -> Answer:
    """Layers take a moment, so that a kill finds them half there."""
    return Shelf(MADE).route(request)._replace(pause_s=0.015)


def start(root: Path, server: Server) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PULLER, str(root), f"{server.host}/app"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = process.stdout.read()
    process.wait()
    process.stdout.close()
    return said.strip()


def stored(root: Path) -> int:
    """How many bytes of blobs are there, half ones included."""
    found = 0
    for path in [*root.glob("sha256/*"), *root.glob("partial/*")]:
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def check_whole(root: Path, made: MadeImage) -> None:
    """Exactly the image's blobs, each as it should be, and nothing half done."""
    store = BlobStore(root)
    wanted = {blob.digest: blob.content for blob in (*made.blobs, made.manifest)}
    assert {f"sha256:{path.name}" for path in (root / "sha256").iterdir()} == set(wanted)
    assert all(store.read(digest, 2**30) == content for digest, content in wanted.items())
    assert list((root / "partial").iterdir()) == []


async def test_whenever_a_pull_is_killed_the_next_completes_it(tmp_path: Path) -> None:
    chance = random.Random(20261121)
    with Server(slowly) as server:
        for step in range(6):
            process = start(tmp_path, server)
            enough = (step + chance.random()) * 3_000_000
            while stored(tmp_path) < enough and process.poll() is None:
                await asyncio.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            end(process)
            for path in (tmp_path / "sha256").iterdir():
                blob = next(each for each in (*MADE.blobs, MADE.manifest) if each.digest.endswith(path.name))
                assert path.read_bytes() == blob.content
        process = start(tmp_path, server)
        assert end(process) == MADE.manifest.digest
        ranges = [request for request in server.requests if "range" in request.headers]
    check_whole(tmp_path, MADE)
    assert ranges  # something was taken up where it broke


async def test_processes_that_pull_one_image_do_the_work_once(tmp_path: Path) -> None:
    with Server(slowly) as server:
        processes = [start(tmp_path, server) for _ in range(3)]
        assert {end(process) for process in processes} == {MADE.manifest.digest}
        fetched = [request.path for request in server.requests if "/blobs/" in request.path]
    assert sorted(fetched) == sorted(set(fetched))
    assert len(fetched) == len(MADE.blobs)
    check_whole(tmp_path, MADE)


async def test_when_one_of_them_is_killed_the_others_go_on(tmp_path: Path) -> None:
    with Server(slowly) as server:
        first, second = start(tmp_path, server), start(tmp_path, server)
        await asyncio.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        end(first)
        assert end(second) == MADE.manifest.digest
    check_whole(tmp_path, MADE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with less room than the image needs."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def grow(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)


def check_nothing_half(root: Path) -> None:
    store = BlobStore(root)
    for path in (root / "sha256").iterdir():
        blob = next(each for each in (*MADE.blobs, MADE.manifest) if each.digest.endswith(path.name))
        assert store.read(blob.digest, 2**30) == blob.content


@pytest.mark.needs("root")
async def test_a_full_disk_leaves_nothing_half_usable(small_disk: Path) -> None:
    root = small_disk / "blobs"
    blobs = BlobStore(root)
    with Server(Shelf(MADE).route) as server:
        reference = Reference.parse(f"{server.host}/app")
        with pytest.raises(NoSpace) as full:
            await pull(reference, blobs, RegistrySettings(), platform=AMD64)
        assert "free some disk" in full.value.fix
        check_nothing_half(root)
        with pytest.raises(NoSpace):
            await pull(reference, blobs, RegistrySettings(), platform=AMD64)
        grow(small_disk)
        await pull(reference, blobs, RegistrySettings(), platform=AMD64)
    check_whole(root, MADE)


@pytest.mark.needs("root", "user-namespaces")
async def test_an_import_onto_a_full_disk_too(small_disk: Path, tmp_path: Path) -> None:
    root = small_disk / "blobs"
    blobs = BlobStore(root)
    layout = write_layout(tmp_path / "layout", MADE)
    directory = tmp_path / "root"
    (directory / "usr").mkdir(parents=True)
    (directory / "usr" / "big").write_bytes(os.urandom(10_000_000))
    archive = tmp_path / "root.tar"
    with tarfile.open(archive, "w") as out:
        out.add(directory, ".")
    packed = tmp_path / "root.tar.gz"
    packed.write_bytes(gzip.compress(archive.read_bytes(), 1))
    for place in (layout, directory, archive, packed):
        with pytest.raises(NoSpace):
            await load(place, blobs, platform=AMD64)
        check_nothing_half(root)
        assert not list((root / "partial").glob("draft-*"))


@pytest.mark.needs("root")
async def test_holding_on_a_full_disk_is_refused_and_forgets_nothing(small_disk: Path) -> None:
    blobs = BlobStore(small_disk / "blobs")
    one, two = [(await blobs.put_bytes(bytes([number]))).digest for number in range(2)]
    blobs.hold("owner", [one])
    with open(small_disk / "filler", "wb") as filler, pytest.raises(OSError, match="No space"):  # noqa: PT012
        while True:
            filler.write(bytes(2**20))
            filler.flush()
    with pytest.raises(NoSpace):
        blobs.hold("owner", [two])
    assert blobs.held() == {"owner": (one,)}
