"""Snapshots of sandboxes that end, or lie about their storage, in the middle of it."""

from __future__ import annotations

import pytest

from tartarus.model.errors import ImageRefused, TartarusError, Unsupported
from tartarus.model.library import CreateSnapshot
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node

from .conftest import TENANT
from .making import Maker

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "cgroups")]
NEIGHBOUR = "uid-54321"


async def started(node: Node, tenant: str, script: str) -> Sandbox:
    """A sandbox that ran a script."""
    sandbox = await node.create(tenant, SandboxSpec(template="host", isolation=Isolation.CONTAINER, timeout_s=60))
    process = await sandbox.exec(ExecSpec(argv=("sh", "-c", script)))
    while await process.read() is not None:
        pass
    return sandbox


@pytest.mark.parametrize("moment", ["paused", "found"])
async def test_a_neighbours_files_are_never_taken(maker: Maker, node: Node, monkeypatch, moment):
    mine = await started(node, TENANT, "echo mine >/srv/file")
    neighbours: list[Sandbox] = []

    async def swap() -> None:
        """End the sandbox; its neighbours get the descriptors that it had."""
        await mine.kill()
        neighbours.extend([await started(node, NEIGHBOUR, "echo secret >/srv/file") for _ in range(3)])

    pause, find = Sandbox.pause, mine.guest.changes

    async def pause_and_swap(sandbox: Sandbox) -> None:
        await pause(sandbox)
        await swap()

    try:
        if moment == "paused":
            monkeypatch.setattr(Sandbox, "pause", pause_and_swap)
            taken = await node.library.snapshots.create(TENANT, CreateSnapshot(sandbox=mine.record.id, name="taken"))
            assert await maker.out("host", "cat", "/srv/file", snapshot=taken.id) == "mine\n"
        else:
            await swap()
            assert find() is None
            with pytest.raises(TartarusError):
                await node.library.snapshots.create(TENANT, CreateSnapshot(sandbox=mine.record.id, name="taken"))
    finally:
        for sandbox in neighbours:
            await sandbox.kill()


async def test_no_snapshot_is_used_where_its_files_would_not_show(maker: Maker, node: Node):
    mine = await started(node, TENANT, "echo mine >/srv/file")
    taken = await node.library.snapshots.create(TENANT, CreateSnapshot(sandbox=mine.record.id, name="taken"))
    await mine.kill()
    with pytest.raises(Unsupported):
        await maker.out("host", "cat", "/srv/file", snapshot=taken.id, isolation=Isolation.PROCESS)


async def test_nothing_stands_where_the_nursery_mounts(node: Node):
    mine = await started(node, TENANT, "ln -s /srv /.tartarus")
    with pytest.raises(ImageRefused):
        await node.library.snapshots.create(TENANT, CreateSnapshot(sandbox=mine.record.id, name="taken"))
    await mine.kill()
