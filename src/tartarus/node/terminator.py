"""Graceful ends on request (Thanatos): one sandbox's, or all of a node's, which then takes no new ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import structlog

from tartarus.model.errors import InvalidState, TartarusError
from tartarus.model.lifecycle import Drained, DrainReport, DrainRequest, Stopped, StopRequest
from tartarus.model.sandbox import Reason
from tartarus.model.signals import signal_number
from tartarus.node.sandbox import Sandbox
from tartarus.node.termination import StopOrder, stop_order

_log = structlog.get_logger("tartarus.node.terminator")
_FORCE_S = 30.0
"""How long a drain waits for what was killed; more than that is left over, and said so."""


class Terminator:
    """One node's. `live`: its sandboxes now; `end_creations`: stop those that are being made."""

    def __init__(self, live: Callable[[], Iterable[Sandbox]], end_creations: Callable[[], Awaitable[object]]) -> None:
        self._live = live
        self._end_creations = end_creations
        self.draining = False

    async def stop(self, sandbox: Sandbox, request: StopRequest) -> Stopped:
        """End one for its owner; returns once it is gone."""
        return Stopped(await sandbox.stop(_order(sandbox, request)))

    def check(self) -> None:
        """Raise InvalidState while no new sandboxes are taken."""
        if self.draining:
            raise InvalidState(
                "this node takes no new sandboxes", why="it is being drained", fix="undo it: tartarus drain --undo"
            )

    def report(self) -> DrainReport:
        """How it stands."""
        return DrainReport(self.draining, left=tuple(sandbox.record.id for sandbox in self._live()))

    def undo(self) -> None:
        """Take new sandboxes again; those that have ended, or are ending, do so."""
        self.draining = False

    async def drain(self, request: DrainRequest) -> DrainReport:
        """Take no new sandboxes, and end those there are, all at once. Returns when each has ended or could not."""
        self.draining = True
        await self._end_creations()
        sandboxes = list(self._live())
        _log.info("draining", sandboxes=len(sandboxes))
        ended = await asyncio.gather(*(self._end(sandbox, request) for sandbox in sandboxes))
        return DrainReport(self.draining, ended=tuple(ended), left=self.report().left)

    async def _end(self, sandbox: Sandbox, request: DrainRequest) -> Drained:
        message = ""
        try:
            order = _order(sandbox, request)
            async with asyncio.timeout(order.grace_s + _FORCE_S):
                await sandbox.stop(order, reason=Reason.NODE_DRAIN)
        except TimeoutError:
            message = f"it did not end within {_FORCE_S:g} s of being killed"
        except TartarusError as error:
            message = str(error)
        record = sandbox.record
        return Drained(record.id, record.name, record.state, record.reason, message or record.message)


def _order(sandbox: Sandbox, request: StopRequest) -> StopOrder:
    signal = signal_number(request.signal) if request.signal else None
    return stop_order(sandbox.record.spec, sandbox.template, signal=signal, grace_s=request.grace_s)
