"""Typhon: take a sandbox out of the world at once, keep what it was, and do with it what its daemon's owner says."""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog

from tartarus.images.memory import MemorySets
from tartarus.model.errors import GuestFailed, InvalidState, TartarusError, Unsupported
from tartarus.model.ids import new_id
from tartarus.model.lamentations import Category, Fault, Lamentation
from tartarus.model.quarantine import Case, CaseStatus, QuarantineReason, ReleaseRequest
from tartarus.model.sandbox import (
    ExecSpec,
    Isolation,
    Mount,
    Reason,
    ResourceRequest,
    SandboxRecord,
    SandboxSpec,
)
from tartarus.model.security import SeccompAction, SecurityConfig
from tartarus.model.states import State
from tartarus.node.quarantine.cases import Cases
from tartarus.node.quarantine.evidence import Collector
from tartarus.node.sandbox import Sandbox
from tartarus.store.sandboxes import SandboxStore
from tartarus.telemetry.metrics import Metrics

_log = structlog.get_logger("tartarus.node.quarantine")
_FREEZE_ATTEMPTS = 3
_TAKEN = frozenset({State.RUNNING, State.PAUSED})
_EXAMINED_S = 3600.0
_EXAMINER = ResourceRequest(memory_bytes=512 * 1024**2, cpu_milli=1000, pids=128, disk_bytes=1024**3)
Cut = Callable[[str], Awaitable[None]]
"""Close a sandbox's network at once, by the sandbox's id; nothing for one without."""

Tell = Callable[[str, Case, str, str], Awaitable[None]]
"""Write down, durably, that something is done to a case: what, which, by whom, why."""
ENTER, RELEASE, DESTROY, EXAMINE = "quarantine.enter", "quarantine.release", "quarantine.destroy", "quarantine.examine"


