"""Checkpoints: memory where the level can save it, files elsewhere; and sandboxes that start anew from them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tartarus.model.errors import InvalidState, NameTaken, NoSpace, SnapshotNotFound, Unsupported
from tartarus.model.library import CreateSnapshot
from tartarus.model.lifecycle import CheckpointRequest, DrainRequest, StopRequest
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.model.snapshots import SnapshotKind
from tartarus.model.states import State
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node

from .conftest import TENANT, finish

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]

FLUSHES = "trap 'echo flushed >/work/state; exit 0' TERM; [ -f /work/state ] && cat /work/state; echo up; {}"
WAITS = "while :; do sleep 0.01; done"


async def started(node: Node, isolation: Isolation, script: str, **spec: Any) -> Sandbox:
    command = ExecSpec(argv=("sh", "-c", script))
    sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation, command=command, **spec))
    assert sandbox.main is not None
    said = await sandbox.main.read()
    assert said is not None
    assert said[1].startswith(b"up\n")
    sandbox.detach()
    return sandbox


async def cleared(node: Node) -> None:
    for info in await node.library.snapshots.list(TENANT):
        await node.library.snapshots.delete(TENANT, info.id)


async def test_files_are_kept_as_they_are_after_the_grace(node: Node) -> None:
    sandbox = await started(node, Isolation.CONTAINER, FLUSHES.format(WAITS), labels={"job": "1"})
    stopped = await node.terminator.stop(sandbox, StopRequest(grace_s=60.0, checkpoint=CheckpointRequest("kept")))
    assert stopped.sandbox.state is State.SUCCEEDED
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.kind is SnapshotKind.FILES
    assert [info.id for info in await node.checkpoints.list(TENANT)] == [stopped.checkpoint.id]
    again = await node.checkpoints.resume(TENANT, "kept")
    assert again.record.spec.labels == {"job": "1"}
    assert again.main is not None
    assert await again.main.read() == (1, b"flushed\n")
    await again.kill()
    await cleared(node)


async def test_what_ignores_the_signal_is_kept_all_the_same(node: Node) -> None:
    script = "trap '' TERM; echo up; i=0; while :; do i=$((i+1)); echo $i >>/work/count; done"
    sandbox = await started(node, Isolation.CONTAINER, script)
    request = StopRequest(grace_s=0.2, checkpoint=CheckpointRequest())
    stopped = await node.terminator.stop(sandbox, request)
    assert stopped.sandbox.state is State.KILLED
    assert stopped.checkpoint is not None
    spec = SandboxSpec(snapshot=stopped.checkpoint.id, command=ExecSpec(argv=("cat", "/work/count")))
    assert (await finish(await node.create(TENANT, spec))).out.startswith(b"1\n2\n")
    await cleared(node)


@pytest.mark.needs("runsc")
async def test_memory_goes_on_as_if_nothing_had_happened(node: Node) -> None:
    script = "trap 'echo asked; exit 0' TERM; echo up; i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"
    sandbox = await started(node, Isolation.GVISOR, script)
    await asyncio.sleep(0.3)
    stopped = await node.terminator.stop(sandbox, StopRequest(grace_s=60.0, checkpoint=CheckpointRequest()))
    assert stopped.sandbox.state is State.SUCCEEDED
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.kind is SnapshotKind.MEMORY
    again = await node.checkpoints.resume(TENANT, stopped.checkpoint.id)
    assert again.record.id != sandbox.record.id
    assert again.main is not None
    first = await again.main.read()
    assert first is not None
    assert int(first[1].split()[0]) > 1
    await again.kill()
    await cleared(node)


async def test_a_checkpoint_of_one_that_goes_on(node: Node) -> None:
    sandbox = await started(node, Isolation.CONTAINER, FLUSHES.format(WAITS))
    taken = await node.checkpoints.take(sandbox, CheckpointRequest("now"))
    assert sandbox.record.state is State.RUNNING
    with pytest.raises(NameTaken):
        await node.checkpoints.take(sandbox, CheckpointRequest("now"))
    with pytest.raises(NameTaken):  # before anything ends
        await node.terminator.stop(sandbox, StopRequest(checkpoint=CheckpointRequest("now")))
    assert sandbox.record.state is State.RUNNING
    await sandbox.kill()
    again = await node.checkpoints.resume(TENANT, taken.id)
    assert again.record.spec.command == sandbox.record.spec.command
    await again.kill()
    await cleared(node)


async def test_what_can_not_be_kept_goes_on(node: Node) -> None:
    sandbox = await started(node, Isolation.PROCESS, FLUSHES.format(WAITS).replace("/work", "/tmp"))
    with pytest.raises(Unsupported, match="container"):
        await node.terminator.stop(sandbox, StopRequest(checkpoint=CheckpointRequest()))
    assert sandbox.record.state is State.RUNNING
    report = await node.terminator.drain(DrainRequest(checkpoint=CheckpointRequest()))
    node.terminator.undo()
    (ended,) = report.ended
    assert ended.state is State.SUCCEEDED
    assert "snapshot" in ended.message
    assert ended.checkpoint == ""


async def test_a_disk_that_fills_up_at_the_end_is_said(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = await started(node, Isolation.CONTAINER, FLUSHES.format(WAITS))

    async def full(*_: object, **__: object) -> None:
        raise NoSpace("the disk is full")

    monkeypatch.setattr("tartarus.node.snapshots.copy_tree", full)
    with pytest.raises(InvalidState, match=r"ended without a checkpoint.*full"):
        await node.terminator.stop(sandbox, StopRequest(grace_s=60.0, checkpoint=CheckpointRequest()))
    assert sandbox.record.state is State.SUCCEEDED


async def test_only_checkpoints_of_ones_own_are_resumed(node: Node) -> None:
    sandbox = await started(node, Isolation.CONTAINER, FLUSHES.format(WAITS))
    plain = await node.library.snapshots.create(TENANT, CreateSnapshot(sandbox.record.id))
    taken = await node.checkpoints.take(sandbox, CheckpointRequest())
    await sandbox.kill()
    with pytest.raises(SnapshotNotFound, match="no checkpoint"):
        await node.checkpoints.resume(TENANT, plain.id)
    with pytest.raises(SnapshotNotFound):
        await node.checkpoints.resume("somebody-else", taken.id)
    assert await node.checkpoints.list("somebody-else") == []
    await cleared(node)


async def test_a_forged_label_makes_no_checkpoint(node: Node) -> None:
    """A user can write the label; the record then lacks what a checkpoint was asked to be."""
    sandbox = await started(node, Isolation.CONTAINER, FLUSHES.format(WAITS))
    labels = {"tartarus.io/checkpoint": sandbox.record.id}
    forged = await node.library.snapshots.create(TENANT, CreateSnapshot(sandbox.record.id, "", labels))
    await sandbox.kill()
    with pytest.raises(SnapshotNotFound, match="no checkpoint"):
        await node.checkpoints.resume(TENANT, forged.id)
    await cleared(node)


async def test_a_drain_keeps_each(node: Node) -> None:
    sandbox = await started(node, Isolation.CONTAINER, FLUSHES.format(WAITS))
    report = await node.terminator.drain(DrainRequest(signal="TERM", checkpoint=CheckpointRequest()))
    node.terminator.undo()
    (ended,) = report.ended
    assert (ended.id, ended.state) == (sandbox.record.id, State.SUCCEEDED)
    again = await node.checkpoints.resume(TENANT, ended.checkpoint)
    assert again.main is not None
    assert await again.main.read() == (1, b"flushed\n")
    await again.stop()
    await cleared(node)
