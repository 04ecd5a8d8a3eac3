"""The blob store: whole and verified or not at all, whoever asks and whatever is killed."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from tartarus.images.blobs import BlobStore, Fetch
from tartarus.images.oci import Descriptor
from tartarus.model.errors import ImageNotFound, ImageRefused, InvalidRequest, RegistryFailed, TemplateFailed

pytestmark = pytest.mark.anyio

CONTENT = bytes(range(256)) * 4096 * 3  # three batches
OLD = 1_000_000_000


def describe(content: bytes, size: int | None = None) -> Descriptor:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return Descriptor("application/octet-stream", digest, len(content) if size is None else size)


def giving(content: bytes, offsets: list[int] | None = None, step: int = 100_000) -> Fetch:
    async def fetch(offset: int) -> AsyncGenerator[bytes, None]:
        if offsets is not None:
            offsets.append(offset)
        for start in range(offset, len(content), step):
            yield content[start : start + step]
            await asyncio.sleep(0)

    return fetch


def breaking(content: bytes, error: BaseException) -> Fetch:
    async def fetch(offset: int) -> AsyncGenerator[bytes, None]:
        yield content[offset:]
        raise error

    return fetch


def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "partial").iterdir() if path.name != "collector")


def age(store: BlobStore, *digests: str) -> None:
    for digest in digests:
        place = store.find(digest)
        assert place is not None
        os.utime(place, (OLD, OLD))


async def test_a_blob_is_kept_under_its_digest(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    wanted = describe(CONTENT)
    assert store.find(wanted.digest) is None
    seen: list[int] = []
    place = await store.ingest(wanted, giving(CONTENT), seen.append)
    assert place.read_bytes() == CONTENT
    assert store.find(wanted.digest) == place
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)
    assert files(tmp_path) == []
    with store.open(wanted.digest) as file:
        assert file.read(10) == CONTENT[:10]
        with pytest.raises(OSError, match=r"not open for writing"):
            file.write(b"x")


async def test_small_content_is_stored_in_one_step(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    stored = await store.put_bytes(b"{}", "application/json")
    assert stored == Descriptor("application/json", describe(b"{}").digest, 2)
    assert store.read(stored.digest, 2) == b"{}"
    with pytest.raises(ImageRefused, match="too large"):
        store.read(stored.digest, 1)
    empty = await store.put_bytes(b"")
    assert store.read(empty.digest, 0) == b""


async def test_a_second_asker_fetches_nothing(tmp_path: Path) -> None:
    store, offsets = BlobStore(tmp_path), list[int]()
    for _ in range(2):
        await store.ingest(describe(CONTENT), giving(CONTENT, offsets))
    assert offsets == [0]


async def test_askers_at_the_same_moment_share_one_download(tmp_path: Path) -> None:
    stores, offsets = [BlobStore(tmp_path), BlobStore(tmp_path)], list[int]()
    asked = [store.ingest(describe(CONTENT), giving(CONTENT, offsets)) for store in stores * 4]
    assert len(set(await asyncio.gather(*asked))) == 1
    assert offsets == [0]


async def test_a_waiting_asker_takes_over_from_one_that_fails(tmp_path: Path) -> None:
    store, offsets = BlobStore(tmp_path), list[int]()
    failing = store.ingest(describe(CONTENT), breaking(CONTENT[:200_000], RegistryFailed("gone")))
    outcomes = await asyncio.gather(
        failing, store.ingest(describe(CONTENT), giving(CONTENT, offsets)), return_exceptions=True
    )
    assert isinstance(outcomes[0], RegistryFailed)
    assert isinstance(outcomes[1], Path)
    assert offsets == [200_000]


async def test_an_interrupted_download_goes_on_where_it_ended(tmp_path: Path) -> None:
    wanted, offsets = describe(CONTENT), list[int]()
    with pytest.raises(RegistryFailed):
        await BlobStore(tmp_path).ingest(wanted, breaking(CONTENT[:1_500_000], RegistryFailed("broken")))
    place = await BlobStore(tmp_path).ingest(wanted, giving(CONTENT, offsets))
    assert offsets == [1_500_000]
    assert place.read_bytes() == CONTENT


async def test_a_cancelled_download_goes_on_where_it_ended(tmp_path: Path) -> None:
    store, wanted, offsets = BlobStore(tmp_path), describe(CONTENT), list[int]()
    arrived = asyncio.Event()

    async def stuck(offset: int) -> AsyncGenerator[bytes, None]:
        yield CONTENT[:1_500_000]
        arrived.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(store.ingest(wanted, stuck))
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.ingest(wanted, giving(CONTENT, offsets))
    assert offsets == [1_500_000]


@pytest.mark.parametrize("moment", range(8))
async def test_cancelling_at_any_moment_loses_nothing(tmp_path: Path, moment: int) -> None:
    store, wanted = BlobStore(tmp_path), describe(CONTENT)
    task = asyncio.create_task(store.ingest(wanted, giving(CONTENT, step=2**20)))
    for _ in range(moment * 3):
        await asyncio.sleep(0.0005)
    task.cancel()
    await asyncio.wait([task])
    assert (await store.ingest(wanted, giving(CONTENT))).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"x" * 1000, CONTENT[:-1] + b"x", CONTENT + b"more", b"x" * 2 * len(CONTENT)])
async def test_a_bad_beginning_is_not_built_upon(tmp_path: Path, left: bytes) -> None:
    """A hostile registry could serve the beginning of another's blob wrongly, and then break off."""
    store, wanted = BlobStore(tmp_path), describe(CONTENT)
    (tmp_path / "partial" / wanted.digest.removeprefix("sha256:")).write_bytes(left)
    assert (await store.ingest(wanted, giving(CONTENT))).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("sent", "size", "reason"),
    [
        (CONTENT[:-1] + b"x", None, "other content"),
        (CONTENT + b"x", None, "longer"),
        (CONTENT[:-1], None, "shorter"),
        (CONTENT, len(CONTENT) - 1, "longer"),
        (CONTENT, len(CONTENT) + 1, "shorter"),
        (CONTENT, 0, "other content"),
    ],
)
async def test_wrong_content_is_refused_and_not_kept(
    tmp_path: Path, sent: bytes, size: int | None, reason: str
) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(ImageRefused, match=reason):
        await store.ingest(describe(CONTENT, size), giving(sent))
    assert store.find(describe(CONTENT).digest) is None
    assert files(tmp_path) == []