class Typhon:
    """One node's quarantine. `make`: makes a sandbox; `levels`: those that can show evidence, the strongest first.

    `kept_s`: for how many seconds cases that hold no sandbox any more are kept.
    """

    def __init__(
        self, store: SandboxStore, metrics: Metrics, cases: Cases, collector: Collector, sets: MemorySets,
        wail: Callable[[Lamentation], None], make: Callable[[str, SandboxSpec], Awaitable[Sandbox]],
        levels: Callable[[], builtins.list[Isolation]], kept_s: float,
    ) -> None:  # fmt: skip
        self.cut: Cut | None = None
        self.restore: Cut | None = None
        self.tell: Tell | None = None
        self.collector = collector
        self._store = store
        self._metrics = metrics
        self._cases = cases
        self._sets = sets
        self._wail = wail
        self._make = make
        self._levels = levels
        self._kept_s = kept_s
        self._held: dict[str, Sandbox] = {}
        self._taking: dict[str, asyncio.Task[Case]] = {}
        self._untold: set[str] = set()
        self._collecting: dict[str, asyncio.Task[None]] = {}

    def open(self) -> None:
        """Find the cases of earlier daemons."""
        self._cases.open()
        self._sets.open()
        self._count()

    async def close(self) -> None:
        """Let the held ones' processes end with this daemon; cases and evidence stay."""
        collecting = list(self._collecting.values())
        for work in collecting:
            work.cancel()
        await asyncio.gather(*collecting, return_exceptions=True)
        left = list(self._held.values())
        self._held.clear()  # their cases stay as they are: their end is the daemon's, not their own
        for sandbox in left:
            await sandbox.let_go_of_quarantined()

    # Into quarantine.

    async def take(self, sandbox: Sandbox, reason: QuarantineReason, detail: str, *, by: str = "tartarus") -> Case:
        """Freeze it, cut it off, say so, and begin to collect evidence. Twice is once, and nobody can call it off.

        Raises InvalidState for one that sleeps or has ended. One that can't be frozen is ended instead, and said so.
        """
        sandbox_id = sandbox.record.id
        taking = self._taking.get(sandbox_id)
        if taking is None and sandbox_id in self._held:
            return self._cases.find(sandbox_id)
        if taking is None:
            taking = asyncio.get_running_loop().create_task(self._take(sandbox, reason, detail, by))
            self._taking[sandbox_id] = taking
            taking.add_done_callback(lambda _: self._taking.pop(sandbox_id, None))
        return await asyncio.shield(taking)

    async def _take(self, sandbox: Sandbox, reason: QuarantineReason, detail: str, by: str) -> Case:
        began = time.perf_counter()
        _check(sandbox)
        frozen = sandbox.record.state is State.PAUSED or await self._freeze(sandbox)
        freeze_s = time.perf_counter() - began
        async with sandbox.turn:  # whoever saves it just now has let it go on by then, or put it to sleep
            _check(sandbox)
            record = sandbox.record
            frozen = frozen and (record.state is State.PAUSED or await self._freeze(sandbox))
            self._held[record.id] = sandbox
            sandbox.quarantine(detail or reason.value)
        case = Case(
            id=new_id("case"), sandbox_id=record.id, tenant=record.tenant, name=record.name, template=record.template,
            isolation=record.isolation, reason=reason, detail=detail, by=by, at=time.time(),
            status=CaseStatus.HELD if frozen else CaseStatus.ENDED,
            freeze_ms=round(freeze_s * 1e3, 3) if frozen else None,
        )  # fmt: skip
        case = await self._cut_off(sandbox, case)
        self._metrics.quarantined(reason.value, freeze_s if frozen else None)
        self._wail(_lament(record, case))
        _log.warning("quarantined", sandbox=record.id, reason=reason.value, detail=detail, by=by, frozen=frozen)
        await self._tell(ENTER, case, by, detail)
        if not frozen:
            return await self._ended_instead(sandbox, case)
        await asyncio.to_thread(self._cases.keep, case)
        await self._say(sandbox)
        self._collect(sandbox, case)
        self._count()
        return self._cases.get(case.id)

    async def _ended_instead(self, sandbox: Sandbox, case: Case) -> Case:
        self._held.pop(case.sandbox_id, None)
        case = msgspec.structs.replace(
            case, status=CaseStatus.ENDED, trouble="it could not be frozen, and was ended instead"
        )
        self._cases.keep(case)
        await sandbox.end_quarantined(Reason.POLICY_VIOLATION)
        self._count()
        return case

    async def _freeze(self, sandbox: Sandbox) -> bool:
        """Whether nothing of it runs any more. Raises InvalidState for one that has just ended."""
        for _ in range(_FREEZE_ATTEMPTS):
            try:
                await sandbox.guest.pause()
            except Unsupported:
                return False
            except GuestFailed as error:
                if sandbox.guest.ended.done():
                    raise InvalidState("the sandbox has just ended") from error
                _log.warning("freeze_failed", sandbox=sandbox.record.id, error=str(error))
            else:
                return True
        return False

    async def _cut_off(self, sandbox: Sandbox, case: Case) -> Case:
        if self.cut is None:
            return msgspec.structs.replace(case, network_cut=True)  # no sandbox has any network here
        try:
            await self.cut(sandbox.record.id)
        except (TartarusError, OSError) as error:
            # Frozen it sends nothing; what the host holds for it is closed when it ends.
            return msgspec.structs.replace(case, trouble=f"its network could not be cut: {error}")
        return msgspec.structs.replace(case, network_cut=True)

    async def _say(self, sandbox: Sandbox) -> None:
        """Its state, in the store; with a full disk that comes later, and it is frozen all the same."""
        self._untold.add(sandbox.record.id)
        try:
            sandbox.record = await self._store.transition(
                sandbox.record.id, _TAKEN, State.QUARANTINED, reason=Reason.POLICY_VIOLATION,
                message=sandbox.record.message,
            )  # fmt: skip
            self._untold.discard(sandbox.record.id)
        except TartarusError as error:
            _log.error("quarantine_not_stored", sandbox=sandbox.record.id, error=str(error))

    def _collect(self, sandbox: Sandbox, case: Case) -> None:
        task = asyncio.get_running_loop().create_task(self._collected(sandbox, case))
        self._collecting[case.id] = task
        task.add_done_callback(lambda _: self._collecting.pop(case.id, None))

    async def _collected(self, sandbox: Sandbox, case: Case) -> None:
        try:
            place = await asyncio.to_thread(self._cases.collecting, case.id)
            evidence = await self.collector.collect(sandbox, case, place)
            if not await self._freeze(sandbox):  # it had to run for a moment to be saved
                await self._ended_instead(sandbox, self._cases.get(case.id))
            await asyncio.to_thread(self._cases.collected, case.id, evidence)
        except TartarusError as error:
            self._change(case.id, trouble=str(error))
            _log.error("evidence_not_kept", case=case.id, error=str(error))
        except Exception as error:  # noqa: BLE001 - it stays frozen, and the case says why there is nothing to see
            self._change(case.id, trouble=f"evidence could not be collected: {type(error).__name__}: {error}")
            _log.exception("evidence_not_kept", case=case.id)
        else:
            self._change(case.id, evidence=evidence, complete=True, trouble="")

    def _change(self, case_id: str, **changes: Any) -> Case:
        case = msgspec.structs.replace(self._cases.get(case_id), **changes)
        self._cases.keep(case)
        return case

    # What becomes of it.

    def ended(self, sandbox: Sandbox) -> None:
        """A held one has ended by itself, or was killed from outside."""
        if self._held.pop(sandbox.record.id, None) is not None:
            case = self._cases.find(sandbox.record.id)
            self._change(case.id, status=CaseStatus.ENDED, trouble=case.trouble or "it ended while it was held")
            self._count()

    async def sweep(self) -> None:
        """Try again what a full disk kept from being written, and let go of what was kept long enough."""
        await asyncio.to_thread(self._cases.flush)
        for sandbox in list(self._held.values()):
            case = self._cases.find(sandbox.record.id)
            if sandbox.record.id in self._untold:
                await self._say(sandbox)
            if not case.complete and case.id not in self._collecting:
                self._collect(sandbox, case)
        before = time.time() - self._kept_s
        for case in self._cases.list():
            if case.status is not CaseStatus.HELD and (case.closed_at or case.at) < before:
                await self._expire(case)

    async def _expire(self, case: Case) -> None:
        try:
            await self.destroy(case.id, "tartarus")
        except (TartarusError, OSError) as error:  # the next sweep tries again
            _log.error("case_not_removed", case=case.id, error=str(error))

    async def settled(self, case_id: str) -> Case:
        """The case, once its evidence is collected or could not be."""
        task = self._collecting.get(case_id)
        if task is not None:
            await asyncio.wait([task])
        return self._cases.get(case_id)

    def list(self) -> builtins.list[Case]:
        """Every case, newest first."""
        return self._cases.list()

    def get(self, name: str) -> Case:
        """One, by its id or its sandbox's. Raises CaseNotFound."""
        return self._cases.find(name)

    async def release(self, name: str, by: str, request: ReleaseRequest) -> SandboxRecord:
        """Let it go on. Its evidence stays. Raises CaseNotFound, and InvalidState for one whose processes are gone."""
        await self._taken()
        case = self._cases.find(name)
        sandbox = self._held.get(case.sandbox_id)
        if sandbox is None or case.status is not CaseStatus.HELD:
            raise InvalidState(
                f"{case.sandbox_id} can't go on", why=case.trouble or f"it is {case.status.value}",
                fix="its evidence can be examined, or destroyed",
            )  # fmt: skip
        await self.settled(case.id)
        await self._tell(RELEASE, case, by, "")
        if self.restore is not None:
            await self.restore(sandbox.record.id)
        sandbox.record = await self._store.transition(
            sandbox.record.id, {State.QUARANTINED}, State.PAUSED, reason=None, message=""
        )
        self._held.pop(case.sandbox_id, None)
        self._change(case.id, status=CaseStatus.RELEASED, closed_at=time.time(), closed_by=by)
        self._count()
        _log.warning("released", sandbox=case.sandbox_id, case=case.id, by=by)
        sandbox.leave_quarantine()
        sandbox.set_deadline()
        if not request.paused:
            await sandbox.resume()
        return sandbox.record

    async def destroy(self, name: str, by: str, *, keep_evidence: bool = False) -> None:
        """End it, and remove its evidence unless that is to be kept. Raises CaseNotFound."""
        await self._taken()
        case = self._cases.find(name)
        await self._tell(DESTROY, case, by, "its evidence is kept" if keep_evidence else "")
        task = self._collecting.get(case.id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        # One that was released may be held again, for another case, which is not what is being destroyed.
        sandbox = self._held.pop(case.sandbox_id, None) if case.status is CaseStatus.HELD else None
        if sandbox is not None:
            await sandbox.end_quarantined(Reason.POLICY_VIOLATION)
        elif case.status is CaseStatus.DEAD:
            await self._end_record(case)
        _log.warning("destroyed", sandbox=case.sandbox_id, case=case.id, by=by, keep_evidence=keep_evidence)
        if keep_evidence:
            self._change(case.id, status=CaseStatus.ENDED, closed_at=time.time(), closed_by=by)
        else:
            await self._sets.remove(case.tenant, case.id)
            await asyncio.to_thread(self._cases.remove, case.id)
        self._count()

    async def _taken(self) -> None:
        """Those that are just being taken are."""
        if self._taking:
            await asyncio.wait(list(self._taking.values()))

    async def _end_record(self, case: Case) -> None:
        try:
            await self._store.transition(
                case.sandbox_id, {State.QUARANTINED}, State.STOPPING, State.KILLED, reason=Reason.POLICY_VIOLATION
            )
        except InvalidState as error:  # its record went another way: lost, most likely
            _log.info("record_ended_before", sandbox=case.sandbox_id, error=str(error))

    async def examine(self, name: str, tenant: str, command: ExecSpec | None) -> Sandbox:
        """A fresh sandbox that sees the evidence, read-only, at `/evidence`: the strongest level, and no network."""
        await self._taken()
        case = await self.settled(self._cases.find(name).id)
        if not case.complete:
            raise InvalidState(f"the evidence of {case.id} is not there", why=case.trouble)
        await self._tell(EXAMINE, case, tenant, "")
        level = next(iter(self._levels()), None)
        if level is None:
            raise Unsupported(
                "this host can't examine evidence", why="no level here holds it and can show files of the host",
                fix="tartarus doctor shows how to get gVisor or the container level",
            )  # fmt: skip
        spec = SandboxSpec(
            isolation=level, command=command, timeout_s=_EXAMINED_S, resources=_EXAMINER,
            mounts=(Mount(str(self._cases.evidence(case.id)), "/evidence", read_only=True),),
            labels={"tartarus.io/examines": case.id}, security=examiner_security(level),
        )  # fmt: skip
        return await self._make(tenant, spec)

    async def _tell(self, action: str, case: Case, by: str, detail: str) -> None:
        """What is decided is written down before it is done; that a sandbox is taken, right after it stands still."""
        if self.tell is None:
            return
        try:
            await self.tell(action, case, by, detail)
        except TartarusError as error:
            if action != ENTER:
                raise
            _log.error("not_audited", case=case.id, error=str(error))

    def _count(self) -> None:
        self._metrics.in_quarantine(len(self._held))


def examiner_security(level: Isolation) -> SecurityConfig:
    """The strictest filter there is: it reads what it is shown, and makes no socket. Evidence is hostile, too."""
    # gVisor's kernel would end a thread, and leave a program that waits for it.
    action = SeccompAction.TRAP if level is Isolation.GVISOR else SeccompAction.KILL
    return SecurityConfig(seccomp_profile="examine", seccomp_default=action, drop_capabilities=("ALL",))


def _check(sandbox: Sandbox) -> None:
    if sandbox.asleep or sandbox.is_ending or sandbox.record.state not in _TAKEN:
        raise InvalidState(
            f"can't quarantine a sandbox that is {sandbox.record.state.value}", why="nothing of it runs",
            fix="wake it first, or end it",
        )  # fmt: skip


def _lament(record: SandboxRecord, case: Case) -> Lamentation:
    return Lamentation(
        id=new_id("lam"), tenant=record.tenant, sandbox_id=record.id, template=record.template, timestamp=case.at,
        category=Category.POLICY, fault=Fault.POLICY, message=f"quarantined: {case.detail or case.reason.value}",
        metadata={"case": case.id, "reason": case.reason.value, "name": record.name, "by": case.by},
    )  # fmt: skip
