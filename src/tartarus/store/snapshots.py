"""The snapshots that users took of their sandboxes."""

from __future__ import annotations

from tartarus.model.errors import NameTaken, SnapshotNotFound
from tartarus.model.library import SnapshotRecord
from tartarus.store.owned import SNAPSHOTS
from tartarus.store.owned_store import OwnedStore


class SnapshotStore(OwnedStore[SnapshotRecord]):
    """`SandboxStore.snapshots`, newest first. Raises NameTaken and SnapshotNotFound."""

    _table = SNAPSHOTS

    def _taken(self, name: str) -> NameTaken:
        return NameTaken(
            f"you already have a snapshot {name!r}",
            fix=f"choose another name, or delete it: tartarus snapshot delete {name}",
        )

    def _not_found(self, name: str) -> SnapshotNotFound:
        return SnapshotNotFound(f"no snapshot {name!r}", fix="see yours with: tartarus snapshot list")
