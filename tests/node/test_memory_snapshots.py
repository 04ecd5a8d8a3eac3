"""Snapshots of memory and forks on real sandboxes: what ran goes on, as another sandbox, or nothing starts at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator

import msgspec
import pytest

from tartarus.model.errors import (
    InvalidRequest,
    NameTaken,
    SnapshotNotFound,
    SnapshotRefused,
    TartarusError,
    Unsupported,
)
from tartarus.model.forking import ForkRequest
from tartarus.model.ids import new_id
from tartarus.model.library import CreateSnapshot, SnapshotInfo
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, Reason, ResourceRequest, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.model.snapshots import ImportSnapshot, SnapshotKind
from tartarus.model.states import State
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node

from .conftest import TENANT, finish

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "busybox")]
LEVELS = [
    pytest.param(Isolation.GVISOR, marks=pytest.mark.needs("runsc")),
    pytest.param(Isolation.MICROVM, marks=pytest.mark.needs("microvm")),
]
ONE_LEVEL = LEVELS[:1]
"""What the store of sets decides is the same at every level, and machines are slow."""
COUNT = "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); echo $i >>/tmp/count; sleep 0.05; done"


@pytest.fixture(params=LEVELS, ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> Isolation:
    found: Isolation = request.param
    return found


@pytest.fixture(params=ONE_LEVEL, ids=lambda level: level.value)
def one_level(request: pytest.FixtureRequest) -> Isolation:
    found: Isolation = request.param
    return found


@pytest.fixture(autouse=True)
async def clean(node) -> AsyncIterator[None]:
    yield
    for snapshot in await node.library.snapshots.list(TENANT):
        await node.library.snapshots.delete(TENANT, snapshot.id)


async def said(sandbox: Sandbox, script: str) -> str:
    """What a script in a sandbox wrote."""
    process = await sandbox.exec(ExecSpec(argv=("sh", "-c", script)))
    out = b""
    while (piece := await process.read()) is not None:
        out += piece[1]
    return out.decode()


async def lines(sandbox: Sandbox, count: int) -> list[int]:
    """The next whole numbers that its main command writes."""
    held = b""
    assert sandbox.main is not None
    while held.count(b"\n") < count + 1:
        piece = await asyncio.wait_for(sandbox.main.read(), 30)
        assert piece is not None
        held += piece[1]
    return [int(line) for line in held.split(b"\n")[:-1]]


async def counting(node: Node, level: Isolation, **spec: object) -> Sandbox:
    command = ExecSpec(argv=("sh", "-c", COUNT))
    sandbox = await node.create(TENANT, SandboxSpec(isolation=level, command=command, timeout_s=240, **spec))  # type: ignore[arg-type]
    await lines(sandbox, 3)
    return sandbox


async def idle(node: Node, level: Isolation, **spec: object) -> Sandbox:
    return await node.create(TENANT, SandboxSpec(isolation=level, timeout_s=240, **spec))  # type: ignore[arg-type]


async def taken(node: Node, sandbox: Sandbox, name: str = "") -> SnapshotInfo:
    request = CreateSnapshot(sandbox.record.id, name, kind=SnapshotKind.MEMORY)
    return await node.library.snapshots.create(TENANT, request)


async def again(node: Node, snapshot: str, **spec: object) -> Sandbox:
    return await node.create(TENANT, SandboxSpec(snapshot=snapshot, timeout_s=240, **spec))  # type: ignore[arg-type]


IDENTITY = "hostname; cat /etc/machine-id 2>/dev/null; head -c 24 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid 2>/dev/null"


async def test_what_ran_goes_on_as_another_sandbox(node, level):
    source = await counting(node, level, name="source", env={"A": "1"}, labels={"x": "y"})
    await said(source, "echo kept >/srv/file; sleep 200 & echo $! >/srv/pid")
    info = await taken(node, source, "all")
    assert (info.kind, info.isolation, info.name, info.sandbox) == ("memory", level.value, "all", source.record.id)
    assert info.paused_ms is not None
    assert info.size_bytes > 0
    before = await lines(source, 3)
    assert before == list(range(before[0], before[0] + len(before)))  # the source lost nothing, and doubled nothing

    copy = await again(node, "all", name="copy", labels={"z": "1"})
    record = copy.record
    assert (record.state, record.isolation, record.spec.name) == (State.RUNNING, level, "copy")
    assert (record.spec.labels, record.spec.env) == ({"z": "1"}, {"A": "1"})
    numbers = await lines(copy, 3)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[0] > 3
    assert await said(copy, "cat /srv/file; kill -0 $(cat /srv/pid) && echo alive") == "kept\nalive\n"
    assert await said(copy, "echo $A") == "1\n"
    mine, its = (await said(source, IDENTITY)).splitlines(), (await said(copy, IDENTITY)).splitlines()
    assert (mine[0], its[0]) == (source.record.id, copy.record.id)
    assert not set(mine) & set(its) - {""}
    clock = await said(copy, "date +%s")
    import time

    assert abs(int(clock) - time.time()) < 10
    await source.kill()
    assert await said(copy, "echo lives") == "lives\n"
    await copy.kill()


async def test_another_command_takes_the_place_of_the_one_in_it(node, one_level):
    source = await counting(node, one_level)
    info = await taken(node, source)
    await source.kill()
    copy = await again(
        node,
        info.id,
        command=ExecSpec(argv=("sh", "-c", "a=$(tail -n 1 /tmp/count); sleep 1; tail -n 1 /tmp/count; echo $a")),
    )
    ran = await finish(copy)
    later, earlier = (int(line) for line in ran.out.split())
    assert later > earlier  # the old one runs on beside it
    assert ran.record.state is State.SUCCEEDED


async def test_snapshots_outlive_the_daemon(node, level, state_dir, store):
    source = await idle(node, level)
    await said(source, "mkdir -p /srv; echo kept >/srv/file; sleep 300 &")
    info = await taken(node, source, "later")
    await source.kill()
    other = Node(Settings.at(state_dir), store)
    try:
        await node.stop(Reason.NODE_DRAIN)
        await other.start()
        copy = await again(other, "later")
        assert await said(copy, "cat /srv/file; pgrep sleep | wc -l") == "kept\n1\n"
        await copy.kill()
        await other.memory.sets.cool(0)
        copy = await again(other, info.id)
        assert await said(copy, "cat /srv/file") == "kept\n"
        await copy.kill()
        await other.library.snapshots.delete(TENANT, "later")
        assert other.memory.sets.used_bytes() == 0
    finally:
        await other.stop(Reason.NODE_DRAIN)


async def test_forks_are_live_copies_with_an_identity_of_their_own(node, level):
    source = await counting(node, level, name=f"worker-{level.value}")
    await said(source, "echo kept >/srv/file")
    result = await node.fork(TENANT, source.record.id, ForkRequest(3))
    assert result.kind is SnapshotKind.MEMORY
    assert result.paused_ms > 0
    assert [child.error for child in result.children] == [None] * 3
    copies = [node.live(TENANT, child.sandbox.id) for child in result.children if child.sandbox is not None]
    assert [copy.record.name for copy in copies] == [f"worker-{level.value}-{number}" for number in (1, 2, 3)]
    seen: list[str] = []
    for copy in (source, *copies):
        found = (await said(copy, IDENTITY)).splitlines()
        assert found[0] == copy.record.id
        seen += [line for line in found if line]
        assert await said(copy, "cat /srv/file; echo mine >/srv/file") == "kept\n"
    assert len(set(seen)) == len(seen)
    counts = [int(await said(copy, "tail -n 1 /tmp/count")) for copy in (source, *copies)]
    await asyncio.sleep(0.3)
    for copy, count in zip((source, *copies), counts, strict=True):
        assert int(await said(copy, "tail -n 1 /tmp/count")) > count
    # Their output is in logs of their own, and theirs alone.
    await copies[0].kill()
    logged = [entry.data async for entry in node.log(copies[0].record).read()]
    assert re.fullmatch(rb"(\d+\n)+", b"".join(logged))
    before = await lines(source, 3)
    assert before == list(range(before[0], before[0] + len(before)))
    metric = f'tartarus_snapshot_restore_duration_seconds_count{{isolation="{level.value}",node="local"}} 3.0'
    assert metric in node._metrics.render().decode()


async def test_a_paused_sandbox_stays_paused(node, one_level):
    source = await counting(node, one_level)
    await source.pause()
    info = await taken(node, source)
    assert source.record.state is State.PAUSED
    copy = await again(node, info.id)
    await lines(copy, 2)
    await source.resume()
    await lines(source, 2)


async def test_a_pause_that_comes_while_it_is_saved_holds(node, one_level):
    source = await counting(node, one_level)
    saving = [asyncio.create_task(taken(node, source)) for _ in range(2)]
    await asyncio.sleep(0.05)
    await source.pause()
    await asyncio.gather(*saving)
    assert source.record.state is State.PAUSED
    await asyncio.sleep(0.5)  # whoever is saved while paused runs for a moment, and is paused again
    used = source.guest.stats().cpu_usec
    await asyncio.sleep(0.5)
    assert source.guest.stats().cpu_usec - used < 50_000
    await source.resume()
    await lines(source, 2)


async def test_what_can_not_be_is_refused_before_anything_starts(node, one_level):
    source = await idle(node, one_level)
    info = await taken(node, source, "taken")
    before = set(node._live)
    other = Isolation.CONTAINER
    for spec in (
        {"isolation": other},
        {"resources": ResourceRequest(memory_bytes=2**30)},
        {"mounts": (Mount("/tmp", "/mnt"),)},
    ):
        with pytest.raises((Unsupported, InvalidRequest)):
            await again(node, "taken", **spec)
    with pytest.raises(NameTaken):
        await taken(node, source, "taken")
    with pytest.raises(SnapshotNotFound):
        await node.create("uid-54321", SandboxSpec(snapshot=info.id))
    with pytest.raises(SnapshotNotFound):
        await node.create("uid-54321", SandboxSpec(snapshot="taken"))
    with pytest.raises(TartarusError):
        await node.library.snapshots.create("uid-54321", CreateSnapshot(source.record.id, kind=SnapshotKind.MEMORY))
    assert set(node._live) == before


async def test_what_fits_another_host_is_refused_here(node, one_level, monkeypatch):
    source = await idle(node, one_level)
    info = await taken(node, source)
    runtime = node._levels.runtimes[one_level]
    needs = runtime.needs
    for changed in ({"monitor": "other 9"}, {"more": "x"}):
        monkeypatch.setattr(runtime, "needs", lambda snapshot, changed=changed: needs(snapshot) | changed)
        with pytest.raises(SnapshotRefused, match="can't go on here"):
            await again(node, info.id)
    assert set(node._live) == {source.record.id}


async def test_memory_goes_on_over_no_other_template(node, one_level, maker, store):
    """A set whose manifest names another template than its memory came from: as no honest host writes it."""
    source = await idle(node, one_level)
    info = await taken(node, source)
    await maker.build("other")
    other = await node._offers.find(TENANT, "other")
    sets = node.memory.sets
    async with sets.taken(TENANT, info.id, info.digest) as found, sets.staging(TENANT) as place:
        for path in found.path.iterdir():
            shutil.copy(path, place / path.name)
        facts = msgspec.structs.replace(found.facts, offer=msgspec.to_builtins(other))
        kept = await sets.keep(TENANT, new_id("snap"), place, facts)
    record = await store.snapshots.get(TENANT, info.id)
    await store.snapshots.insert(
        msgspec.structs.replace(record, id=kept.id, name="forged", digest=kept.digest, layers=other.layers)
    )
    with pytest.raises(SnapshotRefused, match="can't go on here"):
        await again(node, "forged")
    assert set(node._live) == {source.record.id}


@pytest.mark.parametrize("what", ["raw", "maps", "manifest.json"])
async def test_damaged_memory_starts_nothing(node, one_level, what):
    source = await idle(node, one_level)
    info = await taken(node, source)
    place = node.memory.sets._place(TENANT, info.id)
    path = place / what
    if path.is_dir():
        path = max(path.iterdir(), key=lambda one: one.stat().st_size)
    size = path.stat().st_size
    with path.open("r+b") as file:
        with contextlib.suppress(OSError):
            size = os.lseek(file.fileno(), 0, os.SEEK_DATA) + 100
        file.seek(min(size, path.stat().st_size - 1))
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(SnapshotRefused, match="damaged"):
        await again(node, info.id)
    assert set(node._live) == {source.record.id}


async def test_exported_memory_goes_on_after_import(node, one_level, tmp_path):
    source = await idle(node, one_level)
    await said(source, "mkdir -p /srv; echo kept >/srv/file")
    info = await taken(node, source)
    await source.kill()
    pieces = [piece async for piece in node.library.snapshots.export(TENANT, info.id)]
    await node.library.snapshots.delete(TENANT, info.id)

    async def upload(data: bytes) -> ImportSnapshot:
        async def chunks() -> AsyncIterator[bytes]:
            yield data

        return ImportSnapshot((await node.library.uploads.put(TENANT, chunks())).id, "brought")

    brought = await node.library.snapshots.bring(TENANT, await upload(b"".join(pieces)))
    assert (brought.kind, brought.isolation, brought.digest) == (SnapshotKind.MEMORY, one_level.value, info.digest)
    copy = await again(node, "brought")
    assert await said(copy, "cat /srv/file") == "kept\n"
    damaged = bytearray(b"".join(pieces))
    damaged[-1000] ^= 1
    await node.library.snapshots.delete(TENANT, "brought")
    with pytest.raises(SnapshotRefused):
        await node.library.snapshots.bring(TENANT, await upload(bytes(damaged)))
    assert await node.library.snapshots.list(TENANT) == []


async def test_containers_have_no_memory_to_save(node):
    source = await idle(node, Isolation.CONTAINER)
    with pytest.raises(Unsupported, match="gvisor or microvm"):
        await taken(node, source)
    assert msgspec.to_builtins(source.record.state) == "running"
