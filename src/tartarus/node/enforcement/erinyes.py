"""The Furies: what is seen of a sandbox is counted, told, and answered by what its policy says.

The kernel holds the limits themselves: it refuses the memory, the process, the write, the packet, and it throttles the
CPU. What happens on top of that is a policy's: `warn` (say so), `throttle`, `kill`, `quarantine`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import structlog

from tartarus.model.enforcement import Fury, Violation, ViolationKind
from tartarus.model.errors import TartarusError
from tartarus.model.ids import new_id
from tartarus.model.lamentations import Category, Fault, Lamentation
from tartarus.model.quarantine import QuarantineReason
from tartarus.model.sandbox import Reason, SandboxRecord
from tartarus.node.enforcement.bell import Bell
from tartarus.node.enforcement.watched import Watched
from tartarus.node.sandbox import Sandbox
from tartarus.policy.documents import Limits, OnViolation, WindowRule
from tartarus.telemetry.metrics import Metrics, is_refusal

_log = structlog.get_logger("tartarus.node.enforcement")
LOOK_EVERY_S = 0.5
"""How often is looked for what the kernel has no event for: refused forks on cgroup v1, refused packets."""
_DISK_EVERY = 4
_AT_ONCE = 25
_MAY_END_S = 1.0
"""How long after a violation the sandbox may end of it, so that both are one failure."""
THROTTLED_S = 30.0
"""How long a throttled sandbox stays so after its last violation."""
THROTTLED_TO = 10
"""A throttled sandbox has this part of its CPU."""
_CUT_OFF = "refused_unsworn"
_LEAST_MILLI = 10
REJECTED = "reject"
"""What is done about a request that breaks a policy: the action of a violation without a sandbox."""
Counters = Callable[[], Awaitable[Mapping[str, Mapping[str, int]]]]
"""By sandbox, what its network did since its start: of what it was refused, each reason's number."""
Quarantine = Callable[[Sandbox, QuarantineReason, str], Awaitable[object]]
_CATEGORIES = {
    Fury.ALECTO: (Category.TIMEOUT, Fault.LIMIT),
    Fury.TISIPHONE: (Category.RESOURCE, Fault.LIMIT),
    Fury.MEGAERA: (Category.POLICY, Fault.POLICY),
}


