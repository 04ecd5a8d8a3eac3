"""The async twin of `lamentations`."""

from __future__ import annotations

import builtins

from tartarus.model.lamentations import Category, Lamentation, LamentationFilter
from tartarus.model.sandbox import SandboxRecord
from tartarus.sdk import lamentation_calls as calls
from tartarus.sdk.async_client import AsyncClient


class AsyncLamentations:
    """Your failed runs on one daemon; see `Lamentations`, whose names it has."""

    def __init__(self, client: AsyncClient | None = None) -> None:
        self._client = client or AsyncClient()

    async def list(
        self, *, sandbox: str | None = None, category: Category | str | None = None, since: float | None = None,
        until: float | None = None, dead_letters: bool = False, limit: int = 100,
    ) -> builtins.list[Lamentation]:  # fmt: skip
        """Yours, newest first: of a sandbox (its id), of a category, between two times (Unix seconds)."""
        wanted = LamentationFilter(
            sandbox, None if category is None else Category(category), since, until, dead_letters, limit
        )
        return await self._client.transport.call(calls.lamentations(wanted))

    async def get(self, lament_id: str) -> Lamentation:
        """One of them. Raises LamentationNotFound."""
        return await self._client.transport.call(calls.lamentation(lament_id))

    async def retry(self, lament_id: str) -> SandboxRecord:
        """Make what a dead letter asked for; the sandbox is then yours as any other. Raises InvalidState."""
        return await self._client.transport.call(calls.retry(lament_id))

    async def purge(self, *, older_than_s: float = 0.0) -> int:
        """Forget those that are older; returns how many."""
        return (await self._client.transport.call(calls.purge(older_than_s))).purged
