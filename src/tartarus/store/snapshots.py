"""The snapshots that users took of their sandboxes."""

from __future__ import annotations

import builtins
from typing import Any

from tartarus.model.errors import NameTaken, SnapshotNotFound
from tartarus.model.library import SnapshotRecord
from tartarus.store.owned import SNAPSHOTS
from tartarus.store.writer import Worker


class SnapshotStore:
    """`SandboxStore.snapshots`. Every change is a compare-and-set on the record that it was decided on."""

    def __init__(self, writer: Worker, reader: Worker) -> None:
        self._writer = writer
        self._reader = reader

    async def insert(self, record: SnapshotRecord) -> SnapshotRecord:
        """Add a snapshot. Raises NameTaken when its tenant has one of that name."""

        def job(connection: Any) -> SnapshotRecord:
            if not SNAPSHOTS.insert(connection, record):
                raise NameTaken(
                    f"you already have a snapshot {record.name!r}",
                    fix=f"choose another name, or delete it: tartarus snapshot delete {record.name}",
                )
            return record

        return await self._writer.run(job)

    async def remove(self, record: SnapshotRecord) -> None:
        """Forget a snapshot that is still as `record` says. Raises InvalidState otherwise."""
        await self._writer.run(lambda connection: SNAPSHOTS.remove(connection, record))

    async def get(self, tenant: str, id_or_name: str) -> SnapshotRecord:
        """The tenant's snapshot of that id, name or unique id prefix. Raises SnapshotNotFound and InvalidRequest."""
        record = await self._reader.run(lambda connection: SNAPSHOTS.find(connection, tenant, id_or_name))
        if record is None:
            raise SnapshotNotFound(f"no snapshot {id_or_name!r}", fix="see yours with: tartarus snapshot list")
        return record

    async def list(self, tenant: str) -> builtins.list[SnapshotRecord]:
        """The tenant's snapshots, newest first."""
        return await self._reader.run(lambda connection: SNAPSHOTS.own(connection, tenant))

    async def all(self) -> builtins.list[SnapshotRecord]:
        """Every snapshot of every tenant, oldest first."""
        return await self._reader.run(SNAPSHOTS.everything)
