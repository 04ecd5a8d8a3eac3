"""`Lamentations`: your runs that failed, and what was asked for where nothing ran."""

from __future__ import annotations

import builtins

from tartarus.model.lamentations import Category, Lamentation, LamentationFilter
from tartarus.model.sandbox import SandboxRecord
from tartarus.sdk import lamentation_calls as calls
from tartarus.sdk.client import Client


class Lamentations:
    """Your failed runs on one daemon."""

    def __init__(self, client: Client | None = None) -> None:
        self._client = client or Client()

    def list(
        self, *, sandbox: str | None = None, category: Category | str | None = None, since: float | None = None,
        until: float | None = None, dead_letters: bool = False, limit: int = 100,
    ) -> builtins.list[Lamentation]:  # fmt: skip
        """Yours, newest first: of a sandbox (its id), of a category, between two times (Unix seconds)."""
        wanted = LamentationFilter(
            sandbox, None if category is None else Category(category), since, until, dead_letters, limit
        )
        return self._client.transport.call(calls.lamentations(wanted))

    def get(self, lament_id: str) -> Lamentation:
        """One of them. Raises LamentationNotFound."""
        return self._client.transport.call(calls.lamentation(lament_id))

    def retry(self, lament_id: str) -> SandboxRecord:
        """Make what a dead letter asked for; the sandbox is then yours as any other. Raises InvalidState."""
        return self._client.transport.call(calls.retry(lament_id))

    def purge(self, *, older_than_s: float = 0.0) -> int:
        """Forget those that are older; returns how many."""
        return (self._client.transport.call(calls.purge(older_than_s))).purged
