"""What a node does about sandboxes that fail or break a limit, in one place for the service to call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from tartarus.images.memory import MemorySets
from tartarus.model.audit import AuditEntry
from tartarus.model.errors import RequestRejected
from tartarus.model.quarantine import Case, QuarantineReason
from tartarus.model.sandbox import Isolation, SandboxRecord, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.node.auditing import Auditor
from tartarus.node.enforcement.erinyes import Erinyes
from tartarus.node.lamentations import Lamentations
from tartarus.node.levels import Levels
from tartarus.node.memory import Memory
from tartarus.node.networking import Networking
from tartarus.node.offers import Offers
from tartarus.node.quarantine.cases import Cases
from tartarus.node.quarantine.evidence import Collector
from tartarus.node.quarantine.typhon import Typhon
from tartarus.node.sandbox import Sandbox
from tartarus.policy.documents import Limits
from tartarus.store.sandboxes import SandboxStore
from tartarus.telemetry.metrics import Metrics

_EXAMINING = (Isolation.GVISOR, Isolation.CONTAINER)
"""Levels that can show evidence to an examiner, the stronger first."""


class Furies:
    """One node's. `make`: makes a sandbox; `limits`: what the policies say of a sandbox that begins now."""

    def __init__(
        self, settings: Settings, store: SandboxStore, metrics: Metrics, levels: Levels, memory: Memory, offers: Offers,
        limits: Callable[[SandboxRecord], Limits], make: Callable[[str, SandboxSpec], Awaitable[Sandbox]],
        audit: Auditor, networking: Networking,
    ) -> None:  # fmt: skip
        root = settings.state_dir / "quarantine"
        sets = MemorySets(root / "memory", settings.memory_budget_bytes)
        self.lamentations = Lamentations(store, metrics, settings.lamentations_kept_s, make)
        self.quarantine = Typhon(
            store, metrics, Cases(root / "cases", offers.remover), Collector(memory, offers, sets),
            sets, self.lamentations.wail, make, lambda: [each for each in _EXAMINING if each in levels.runtimes],
            settings.quarantine_kept_s,
        )  # fmt: skip
        self.quarantine.tell = partial(_audited, audit)
        self.quarantine.collector.audit = audit.find
        self.quarantine.collector.contract = networking.evidence
        self.quarantine.cut, self.quarantine.restore = networking.cut, networking.restore
        self.erinyes = Erinyes(limits, metrics, self.lamentations.wail, self.quarantine.take, networking.counters)
        networking.last_counts = self.erinyes.network_closed

    async def open(self, live: Iterable[Sandbox]) -> None:
        """Take over what an earlier daemon left; `live`: its sandboxes that sleep."""
        await self.lamentations.open()
        self.quarantine.open()
        self.erinyes.open()
        for sandbox in live:
            self.erinyes.watch(sandbox)

    async def let_go(self) -> None:
        """The daemon is about to end every sandbox: what is held ends otherwise."""
        await self.quarantine.close()

    async def close(self) -> None:
        """Every sandbox has ended."""
        await self.erinyes.close()
        await self.lamentations.close()

    async def sweep(self) -> None:
        """Every minute."""
        await self.lamentations.sweep()
        await self.quarantine.sweep()

    def adopted(self, sandbox: Sandbox) -> None:
        """A sandbox runs."""
        self.erinyes.watch(sandbox)

    async def suspected(self, sandbox: Sandbox, reasons: Iterable[str]) -> None:
        """Judges want it quarantined that has just begun."""
        why = "; ".join(reasons)
        self.erinyes.judged(sandbox, why)
        await self.quarantine.take(sandbox, QuarantineReason.UNTRUSTED_SOURCE, why)

    def not_started(self, tenant: str, spec: SandboxSpec, error: Exception) -> None:
        """A request came to nothing."""
        if isinstance(error, RequestRejected):
            self.erinyes.rejected()
        self.lamentations.not_started(tenant, spec, error)

    def lost(self, record: SandboxRecord) -> None:
        """A sandbox is gone of which this daemon had nothing but the record."""
        self.lamentations.ended(record)

    def ended(self, sandbox: Sandbox) -> None:
        """A sandbox has ended."""
        self.erinyes.ended(sandbox)
        self.quarantine.ended(sandbox)
        if not sandbox.left_behind:
            scrub = None if not sandbox.held else sandbox.held.scrub
            self.lamentations.ended(sandbox.record, sandbox.log, sandbox.violation, scrub)


async def _audited(audit: Auditor, action: str, case: Case, by: str, detail: str) -> None:
    await audit.record(
        AuditEntry(
            actor=by, tenant=case.tenant, action=action, target=case.id, sandbox=case.sandbox_id,
            reason=f"{case.reason.value}: {detail}" if detail else case.reason.value, summary=case.status.value,
        )
    )  # fmt: skip