async def test_a_wrong_size_is_refused_for_a_blob_that_is_there(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    await store.put_bytes(CONTENT)
    with pytest.raises(ImageRefused, match="not 5 bytes"):
        await store.ingest(describe(CONTENT, 5), giving(CONTENT))


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:../../../etc/passwd", "md5:" + "0" * 32, "sha256:" + "A" * 64]
)
async def test_only_digests_name_blobs(tmp_path: Path, digest: str) -> None:
    store = BlobStore(tmp_path)
    attempts: list[Callable[[], object]] = [
        lambda: store.find(digest), lambda: store.open(digest), lambda: store.hold("me", [digest]),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(ImageRefused, match="not a digest"):
            attempt()
    with pytest.raises(ImageRefused, match="not a digest"):
        await store.ingest(Descriptor("x", digest, 1), giving(b"x"))


async def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound):
        BlobStore(tmp_path).open(describe(CONTENT).digest)


# Drafts: content whose digest is known at the end.


async def test_a_draft_becomes_a_blob(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.draft() as draft:
        draft.write(CONTENT)
        draft.write(b"more")
        assert draft.size == len(CONTENT) + 4
        assert draft.path.read_bytes() == CONTENT + b"more"
        stored = draft.commit("layer")
    assert stored == Descriptor("layer", describe(CONTENT + b"more").digest, len(CONTENT) + 4)
    assert store.find(stored.digest) is not None
    assert files(tmp_path) == []


async def test_a_draft_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.draft() as draft:
        draft.write(CONTENT)
    assert files(tmp_path) == []


async def test_drafts_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    (tmp_path / "partial" / "draft-dead").write_bytes(CONTENT)
    with store.draft() as draft:
        draft.write(CONTENT)
        BlobStore(tmp_path)
        assert files(tmp_path) == [draft.path.name]


# Holding and collecting.


async def test_what_is_held_is_not_collected(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    one, two, three = [(await store.put_bytes(bytes([number]))).digest for number in range(3)]
    store.hold("a", [one, two])
    store.hold("b", [two])
    age(store, one, two, three)
    assert BlobStore(tmp_path).collect() == [three]
    store.release("a")
    age(store, one, two)
    assert store.collect() == [one]
    assert store.held() == {"b": (two,)}
    store.release("b")
    store.release("b")
    age(store, two)
    assert store.collect() == [two]
    assert list((tmp_path / "sha256").iterdir()) == []


async def test_holding_adds_to_what_is_held(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    one, two = [(await store.put_bytes(bytes([number]))).digest for number in range(2)]
    store.hold("a", [one])
    store.hold("a", [two])
    assert set(store.held()["a"]) == {one, two}


async def test_what_was_used_lately_is_not_collected(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    stored = await store.put_bytes(b"x")
    assert store.collect() == []
    age(store, stored.digest)
    assert store.find(stored.digest) is not None
    assert store.collect() == []


async def test_holding_what_is_gone_is_refused_whole(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    there = (await store.put_bytes(b"x")).digest
    store.hold("a", [there])
    with pytest.raises(ImageNotFound):
        store.hold("a", [there, describe(b"gone").digest])
    assert store.held() == {"a": (there,)}
    with pytest.raises(ImageNotFound):
        store.hold("b", [describe(b"gone").digest])
    assert store.held() == {"a": (there,)}


@pytest.mark.parametrize("owner", ["template:a/b", "..", ".", "../x", "é\n", "a" * 200])
async def test_any_name_can_hold(tmp_path: Path, owner: str) -> None:
    store = BlobStore(tmp_path)
    digest = (await store.put_bytes(b"x")).digest
    store.hold(owner, [digest])
    assert BlobStore(tmp_path).held() == {owner: (digest,)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holds", "partial", "sha256"]


@pytest.mark.parametrize("owner", ["", "a" * 300])
async def test_but_not_no_name_or_an_endless_one(tmp_path: Path, owner: str) -> None:
    with pytest.raises(InvalidRequest):
        BlobStore(tmp_path).hold(owner, [])


async def test_a_damaged_record_stops_the_collection(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    stored = await store.put_bytes(b"x")
    store.hold("a", [stored.digest])
    age(store, stored.digest)
    (tmp_path / "holds" / "a.json").write_bytes(b"[")
    with pytest.raises(TemplateFailed, match="damaged"):
        store.collect()
    assert store.find(stored.digest) is not None


async def test_downloads_given_up_are_collected_and_running_ones_are_not(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    given_up, running = (tmp_path / "partial" / (letter * 64) for letter in "ab")
    for path in (given_up, running):
        path.write_bytes(b"x")
        os.utime(path, (OLD, OLD))
    with open(running, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.collect()
        assert files(tmp_path) == [running.name]
        assert store.collect(partial_kept_s=time.time()) == []


async def test_using_and_collecting_at_once_trip_over_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    stored = await store.put_bytes(b"x")
    stop = asyncio.Event()

    def collect() -> None:
        for _ in range(200):
            store.collect(grace_s=0.001)

    async def use() -> None:
        while not stop.is_set():
            if store.find(stored.digest) is None:
                await store.put_bytes(b"x")
            await asyncio.sleep(0)

    user = asyncio.create_task(use())
    await asyncio.to_thread(collect)
    stop.set()
    await user
    assert not list((tmp_path / "partial").glob("trash-*"))


# Killed processes.


async def test_a_process_killed_before_the_last_step_leaves_only_that(tmp_path: Path) -> None:
    store, wanted, offsets = BlobStore(tmp_path), describe(CONTENT), list[int]()
    (tmp_path / "partial" / wanted.digest.removeprefix("sha256:")).write_bytes(CONTENT)
    place = await store.ingest(wanted, giving(CONTENT, offsets))
    assert place.read_bytes() == CONTENT
    assert place.stat().st_mode & 0o777 == 0o400
    assert offsets == []


WRITER = """
import asyncio, sys
from pathlib import Path
from tartarus.images.blobs import BlobStore
from tartarus.images.oci import Descriptor

async def fetch(offset):
    yield bytes(1500000 - offset)
    print("there", flush=True)
    await asyncio.Event().wait()

asyncio.run(BlobStore(Path(sys.argv[1])).ingest(Descriptor("x", sys.argv[2], 3000000), fetch))
"""


async def test_a_killed_process_leaves_its_part_for_the_next(tmp_path: Path) -> None:
    wanted, offsets, content = describe(bytes(3_000_000)), list[int](), bytes(3_000_000)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), wanted.digest], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    store = BlobStore(tmp_path)
    task = asyncio.create_task(store.ingest(wanted, giving(content, offsets)))
    await asyncio.sleep(0.1)
    assert not task.done()  # the other process is at it
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert (await task).read_bytes() == content
    assert len(offsets) == 1
    assert offsets[0] > 0