class Erinyes:
    """One node's. `limits`: what the policies say of a sandbox that begins now."""

    def __init__(
        self, limits: Callable[[SandboxRecord], Limits], metrics: Metrics, wail: Callable[[Lamentation], None],
        quarantine: Quarantine, counters: Counters | None = None,
    ) -> None:  # fmt: skip
        self.counters = counters
        self._limits = limits
        self._metrics = metrics
        self._wail = wail
        self._quarantine = quarantine
        self._watched: dict[str, Watched] = {}
        self._closing: dict[str, Watched] = {}
        self._throttled: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._bell: Bell | None = None
        self._patrol: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to look."""
        self._bell = Bell()
        self._patrol = asyncio.create_task(self._look_forever())

    async def close(self) -> None:
        """Look no more; what was begun is finished."""
        if self._patrol is not None:
            self._patrol.cancel()
        for sandbox_id in list(self._watched):
            self._forget(sandbox_id)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._bell is not None:
            self._bell.close()
            self._bell = None

    # A sandbox's life.

    def watch(self, sandbox: Sandbox) -> None:
        """From now on, and what happened in it before; a policy that changes later is for others."""
        if self._bell is None:
            return
        watched = Watched(sandbox, self._limits(sandbox.record), self._bell, self._seen)
        self._watched[sandbox.record.id] = watched
        sandbox.guard = _Guard(self, watched)
        watched.begin()

    def ended(self, sandbox: Sandbox) -> None:
        """It has ended: what happened last is told, and nothing is done any more."""
        watched = self._watched.get(sandbox.record.id)
        if watched is not None:
            watched.last_look()
            if sandbox.line is not None:
                self._closing[sandbox.record.id] = watched
            self._lament(watched)
            self._forget(sandbox.record.id)

    def _forget(self, sandbox_id: str) -> None:
        self._watched.pop(sandbox_id).end()
        timer = self._throttled.pop(sandbox_id, None)
        if timer is not None:
            timer.cancel()

    # What is seen.

    def past_deadline(self, watched: Watched) -> bool:
        """Its time limit has passed; whether that was answered otherwise than by its end."""
        self._seen(watched, ViolationKind.TIME, 1, "its time limit passed")
        return watched.limits.on_timeout is not OnViolation.KILL

    def refused_packets(self, watched: Watched, counts: Mapping[str, int]) -> None:
        """By reason, from its start on. What it sends once its network is cut breaks no contract any more."""
        for name, count in counts.items():
            if not is_refusal(name) or name == _CUT_OFF:
                continue
            new = count - watched.network.get(name, 0)
            watched.network[name] = max(count, watched.network.get(name, 0))
            if new > 0:
                reason = name.removeprefix("refused_")
                self._seen(watched, ViolationKind.NETWORK, new, f"its contract refused packets: {reason}")

    def network_closed(self, sandbox_id: str, counts: Mapping[str, int]) -> None:
        """A sandbox's network is no more: what it was refused between the last look and its end."""
        watched = self._closing.pop(sandbox_id, None) or self._watched.get(sandbox_id)
        if watched is not None:
            self.refused_packets(watched, counts)

    def judged(self, sandbox: Sandbox, message: str) -> None:
        """A judge wants it quarantined, which is not this one's to do."""
        violation = Violation(
            sandbox.record.id, ViolationKind.POLICY, 1, OnViolation.QUARANTINE.value, time.time(), message
        )
        self._metrics.violated(violation.fury.value, violation.kind.value, violation.action, 1)
        sandbox.violation = violation

    def rejected(self) -> None:
        """A judge has rejected a request: there is no sandbox."""
        self._metrics.violated(Fury.MEGAERA.value, ViolationKind.POLICY.value, REJECTED, 1)

    def _seen(self, watched: Watched, kind: ViolationKind, count: int, message: str) -> None:
        action = _action(watched.limits, kind)
        broken = watched.windows.add(kind, count, time.monotonic())
        sandbox = watched.sandbox
        violation = Violation(sandbox.record.id, kind, count, action.value, time.time(), message)
        self._metrics.violated(violation.fury.value, kind.value, action.value, count)
        if kind not in watched.told:  # a flood of them is a number, not a flood of records
            watched.told.add(kind)
            _log.info("violation", sandbox=violation.sandbox_id, kind=kind.value, count=count, action=action.value)
            if action is not OnViolation.KILL and kind is not ViolationKind.TIME:
                watched.untold.append(violation)
                asyncio.get_running_loop().call_later(_MAY_END_S, self._lament, watched)
        if sandbox.is_ending:
            return
        sandbox.violation = violation
        if broken is not None:
            self._do(self._quarantine(sandbox, QuarantineReason.SUSPICIOUS_BEHAVIOR, _said(broken)))
        else:
            self._answer(watched, action, violation)

    def _lament(self, watched: Watched) -> None:
        """Keep what was seen; unless that was the end of it, which is kept as such."""
        untold, watched.untold = watched.untold, []
        record = watched.sandbox.record
        for violation in untold:
            if violation.kind is not ViolationKind.MEMORY or record.reason is not Reason.RESOURCE_LIMIT:
                self._wail(_lament(record, violation))

    def _answer(self, watched: Watched, action: OnViolation, violation: Violation) -> None:
        sandbox = watched.sandbox
        if action is OnViolation.QUARANTINE:
            self._do(self._quarantine(sandbox, QuarantineReason.POLICY_VIOLATION, violation.message))
        elif action is OnViolation.THROTTLE:
            self._throttle(watched)
        elif action is OnViolation.KILL and violation.kind is not ViolationKind.TIME:
            reason = Reason.POLICY_VIOLATION if violation.fury is Fury.MEGAERA else Reason.RESOURCE_LIMIT
            self._do(sandbox.kill(reason=reason))

    def _throttle(self, watched: Watched) -> None:
        sandbox = watched.sandbox
        sandbox_id = sandbox.record.id
        limits = sandbox.record.spec.resources.over(sandbox.template.resources)
        less = msgspec.structs.replace(limits, cpu_milli=max(_LEAST_MILLI, limits.cpu_milli // THROTTLED_TO))
        before = self._throttled.pop(sandbox_id, None)
        if before is not None:
            before.cancel()
        else:
            try:
                sandbox.guest.limit(less)
            except (TartarusError, OSError) as error:
                # No answer at all would be worse than the next stronger one.
                _log.warning("not_throttled", sandbox=sandbox_id, error=str(error))
                self._do(sandbox.kill(reason=Reason.RESOURCE_LIMIT))
                return

        def let_go() -> None:
            self._throttled.pop(sandbox_id, None)
            try:
                sandbox.guest.limit(limits)
            except (TartarusError, OSError) as error:  # it has just ended
                _log.debug("not_let_go", sandbox=sandbox_id, error=str(error))

        self._throttled[sandbox_id] = asyncio.get_running_loop().call_later(THROTTLED_S, let_go)

    # What has no event.

    async def _look_forever(self) -> None:
        rounds = 0
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            rounds += 1
            try:
                await self._look_once(disks=rounds % _DISK_EVERY == 0)
            except Exception:  # noqa: BLE001 - whatever it is, it is said, and the others are looked at all the same
                _log.exception("look_failed")

    async def _look_once(self, *, disks: bool) -> None:
        for number, watched in enumerate(list(self._watched.values()), 1):
            if watched.sandbox.asleep or watched.sandbox.is_ending:
                continue
            if watched.must_be_polled:
                watched.look()
            if disks:
                watched.look_at_disk()
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)  # deadlines and launches wait for nobody's disk
        if self.counters is not None and self._watched:
            for sandbox_id, counts in (await self.counters()).items():
                found = self._watched.get(sandbox_id)
                if found is not None:
                    self.refused_packets(found, counts)

    def _do(self, work: Awaitable[object]) -> None:
        async def tried() -> None:
            try:
                await work
            except TartarusError as error:
                _log.error("not_enforced", error=str(error))

        task = asyncio.get_running_loop().create_task(tried())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Guard:
    """What a sandbox tells of itself."""

    def __init__(self, erinyes: Erinyes, watched: Watched) -> None:
        self._erinyes = erinyes
        self._watched = watched
        self.kills_at_deadline = watched.limits.on_timeout is OnViolation.KILL

    def past_deadline(self) -> bool:
        """Its time limit has passed; whether that was answered otherwise than by its end."""
        return self._erinyes.past_deadline(self._watched)

    def stands_still(self) -> None:
        """It is about to be saved: its counters may not be there any more afterwards."""
        self._watched.stands_still()

    def has_another_guest(self) -> None:
        """It was woken up, or saved in a way that may have taken another guest."""
        self._watched.restart()


def _action(limits: Limits, kind: ViolationKind) -> OnViolation:
    if kind is ViolationKind.TIME:
        return limits.on_timeout
    if kind is ViolationKind.NETWORK:
        return limits.on_network
    if kind is ViolationKind.SYSCALL:
        return limits.on_syscall or OnViolation.WARN
    return limits.on_resources


def _lament(record: SandboxRecord, violation: Violation) -> Lamentation:
    category, fault = _CATEGORIES[violation.fury]
    if violation.kind is ViolationKind.NETWORK:
        category = Category.NETWORK
    return Lamentation(
        id=new_id("lam"), tenant=record.tenant, sandbox_id=record.id, template=record.template,
        timestamp=violation.timestamp, category=category, fault=fault, message=violation.message,
        metadata={
            "violation": violation.kind.value, "count": str(violation.count), "action": violation.action,
            "fury": violation.fury.value, "name": record.name,
        },
    )  # fmt: skip


def _said(rule: WindowRule) -> str:
    return f"{rule.count} violations of kind {rule.violation.value} within {rule.within_s:g} s"
