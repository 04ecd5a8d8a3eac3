"""The async twin of `snapshots`."""

from __future__ import annotations

import builtins

from tartarus.model.library import SnapshotInfo
from tartarus.sdk import library_calls as calls
from tartarus.sdk.async_client import AsyncClient


class AsyncSnapshot:
    """A snapshot; see `Snapshot`, whose names it has."""

    def __init__(self, info: SnapshotInfo, client: AsyncClient) -> None:
        self._info = info
        self._client = client

    @classmethod
    async def get(cls, name: str, *, client: AsyncClient | None = None) -> AsyncSnapshot:
        """The snapshot of that id, name or unique id prefix. Raises SnapshotNotFound."""
        client = client or AsyncClient()
        return cls(await client.transport.call(calls.snapshot(name)), client)

    @classmethod
    async def list(cls, *, client: AsyncClient | None = None) -> builtins.list[AsyncSnapshot]:
        """Your snapshots, newest first."""
        client = client or AsyncClient()
        return [cls(info, client) for info in await client.transport.call(calls.snapshots())]

    @property
    def id(self) -> str:
        """Its id, such as ``snap-3kq9…``."""
        return self._info.id

    @property
    def info(self) -> SnapshotInfo:
        """What is known of it."""
        return self._info

    async def delete(self: AsyncSnapshot | str, *, client: AsyncClient | None = None) -> None:
        """Forget it; sandboxes made from it go on. Also ``AsyncSnapshot.delete("snap-…")``."""
        if isinstance(self, str):
            await (client or AsyncClient()).transport.call(calls.delete_snapshot(self))
        else:
            await (client or self._client).transport.call(calls.delete_snapshot(self.id))

    def __repr__(self) -> str:
        return f"<AsyncSnapshot {self.id} of {self._info.sandbox}>"
