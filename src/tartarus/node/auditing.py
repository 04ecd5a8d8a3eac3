"""What the node writes into the audit log, and how: before the act where a decision about security is made."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
import structlog

from tartarus.model.audit import AuditEntry, AuditPage, AuditProof, AuditQuery, AuditVerification
from tartarus.model.errors import DaemonUnavailable, InvalidRequest
from tartarus.model.sandbox import SandboxRecord
from tartarus.model.settings import Settings
from tartarus.node.admission import Place
from tartarus.node.witnessing import witness
from tartarus.policy.judges import Admission as Asked
from tartarus.policy.judges import Classification, Ruling, Verdict
from tartarus.store.audit import reading
from tartarus.store.audit.entries import digest_of
from tartarus.store.audit.log import AuditLog
from tartarus.store.audit.writing import Retention

T = TypeVar("T")
EXEMPT = "tartarus-doctor"
"""The node's own name, under which it tries what it can do. No client can have it: theirs begin with ``uid-``."""
_log = structlog.get_logger("tartarus.node.audit")
_DECISIONS = {Verdict.ACCEPT: "allow", Verdict.QUARANTINE: "require_review", Verdict.REJECT: "deny"}


class Auditor:
    """The audit log of one daemon. Nothing is taken before `open` and after `close`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._log: AuditLog | None = None

    async def open(self) -> None:
        """Open the log. Raises DaemonUnavailable."""
        settings = self._settings
        name = re.sub(r"[^A-Za-z0-9.-]", "-", settings.node_name)
        self._log = await AuditLog.open(
            settings.audit_dir, f"tartarus/{name}/audit",
            witness=witness(settings.audit_witness) if settings.audit_witness else None,
            retention=Retention(settings.audit_kept_s, settings.audit_bytes),
        )  # fmt: skip

    async def close(self) -> None:
        """Write what waits, and sign."""
        if self._log is not None:
            await self._log.close()

    def add(self, entry: AuditEntry) -> None:
        """Take an entry, which is on disk in half a second. Raises DaemonUnavailable: what it is about must not be."""
        if self._log is None:
            raise DaemonUnavailable("the audit log is not open", fix="try again in a moment")
        self._log.add(entry)

    def note(self, entry: AuditEntry) -> None:
        """Like `add`, for what has happened already: a log that takes nothing is said in the daemon's own."""
        try:
            self.add(entry)
        except DaemonUnavailable as error:
            _log.error("not_audited", action=entry.action, target=entry.target, error=str(error))

    async def record(self, entry: AuditEntry) -> None:
        """Returns once it is on disk: for decisions about security, before the act. Raises DaemonUnavailable."""
        if self._log is None:
            raise DaemonUnavailable("the audit log is not open", fix="try again in a moment")
        await self._log.append(entry, durable=True)

    async def flush(self) -> None:
        """Returns once all that was taken is on disk. Raises DaemonUnavailable."""
        if self._log is not None:
            await self._log.flush()

    def find(self, query: AuditQuery) -> Awaitable[AuditPage]:
        """Entries, the newest first."""
        return self._read(reading.find, query)

    def verify(self) -> Awaitable[AuditVerification]:
        """Look at all of the log."""
        return self._read(reading.verify)

    def prove(self, sequence: int) -> Awaitable[AuditProof]:
        """A proof of one entry. Raises InvalidRequest when there can't be one."""
        return self._read(reading.prove, sequence)

    async def _read(self, read: Callable[..., T], *arguments: Any) -> T:
        if self._log is not None:
            await self._log.flush()
        try:
            return await asyncio.to_thread(read, self._settings.audit_dir, *arguments)
        except (ValueError, OSError) as error:
            raise InvalidRequest("the audit log can't say that", why=str(error)) from error

    # Entries that the node writes.

    def rejected(self, action: str, asked: Asked, against: Sequence[Ruling]) -> None:
        """A request that the judges refused."""
        self.note(_asked_for(action, asked, "deny", asked.template, against))

    def created(self, record: SandboxRecord, place: Place) -> None:
        """A sandbox that is about to be made. Raises DaemonUnavailable: then it must not be."""
        if place.asked.tenant != EXEMPT:
            entry = _asked_for("sandbox.create", place.asked, _DECISIONS[place.verdict], record.id, place.rulings)
            self.add(msgspec.structs.replace(entry, sandbox=record.id))

    def ended(self, record: SandboxRecord) -> None:
        """A sandbox that has ended."""
        lasted_s = (record.ended_at or 0.0) - (record.started_at or record.ended_at or 0.0)
        self.note(
            AuditEntry(
                actor="tartarus", tenant=record.tenant, action="sandbox.end", target=record.id, sandbox=record.id,
                reason="" if record.reason is None else record.reason.value, summary=record.state.value,
                duration_us=int(lasted_s * 1e6),
            )
        )  # fmt: skip

    def classified(self, record: SandboxRecord, said: Classification) -> None:
        """What a judge thinks of a run that has ended."""
        self.note(
            AuditEntry(
                actor="tartarus", tenant=record.tenant, action="sandbox.classify", target=record.id, sandbox=record.id,
                reason=said.reason, summary=said.category, decision="require_review" if said.quarantine else "",
            )
        )  # fmt: skip


def _asked_for(action: str, asked: Asked, decision: str, target: str, rulings: Sequence[Ruling]) -> AuditEntry:
    return AuditEntry(
        actor=asked.caller, tenant=asked.tenant, action=action, target=target, decision=decision,
        rules=asked.limits.documents, reason="; ".join(f"{one.judge}: {one.reason}" for one in rulings if one.reason),
        input_digest=digest_of(asked.spec), summary=f"{asked.template} at {asked.isolation.value}",
    )  # fmt: skip
