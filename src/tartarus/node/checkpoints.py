"""Checkpoints (Thanatos): snapshots that also know what their sandbox was asked to be, to start it anew from there.

With its memory where the level can save that: as it was before any signal, so that it goes on as if nothing had
happened. Else with its files: as they were after its grace, so that what the program flushed is there.
"""

from __future__ import annotations

import builtins
from collections.abc import Awaitable, Callable

import msgspec

from tartarus.model.errors import InvalidState, SnapshotNotFound, TartarusError
from tartarus.model.library import SnapshotInfo
from tartarus.model.lifecycle import CheckpointRequest
from tartarus.model.sandbox import SandboxRecord, SandboxSpec
from tartarus.model.snapshots import SnapshotKind
from tartarus.node.memory import Memory
from tartarus.node.sandbox import Sandbox
from tartarus.node.snapshots import SnapshotService
from tartarus.store.sandboxes import SandboxStore

LABEL = "tartarus.io/checkpoint"
"""On every checkpoint: the id of its sandbox."""


class Checkpoints:
    """One node's. `create`: makes a sandbox."""

    def __init__(
        self, store: SandboxStore, snapshots: SnapshotService, memory: Memory,
        create: Callable[[str, SandboxSpec], Awaitable[Sandbox]],
    ) -> None:  # fmt: skip
        self._store = store.snapshots
        self._snapshots = snapshots
        self._memory = memory
        self._create = create

    def has_memory(self, sandbox: Sandbox) -> bool:
        """Whether a checkpoint of it has its memory."""
        return self._memory.can_save(sandbox.record.isolation) and not sandbox.record.spec.mounts

    async def take(self, sandbox: Sandbox, request: CheckpointRequest) -> SnapshotInfo:
        """A checkpoint of a live sandbox, which goes on. Raises what taking snapshots does."""
        if self.has_memory(sandbox):
            return await self._snapshots.create_of_memory(sandbox, name=request.name, labels=_labels(sandbox))
        return await self._snapshots.create_of_files(sandbox, request.name, _labels(sandbox), details=_details(sandbox))

    async def take_and_end(
        self, sandbox: Sandbox, request: CheckpointRequest,
        end: Callable[[Callable[[], Awaitable[None]] | None], Awaitable[SandboxRecord]],
    ) -> tuple[SandboxRecord, SnapshotInfo]:  # fmt: skip
        """A checkpoint of a sandbox that `end` ends, which runs its argument when only the files are left.

        When the checkpoint fails before the end has begun, the sandbox goes on.
        """
        if self.has_memory(sandbox):
            taken = await self.take(sandbox, request)
            return await end(None), taken
        await self._snapshots.check_files(sandbox, request.name)
        found: list[SnapshotInfo | TartarusError] = []

        async def last() -> None:
            try:
                found.append(
                    await self._snapshots.create_of_files(
                        sandbox, request.name, _labels(sandbox), details=_details(sandbox), ending=True
                    )
                )
            except TartarusError as error:
                found.append(error)

        record = await end(last)
        kept = found[0] if found else InvalidState("it was ending already")
        if isinstance(kept, TartarusError):
            raise InvalidState(f"sandbox {record.id} has ended without a checkpoint", why=str(kept)) from kept
        return record, kept

    async def list(self, tenant: str) -> builtins.list[SnapshotInfo]:
        """The tenant's, newest first."""
        return [info for info in await self._snapshots.list(tenant) if LABEL in info.labels]

    async def resume(self, tenant: str, name: str) -> Sandbox:
        """A new sandbox, as the checkpoint's was, from where it was. Raises what making one may."""
        record = await self._store.get(tenant, name)
        is_memory = record.kind is SnapshotKind.MEMORY
        if LABEL not in record.labels or not (is_memory or "spec" in record.details):
            raise SnapshotNotFound(
                f"{name!r} is a snapshot, and no checkpoint", fix=f"use it with: tartarus run --snapshot {name} -- …"
            )
        if is_memory:
            saved = (await self._memory.source(tenant, record.id, record.digest)).spec
            # The rest is what its memory was saved with.
            spec = SandboxSpec(snapshot=record.id, timeout_s=saved.timeout_s, labels=saved.labels)
        else:
            saved = msgspec.convert(record.details["spec"], SandboxSpec)
            spec = msgspec.structs.replace(saved, snapshot=record.id, name="")
        return await self._create(tenant, spec)


def _labels(sandbox: Sandbox) -> dict[str, str]:
    return {LABEL: sandbox.record.id}


def _details(sandbox: Sandbox) -> dict[str, object]:
    return {"spec": msgspec.to_builtins(sandbox.spec)}
