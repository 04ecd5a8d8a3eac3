"""The async twin of `policies`."""

from __future__ import annotations

import builtins

from tartarus.model.policies import DryRun, DryRunReport, PolicyVersion, PutPolicy, Rollback
from tartarus.sdk import policy_calls as calls
from tartarus.sdk.async_client import AsyncClient


class AsyncPolicies:
    """The policies of one daemon; see `Policies`, whose names it has."""

    def __init__(self, client: AsyncClient | None = None) -> None:
        self._client = client or AsyncClient()

    async def list(self) -> builtins.list[PolicyVersion]:
        """Those in force, by id."""
        return await self._client.transport.call(calls.policies())

    async def get(self, name: str, version: int | None = None) -> PolicyVersion:
        """One version, the newest if none is named. Raises PolicyNotFound."""
        return await self._client.transport.call(calls.policy(name, version))

    async def history(self, name: str) -> builtins.list[PolicyVersion]:
        """Every version, the newest first. Raises PolicyNotFound."""
        return await self._client.transport.call(calls.history(name))

    async def diff(self, name: str, old: int, new: int | None = None) -> str:
        """What changed between two versions (the newest if `new` is left out), as a unified diff."""
        return await self._client.transport.call(calls.diff(name, old, new))

    async def put(self, name: str, text: str, *, comment: str = "", expected: int | None = None) -> PolicyVersion:
        """A new version, in force when this returns. `expected`: the version that it changes.

        Raises InvalidRequest with the line of a mistake, and InvalidState when another version came between.
        """
        return await self._client.transport.call(calls.put(name, PutPolicy(text, comment, expected)))

    async def rollback(self, name: str, version: int, *, comment: str = "") -> PolicyVersion:
        """An earlier version once more, as the newest."""
        return await self._client.transport.call(calls.rollback(name, Rollback(version, comment)))

    async def delete(self, name: str) -> PolicyVersion:
        """Not in force any more; its history stays."""
        return await self._client.transport.call(calls.delete(name))

    async def dry_run(self, text: str, *, hours: float = 24.0) -> DryRunReport:
        """How the requests of the last hours would be judged with this policy; nothing is changed."""
        return await self._client.transport.call(calls.dry_run(DryRun(text, hours)))
