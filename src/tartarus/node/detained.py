"""The part of a `Sandbox` that can be detained in quarantine: it stands still, and nobody but its holder may end it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from tartarus.model.errors import GuestFailed, Quarantined
from tartarus.model.sandbox import Reason, SandboxRecord
from tartarus.model.states import State

if TYPE_CHECKING:
    from tartarus.guest.channel import GuestChannel
    from tartarus.node.outputlog import OutputLog
    from tartarus.runtimes.base import Guest


class Detained:
    """What is held has told everybody who waited for its end or its output that it is."""

    record: SandboxRecord
    guest: Guest
    channel: GuestChannel
    log: OutputLog
    quarantined = False
    left_behind = False
    _ending: Reason | None
    _done: asyncio.Future[SandboxRecord]

    def quarantine(self, why: str) -> None:
        """It is frozen: from now on this is what everybody who asks is told."""
        self.quarantined = True
        self.record = msgspec.structs.replace(
            self.record, state=State.QUARANTINED, reason=Reason.POLICY_VIOLATION, message=f"quarantined: {why}"
        )
        self.channel.stop_reading(GuestFailed("the sandbox was quarantined", why=why))
        if not self._done.done():
            self._done.set_result(self.record)

    def leave_quarantine(self) -> None:
        """Its holder lets it go, paused as it is: its output goes to its log from here on."""
        self.quarantined = False
        self._done = asyncio.get_running_loop().create_future()
        self.channel.stop_reading(None)
        self.detach()

    async def end_quarantined(self, reason: Reason) -> SandboxRecord:
        """Its holder ends it."""
        self.quarantined = False
        self._done = asyncio.get_running_loop().create_future()
        self._ending = reason
        await self.guest.destroy()
        return await asyncio.shield(self._done)

    async def let_go_of_quarantined(self) -> None:
        """Its daemon ends, and its processes with it; its record says on that it is quarantined."""
        self.left_behind = True
        await self.guest.destroy()

    def refuse_if_quarantined(self) -> None:
        """Raise Quarantined while it is held."""
        if self.quarantined:
            raise Quarantined(
                f"sandbox {self.record.id} is quarantined", why=self.record.message.removeprefix("quarantined: "),
                fix="the daemon's owner can release or destroy it: tartarus quarantine",
            )  # fmt: skip

    def detach(self) -> None:
        """Nobody will read the main command's output: keep it in the log."""
