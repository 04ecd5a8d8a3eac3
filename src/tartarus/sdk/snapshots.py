"""`Snapshot`: a sandbox's files, or all of it, as they were at one moment, to go on from as often as one likes."""

from __future__ import annotations

import builtins
from collections.abc import Mapping

from tartarus.model.library import SnapshotInfo
from tartarus.model.snapshots import ImportSnapshot
from tartarus.sdk import library_calls as calls
from tartarus.sdk.client import Client
from tartarus.sdk.packing import Payload
from tartarus.sdk.wholefile import whole_file


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

    @classmethod
    def load(
        cls, path: str, *, name: str = "", labels: Mapping[str, str] | None = None, client: Client | None = None
    ) -> Snapshot:
        """Take in the file that `export` wrote, here or on a host that is trusted here. Raises SnapshotRefused."""
        client = client or Client()
        upload = client.transport.call(calls.upload(), Payload(path).parts()).id
        request = ImportSnapshot(upload, name, dict(labels or {}))
        return cls(client.transport.call(calls.import_snapshot(request)), client)

    def export(self, path: str) -> None:
        """Write one of memory to a file, which holds all that was in the sandbox's memory; there is none if it fails.

        Raises InvalidRequest when there is a file already.
        """
        with whole_file(path) as file, self._client.transport.stream(calls.export_snapshot(self.id)) as parts:
            for part in parts:
                file.write(part)

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
