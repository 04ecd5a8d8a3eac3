"""Graceful termination (Thanatos): a signal to everything in a sandbox, time to end, then force.

The guest says when nobody is left; the host keeps the time itself, since a hostile guest may say nothing.
"""

from __future__ import annotations

import asyncio
import signal as signals
from typing import Any

import msgspec

from tartarus.model.checks import MAX_GRACE_S
from tartarus.model.errors import TartarusError
from tartarus.model.sandbox import ExitStatus, Reason, SandboxSpec
from tartarus.model.signals import signal_number
from tartarus.model.states import State
from tartarus.model.template import Template
from tartarus.runtimes.base import Guest

DEFAULT_SIGNAL = "TERM"
DEFAULT_GRACE_S = 10.0


class StopOrder(msgspec.Struct, frozen=True):
    """How to end a sandbox: the signal's number, and the seconds its processes have from then on."""

    signal: int
    grace_s: float


def stop_order(
    spec: SandboxSpec,
    template: Template,
    *,
    signal: int | None = None,
    grace_s: float | None = None,
    most_s: float = MAX_GRACE_S,
) -> StopOrder:
    """What was asked for, else what the sandbox was made with, else its template's, else TERM and 10 s.

    `most_s`: the longest grace there is time for.
    """
    if signal is None:
        signal = signal_number(spec.stop_signal or template.stop_signal or DEFAULT_SIGNAL)
    if grace_s is None:
        grace_s = own_grace_s(spec, template)
    return StopOrder(signal, min(DEFAULT_GRACE_S if grace_s is None else grace_s, most_s))


def own_grace_s(spec: SandboxSpec, template: Template) -> float | None:
    """The grace that was set for this sandbox; None when nobody did. A template's takes half a time limit at most."""
    if spec.stop_grace_s is not None or template.stop_grace_s is None:
        return spec.stop_grace_s
    return template.stop_grace_s if spec.timeout_s is None else min(template.stop_grace_s, spec.timeout_s / 2)


class Grace:
    """One sandbox's time to end by itself."""

    def __init__(self, order: StopOrder) -> None:
        self.forced = False
        self.took_s = 0.0
        self._orders = [order]
        self._guest: Guest | None = None
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[bool] = self._loop.create_future()
        self._answers: set[asyncio.Task[None]] = set()
        self._force: asyncio.TimerHandle | None = None

    async def run(self, guest: Guest) -> bool:
        """Begin; whether all its processes ended (True) before the time was over."""
        self._guest = guest
        began = self._loop.time()
        grace_s = min(order.grace_s for order in self._orders)
        self._force = self._loop.call_later(grace_s, self._end, False)
        for order in self._orders:
            self._ask(StopOrder(order.signal, grace_s))
        try:
            by_themselves = await self._over
        finally:
            self._force.cancel()
            for answer in self._answers:
                answer.cancel()
        self.forced, self.took_s = not by_themselves, self._loop.time() - began
        return by_themselves

    def hurry(self, order: StopOrder) -> None:
        """Somebody else wants it ended too: their signal as well, and their grace if it is over sooner."""
        if self._force is None:
            self._orders.append(order)
        elif not self._over.done():
            left_s = max(0.0, min(order.grace_s, self._force.when() - self._loop.time()))
            self._force.cancel()
            self._force = self._loop.call_later(left_s, self._end, False)
            self._ask(StopOrder(order.signal, left_s))

    def _ask(self, order: StopOrder) -> None:
        if order.grace_s == 0:
            return
        answer = self._loop.create_task(self._asked(order))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    async def _asked(self, order: StopOrder) -> None:
        assert self._guest is not None
        try:
            # By the guest's clock the time may be over sooner: ours counts.
            if await self._guest.channel.stop(order.signal, order.grace_s + 1.0):
                self._end(True)
        except TartarusError:
            self._end(False)

    def _end(self, by_themselves: bool) -> None:
        if not self._over.done():
            self._over.set_result(by_themselves)


def outcome(
    ending: Reason | None,
    status: ExitStatus | None,
    oom_kills: int,
    *,
    asked: bool = False,
    why_lost: str = "",
    kills_unnamed: bool = False,
) -> tuple[State, dict[str, Any]]:
    """The final state and record fields, from why it ended, how its command exited, and out-of-memory kills.

    `asked`: it was given time to end by itself; a command that did has succeeded or failed, as its status says.
    `why_lost`: what its runtime knows of an end that nobody asked for. `kills_unnamed`: of a program that the
    host's kernel killed, its own says no more than that it failed.
    """
    changes: dict[str, Any] = {"reason": ending or Reason.LOST}
    if status is not None:
        changes |= {"exit_code": status.shell_status, "exit_signal": status.signal or None}
    if ending is Reason.TIMEOUT:
        return State.TIMED_OUT, changes | {"message": "the time limit passed"}
    out_of_memory = {"reason": Reason.RESOURCE_LIMIT, "message": "killed: the memory limit was reached"}
    if ending is Reason.COMPLETED and status is not None:
        if oom_kills and (status.signal == signals.SIGKILL or (kills_unnamed and status.shell_status)):
            return State.FAILED, changes | out_of_memory
        return (State.SUCCEEDED if status.shell_status == 0 else State.FAILED), changes
    if asked and ending is not None and status is not None and not status.signal:
        return (State.SUCCEEDED if status.code == 0 else State.FAILED), changes
    if ending is None and oom_kills:
        return State.FAILED, changes | out_of_memory
    if ending is None:
        return State.LOST, changes | {"message": why_lost or "its guest agent ended"}
    return State.KILLED, changes
