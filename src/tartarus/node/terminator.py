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
        sleeper: SleepManager,
    ) -> None:  # fmt: skip
        self._live = live
        self._end_creations = end_creations
        self._sleeper = sleeper
        self.draining = False

    async def stop(self, sandbox: Sandbox, request: StopRequest) -> Stopped:
        """End one for its owner; returns once it is gone. A sleeping one wakes up to heed the signal."""
        if request.grace_s != 0:
            await self._sleeper.wake(sandbox)
        return Stopped(await sandbox.stop(_order(sandbox, request)))

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
        message = ""
        try:
            if request.hibernate and await self._hibernated(sandbox):
                return _drained(sandbox, "")
            order = _order(sandbox, request)
            async with asyncio.timeout(order.grace_s + _FORCE_S):
                await sandbox.stop(order, reason=Reason.NODE_DRAIN)
        except TimeoutError:
            message = f"it did not end within {_FORCE_S:g} s of being killed"
        except TartarusError as error:
            message = str(error)
        return _drained(sandbox, message)

    async def _hibernated(self, sandbox: Sandbox) -> bool:
        try:
            await self._sleeper.sleep(sandbox)
        except TartarusError as error:
            _log.info("not_hibernated", sandbox=sandbox.record.id, error=str(error))
            return False
        return True


def _drained(sandbox: Sandbox, message: str) -> Drained:
    record = sandbox.record
    return Drained(record.id, record.name, record.state, record.reason, message or record.message)


def _order(sandbox: Sandbox, request: StopRequest) -> StopOrder:
    signal = signal_number(request.signal) if request.signal else None
    return stop_order(sandbox.record.spec, sandbox.template, signal=signal, grace_s=request.grace_s)
