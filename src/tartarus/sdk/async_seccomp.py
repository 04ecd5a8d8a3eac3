"""The async twin of `seccomp`."""

from __future__ import annotations

import builtins
from collections.abc import Iterable

from tartarus.model.seccomp import Profile, PutProfile
from tartarus.sdk import seccomp_calls as calls
from tartarus.sdk.async_client import AsyncClient


class AsyncSeccomp:
    """The system call profiles of one daemon; see `Seccomp`, whose names it has."""

    def __init__(self, client: AsyncClient | None = None) -> None:
        self._client = client or AsyncClient()

    async def list(self) -> builtins.list[Profile]:
        """The built-in profiles, then yours, by name."""
        return await self._client.transport.call(calls.profiles())

    async def get(self, name: str) -> Profile:
        """One of them. Raises ProfileNotFound."""
        return await self._client.transport.call(calls.profile(name))

    async def put(self, name: str, allowed: Iterable[str], *, description: str = "") -> Profile:
        """Keep one that allows these calls, in the place of one of that name. Raises InvalidRequest."""
        return await self._client.transport.call(calls.put(name, PutProfile(tuple(allowed), description)))

    async def remove(self, name: str) -> None:
        """Forget one of yours; sandboxes that have it keep it. Raises ProfileNotFound."""
        await self._client.transport.call(calls.remove(name))

    async def recorded(self, sandbox_id: str) -> dict[str, int]:
        """How often a sandbox made each system call, by name; of one that was made with `record_calls`."""
        return (await self._client.transport.call(calls.recorded(sandbox_id))).calls
