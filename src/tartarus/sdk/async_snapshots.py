"""The async twin of `snapshots`."""

from __future__ import annotations

import builtins
from collections.abc import Mapping

import anyio.to_thread

from tartarus.model.library import SnapshotInfo
from tartarus.model.snapshots import ImportSnapshot
from tartarus.sdk import library_calls as calls
from tartarus.sdk.async_client import AsyncClient
from tartarus.sdk.async_templates import in_threads
from tartarus.sdk.packing import Payload
from tartarus.sdk.wholefile import whole_file


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

    @classmethod
    async def load(
        cls, path: str, *, name: str = "", labels: Mapping[str, str] | None = None, client: AsyncClient | None = None
    ) -> AsyncSnapshot:
        """Take in the file that `export` wrote, here or on a host that is trusted here. Raises SnapshotRefused."""
        client = client or AsyncClient()
        upload = (await client.transport.call(calls.upload(), in_threads(Payload(path).parts()))).id
        request = ImportSnapshot(upload, name, dict(labels or {}))
        return cls(await client.transport.call(calls.import_snapshot(request)), client)

    async def export(self, path: str) -> None:
        """Write one of memory to a file, which holds all that was in the sandbox's memory; there is none if it fails.

        Raises InvalidRequest when there is a file already.
        """
        with whole_file(path) as file:
            async with self._client.transport.stream(calls.export_snapshot(self.id)) as parts:
                async for part in parts:
                    await anyio.to_thread.run_sync(file.write, part)

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
