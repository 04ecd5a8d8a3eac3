"""`Snapshot`: what a sandbox had changed in its files at one moment, to go on from as often as one likes."""

from __future__ import annotations

import builtins

from tartarus.model.library import SnapshotInfo
from tartarus.sdk import library_calls as calls
from tartarus.sdk.client import Client


class Snapshot:
    """A snapshot. Take one with `Sandbox.snapshot`; go on from it with ``Sandbox.create(snapshot=…)``."""

    def __init__(self, info: SnapshotInfo, client: Client) -> None:
        self._info = info
        self._client = client

    @classmethod
    def get(cls, name: str, *, client: Client | None = None) -> Snapshot:
        """The snapshot of that id, name or unique id prefix. Raises SnapshotNotFound."""
        client = client or Client()
        return cls(client.transport.call(calls.snapshot(name)), client)

    @classmethod
    def list(cls, *, client: Client | None = None) -> builtins.list[Snapshot]:
        """Your snapshots, newest first."""
        client = client or Client()
        return [cls(info, client) for info in client.transport.call(calls.snapshots())]

    @property
    def id(self) -> str:
        """Its id, such as ``snap-3kq9…``."""
        return self._info.id

    @property
    def info(self) -> SnapshotInfo:
        """What is known of it."""
        return self._info

    def delete(self: Snapshot | str, *, client: Client | None = None) -> None:
        """Forget it; sandboxes made from it go on. Also ``Snapshot.delete("snap-…")``."""
        if isinstance(self, str):
            (client or Client()).transport.call(calls.delete_snapshot(self))
        else:
            (client or self._client).transport.call(calls.delete_snapshot(self.id))

    def __repr__(self) -> str:
        return f"<Snapshot {self.id} of {self._info.sandbox}>"
