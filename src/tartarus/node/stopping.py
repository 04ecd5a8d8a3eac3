"""The part of a `Sandbox` that ends gracefully, on request or ahead of its time limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from tartarus.model.errors import TartarusError
from tartarus.model.sandbox import Reason, SandboxRecord
from tartarus.model.states import State
from tartarus.node.termination import Grace, StopOrder, own_grace_s, stop_order

if TYPE_CHECKING:
    from tartarus.model.template import Template
    from tartarus.node.guarding import Guard
    from tartarus.runtimes.base import Guest
    from tartarus.store.sandboxes import SandboxStore
    from tartarus.telemetry.metrics import Metrics

_log = structlog.get_logger("tartarus.node.stopping")


class Stopping:
    """See `termination` for what a grace is."""

    record: SandboxRecord
    template: Template
    guest: Guest
    asleep: bool
    quarantined: bool
    turn: asyncio.Lock
    _loop: asyncio.AbstractEventLoop
    _timers: list[asyncio.TimerHandle]
    guard: Guard | None
    _store: SandboxStore
    _ending: Reason | None
    _grace: Grace | None
    _done: asyncio.Future[SandboxRecord]

    async def stop(
        self, order: StopOrder | None = None, *, reason: Reason = Reason.USER_REQUEST,
        last: Callable[[], Awaitable[None]] | None = None,
    ) -> SandboxRecord:  # fmt: skip
        """End it gracefully: signal everything in it, wait as long as `order` says, then use force.

        A second stop hurries the first, and `kill` cuts it short. `last` runs when its processes have ended, or their
        time has, and its files are still there; it must not raise. Going away does not stop the stop.
        """
        self.refuse_if_quarantined()
        order = order or stop_order(self.record.spec, self.template)
        if self.asleep:  # there is nobody to ask
            await self.kill(reason=reason)
        elif self._ending is None:
            self._ending = reason
            self._grace = Grace(order)
            self._spawn(self._stop(self._grace, last))
        elif self._grace is not None:
            self._grace.hurry(order)
        return await self.wait()

    async def _stop(self, grace: Grace, last: Callable[[], Awaitable[None]] | None) -> None:
        try:
            async with self.turn:
                if self.asleep:  # it fell asleep at that moment
                    await self.kill()
                    return
                if self.record.state is State.PAUSED:
                    await self.guest.resume()
                self.record = await self._store.transition(
                    self.record.id, {State.RUNNING, State.PAUSED}, State.STOPPING
                )
        except TartarusError as error:  # a full disk, most likely: it ends all the same
            _log.warning("stopping_not_stored", sandbox=self.record.id, error=str(error))
        try:
            await grace.run(self.guest)
            if last is not None:
                await last()
        finally:
            await self.guest.destroy()

    def count(self, metrics: Metrics) -> None:
        """How it ended, if it was asked to."""
        if self._grace is not None and self.record.reason is not None:
            metrics.terminated(self.record.reason.value, self._grace.took_s, forced=self._grace.forced)

    def set_deadline(self) -> None:
        """Its time limit counts, from its start on."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        timeout_s = self.record.spec.timeout_s
        if timeout_s is not None:
            # By the clock on the wall: it may have been asleep, and its daemon another.
            left_s = timeout_s - max(0.0, time.time() - (self.record.started_at or time.time()))
            self._timers.append(self._loop.call_later(max(0.0, left_s), self._past_deadline))
            grace_s = own_grace_s(self.record.spec, self.template)
            if grace_s:
                self._timers.append(self._loop.call_later(max(0.0, left_s - grace_s), self._near_deadline))

    def _near_deadline(self) -> None:
        async def stop() -> None:
            await self.stop(reason=Reason.TIMEOUT)

        ends = self.guard is None or self.guard.kills_at_deadline
        if ends and not self.quarantined and self._ending is None and not self.asleep:
            self._spawn(stop())

    async def kill(self, *, signal: int | None = None, reason: Reason = Reason.USER_REQUEST) -> None:
        """End it at once."""

    async def wait(self) -> SandboxRecord:
        """The final record, once nothing of the sandbox is left."""
        return await asyncio.shield(self._done)

    def _past_deadline(self) -> None:
        """Its time limit has passed."""

    def refuse_if_quarantined(self) -> None:
        """Raise Quarantined while it is held."""

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do that beside, and hold on to it."""
