"""The guest of a sandbox that sleeps through its daemon's life: there is none until the sandbox wakes up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

from tartarus.guest.channel import GuestChannel, SessionState, channel_pair
from tartarus.model.errors import InvalidState
from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.base import Saved


class AbsentGuest:
    """Stands where a guest will be. Its channel keeps what is asked, and goes on over the restored guest's."""

    warm = False
    pid = -1
    pidfd = -1
    group = None

    def __init__(self, channel: GuestChannel) -> None:
        self.channel = channel
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    def of(cls, session: SessionState) -> AbsentGuest:
        """A guest that was saved with that session."""
        ours, theirs = channel_pair()
        with theirs:  # a channel to nobody would be broken from its first word on
            channel = GuestChannel(ours)
            channel.resume_at(session)
        return cls(channel)

    async def ready(self) -> None:
        """There is nothing to wait for. Raises InvalidState."""
        _asleep()

    async def pause(self) -> None:
        """It stands still as it is. Raises InvalidState."""
        _asleep()

    async def resume(self) -> None:
        """It has to be woken. Raises InvalidState."""
        _asleep()

    def limit(self, resources: Resources) -> None:  # noqa: ARG002 - the protocol's
        """It has the limits that it was saved with. Raises InvalidState."""
        _asleep()

    def stats(self) -> Stats:
        """It uses nothing."""
        return Stats()

    def changes(self) -> Path | None:
        """The host finds nothing of it."""
        return None

    async def save(self, directory: Path, *, go_on: bool) -> Saved:  # noqa: ARG002 - the protocol's
        """It is saved already. Raises InvalidState."""
        _asleep()

    async def destroy(self) -> None:
        """Nothing is left of it."""
        if not self.ended.done():
            self.ended.set_result(None)


def _asleep() -> NoReturn:
    raise InvalidState("this sandbox is hibernated", fix="wake it: tartarus wake SANDBOX")
