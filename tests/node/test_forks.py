"""Copies of live sandboxes at the container level, where files are copied and it is said so."""

from __future__ import annotations

import asyncio

import pytest

from tartarus.model.errors import InvalidRequest, NoSpace, SandboxNotFound, Unsupported
from tartarus.model.forking import ForkRequest
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.model.snapshots import SnapshotKind
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node

from .conftest import TENANT

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "cgroups")]


async def said(sandbox: Sandbox, script: str) -> str:
    """What a script in a sandbox wrote."""
    process = await sandbox.exec(ExecSpec(argv=("sh", "-c", script)))
    out = b""
    while (piece := await process.read()) is not None:
        out += piece[1]
    return out.decode()


async def container(node: Node, **spec: object) -> Sandbox:
    """One that has a file of its own."""
    made = await node.create(TENANT, SandboxSpec(isolation=Isolation.CONTAINER, timeout_s=60, **spec))  # type: ignore[arg-type]
    await said(made, "echo mine >/srv/file")
    return made


async def test_containers_copies_have_its_files_and_say_so(node):
    source = await container(node, name="worker", labels={"a": "1"}, command=ExecSpec(argv=("sleep", "50")))
    result = await node.fork(TENANT, "worker", ForkRequest(3, labels={"b": "2"}))
    assert (result.source, result.kind) == (source.record.id, SnapshotKind.FILES)
    assert "nothing runs in the copies" in result.note
    assert result.paused_ms > 0
    records = [child.sandbox for child in result.children]
    assert [record.name for record in records] == ["worker-1", "worker-2", "worker-3"]
    assert len({record.id for record in (*records, source.record)}) == 4
    names = set()
    for record in records:
        assert record.spec.labels == {"a": "1", "b": "2"}
        assert (record.spec.command, record.isolation) == (None, Isolation.CONTAINER)
        child = node.live(TENANT, record.id)
        assert await said(child, "cat /srv/file; echo changed >/srv/file") == "mine\n"
        names.add(await said(child, "hostname; cat /etc/machine-id 2>/dev/null"))
    assert len(names) == 3
    assert await said(source, "cat /srv/file") == "mine\n"
    assert await node.library.snapshots.list(TENANT) == []
    again = await node.fork(TENANT, "worker", ForkRequest(1))
    assert again.children[0].sandbox.name == "worker-4"
    named = await node.fork(TENANT, "worker", ForkRequest(1, name="other"))
    assert named.children[0].sandbox.name == "other-1"


async def test_a_copy_that_fails_is_its_own_trouble(node, monkeypatch):
    source = await container(node, name="lone")
    create, count = node.create, 0

    async def second_fails(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 2:
            raise NoSpace("full")
        return await create(*arguments)

    monkeypatch.setattr(node._forker, "_create", second_fails)
    result = await node.fork(TENANT, source.record.id, ForkRequest(3))
    assert sorted(child.sandbox is None for child in result.children) == [False, False, True]
    (error,) = [child.error for child in result.children if child.error is not None]
    assert (error.code, error.what) == ("no_space", "full")


async def test_who_hangs_up_leaves_no_copies(node, monkeypatch):
    source = await container(node)
    create, made = node.create, 0

    async def counted(*arguments: object) -> object:
        nonlocal made
        sandbox = await create(*arguments)
        made += 1
        return sandbox

    monkeypatch.setattr(node._forker, "_create", counted)
    forking = asyncio.create_task(node.fork(TENANT, source.record.id, ForkRequest(32)))
    while made < 2:
        await asyncio.sleep(0.005)
    forking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forking
    assert list(node._live) == [source.record.id]
    assert await node.library.snapshots.list(TENANT) == []


async def test_what_can_not_be_forked_says_what_to_do(node):
    process = await node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS, timeout_s=60))
    with pytest.raises(Unsupported, match="gvisor or microvm"):
        await node.fork(TENANT, process.record.id, ForkRequest(1))
    with pytest.raises(SandboxNotFound):
        await node.fork("uid-54321", process.record.id, ForkRequest(1))
    for count in (0, -1, 65, 2**40):
        with pytest.raises(InvalidRequest):
            ForkRequest(count)
    for name in ("-x", "sbx-abc", "a" * 60):
        with pytest.raises(InvalidRequest):
            ForkRequest(1, name)
