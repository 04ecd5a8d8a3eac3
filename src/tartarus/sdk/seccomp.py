"""`Seccomp`: which system calls programs may make, as named profiles."""

from __future__ import annotations

import builtins
from collections.abc import Iterable

from tartarus.model.seccomp import Profile, PutProfile
from tartarus.sdk import seccomp_calls as calls
from tartarus.sdk.client import Client


class Seccomp:
    """The system call profiles of one daemon: built-in ones, and yours."""

    def __init__(self, client: Client | None = None) -> None:
        self._client = client or Client()

    def list(self) -> builtins.list[Profile]:
        """The built-in profiles, then yours, by name."""
        return self._client.transport.call(calls.profiles())

    def get(self, name: str) -> Profile:
        """One of them. Raises ProfileNotFound."""
        return self._client.transport.call(calls.profile(name))

    def put(self, name: str, allowed: Iterable[str], *, description: str = "") -> Profile:
        """Keep one that allows these calls, in the place of one of that name. Raises InvalidRequest."""
        return self._client.transport.call(calls.put(name, PutProfile(tuple(allowed), description)))

    def remove(self, name: str) -> None:
        """Forget one of yours; sandboxes that have it keep it. Raises ProfileNotFound."""
        self._client.transport.call(calls.remove(name))

    def recorded(self, sandbox_id: str) -> dict[str, int]:
        """How often a sandbox made each system call, by name; of one that was made with `record_calls`."""
        return (self._client.transport.call(calls.recorded(sandbox_id))).calls
