"""Graceful ends on request (Thanatos): one sandbox's, or all of a node's, which then takes no new ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import structlog

from tartarus.model.errors import InvalidState, TartarusError
from tartarus.model.lifecycle import Drained, DrainReport, DrainRequest, Stopped, StopRequest
from tartarus.model.sandbox import Reason
from tartarus.model.signals import signal_number
from tartarus.node.checkpoints import Checkpoints
from tartarus.node.hibernation import SleepManager
from tartarus.node.sandbox import Sandbox
from tartarus.node.termination import StopOrder, stop_order

_log = structlog.get_logger("tartarus.node.terminator")
_FORCE_S = 30.0
"""How long a drain waits for what was killed; more than that is left over, and said so."""


class Terminator:
    """One node's. `live`: its sandboxes now; `end_creations`: stop those that are being made."""

    def __init__(
        self, live: Callable[[], Iterable[Sandbox]], end_creations: Callable[[], Awaitable[object]],
        sleeper: SleepManager, checkpoints: Checkpoints,
    ) -> None:  # fmt: skip
        self._live = live
        self._end_creations = end_creations
        self._sleeper = sleeper
        self._checkpoints = checkpoints
        self.draining = False

    async def stop(self, sandbox: Sandbox, request: StopRequest) -> Stopped:
        """End one for its owner; returns once it is gone. A sleeping one wakes up to heed the signal."""
        if request.grace_s != 0 or request.checkpoint is not None:
            await self._sleeper.wake(sandbox)
        return await self._stop(sandbox, request, Reason.USER_REQUEST)

    async def _stop(self, sandbox: Sandbox, request: StopRequest, reason: Reason) -> Stopped:
        order = _order(sandbox, request)
        if request.checkpoint is None:
            return Stopped(await sandbox.stop(order, reason=reason))
        return Stopped(
            *await self._checkpoints.take_and_end(
                sandbox, request.checkpoint, lambda last: sandbox.stop(order, reason=reason, last=last)
            )
        )

    def check(self) -> None:
        """Raise InvalidState while no new sandboxes are taken."""
        if self.draining:
            raise InvalidState(
                "this node takes no new sandboxes", why="it is being drained", fix="undo it: tartarus drain --undo"
            )

    def report(self) -> DrainReport:
        """How it stands."""
        sandboxes = [(sandbox.record.id, sandbox.asleep) for sandbox in self._live()]
        return DrainReport(
            self.draining,
            left=tuple(sandbox_id for sandbox_id, asleep in sandboxes if not asleep),
            asleep=tuple(sandbox_id for sandbox_id, asleep in sandboxes if asleep),
        )

    def undo(self) -> None:
        """Take new sandboxes again; those that have ended, or are ending, do so."""
        self.draining = False

    async def drain(self, request: DrainRequest) -> DrainReport:
        """Take no new sandboxes, and end those there are, all at once. Returns when each has ended or could not.

        What sleeps may sleep on: it needs nothing of this host but its disk.
        """
        self.draining = True
        await self._end_creations()
        sandboxes = [sandbox for sandbox in self._live() if not sandbox.asleep]
        _log.info("draining", sandboxes=len(sandboxes))
        ended = await asyncio.gather(*(self._end(sandbox, request) for sandbox in sandboxes))
        return msgspec.structs.replace(self.report(), ended=tuple(ended))

    async def _end(self, sandbox: Sandbox, request: DrainRequest) -> Drained:
        message = checkpoint = ""
        try:
            if request.hibernate and await self._hibernated(sandbox):
                return _drained(sandbox, "")
            order = _order(sandbox, request)
            async with asyncio.timeout(order.grace_s + _FORCE_S):
                try:
                    kept = (await self._stop(sandbox, request, Reason.NODE_DRAIN)).checkpoint
                    checkpoint = "" if kept is None else kept.id
                except TartarusError as error:  # no checkpoint: it has to end all the same
                    message = str(error)
                    await sandbox.stop(order, reason=Reason.NODE_DRAIN)
        except TimeoutError:
            message = f"it did not end within {_FORCE_S:g} s of being killed"
        except TartarusError as error:
            message = str(error)
        return _drained(sandbox, message, checkpoint)

    async def _hibernated(self, sandbox: Sandbox) -> bool:
        try:
            await self._sleeper.sleep(sandbox)
        except TartarusError as error:
            _log.info("not_hibernated", sandbox=sandbox.record.id, error=str(error))
            return False
        return True


def _drained(sandbox: Sandbox, message: str, checkpoint: str = "") -> Drained:
    record = sandbox.record
    return Drained(record.id, record.name, record.state, record.reason, message or record.message, checkpoint)


def _order(sandbox: Sandbox, request: StopRequest) -> StopOrder:
    signal = signal_number(request.signal) if request.signal else None
    return stop_order(sandbox.record.spec, sandbox.template, signal=signal, grace_s=request.grace_s)
