"""The policies of a node: kept with their versions, put in force, tried against what was asked before."""

from __future__ import annotations

import asyncio
import builtins
import difflib
import hashlib
import time
from collections import Counter

import msgspec
import structlog

from tartarus.model.audit import MOST_PAGE, AuditEntry, AuditFinding, AuditQuery, AuditVerification, Written
from tartarus.model.errors import InvalidRequest, InvalidState, TartarusError
from tartarus.model.policies import (
    ChangedVerdict,
    DryRun,
    DryRunReport,
    PolicyVersion,
    PutPolicy,
    Rollback,
    check_policy_id,
)
from tartarus.model.sandbox import Resources, SandboxRecord
from tartarus.node.admission import Admission
from tartarus.node.auditing import Auditor
from tartarus.policy.documents import PolicyDocument, limits_of, read_policy
from tartarus.policy.judges import Admission as Asked
from tartarus.policy.judges import Court, Usage, Verdict, court
from tartarus.store.sandboxes import SandboxStore

_log = structlog.get_logger("tartarus.node.policies")
_MOST_TRIED = 10_000
_MOST_SHOWN = 200
_LATELY = 200
"""Entries that can have followed a change within the moment that it takes."""
_DELETE = "policy.delete"
_CHANGES = frozenset({"policy.put", "policy.rollback", _DELETE})


class PolicyService:
    """Every change is in the audit log and in the store before it is in force for the next request."""

    def __init__(self, store: SandboxStore, admission: Admission, audit: Auditor) -> None:
        self._store = store
        self._admission = admission
        self._audit = audit
        self._changing = asyncio.Lock()
        self._writing = asyncio.Lock()

    async def open(self) -> None:
        """Put in force what is kept. Raises InvalidRequest for a document that this version can't read.

        Better no daemon than one whose policies are not in force.
        """
        await self._put_in_force()
        await self._own_up()

    async def _own_up(self) -> None:
        """Write down that the last change was not made, if a daemon was killed between saying and doing it."""
        page = await self._audit.find(AuditQuery(limit=_LATELY))
        last = next((entry for entry in page.entries if _is_change(entry)), None)
        if last is None or last.decision != "allow":
            return
        in_force = {version.id: _digest(version.text) for version in await self._store.policies.in_force()}
        if in_force.get(last.target) != _said(last):
            entry = AuditEntry(
                actor="tartarus", tenant=last.tenant, action=last.action, target=last.target, decision="error",
                input_digest=last.input_digest, reason=f"entry {last.sequence} was not done: the daemon ended before",
            )  # fmt: skip
            self._audit.note(entry)

    async def _put_in_force(self) -> None:
        # One after another: of two changes at once, the one that was read first must not be put in force last.
        async with self._changing:
            self._admission.replace([_read(version) for version in await self._store.policies.in_force()])

    async def list(self) -> builtins.list[PolicyVersion]:
        """Those in force, by id."""
        return await self._store.policies.in_force()

    async def get(self, policy: str, version: int | None = None) -> PolicyVersion:
        """One version, the newest if none is named. Raises PolicyNotFound."""
        return await self._store.policies.get(policy, version)

    async def history(self, policy: str) -> builtins.list[PolicyVersion]:
        """Every version, the newest first. Raises PolicyNotFound."""
        return await self._store.policies.history(policy)

    async def put(self, policy: str, author: str, request: PutPolicy) -> PolicyVersion:
        """A new version, from now on in force. Raises InvalidRequest with the line, and InvalidState."""
        check_policy_id(policy)
        document = read_policy(request.text, policy)
        if document.id != policy:
            raise InvalidRequest(
                f"the document says that it is {document.id!r}, not {policy!r}", fix="give it the id that it says"
            )
        return await self._add("policy.put", policy, author, request.text, request.comment, request.expected)

    async def rollback(self, policy: str, author: str, request: Rollback) -> PolicyVersion:
        """An earlier version once more, as the newest. Raises PolicyNotFound, and InvalidState for a deletion."""
        old = await self._store.policies.get(policy, request.version)
        if old.deleted:
            raise InvalidState(f"version {old.version} of {policy!r} is its deletion", fix="choose another version")
        comment = request.comment or f"back to version {old.version}"
        return await self._add("policy.rollback", policy, author, old.text, comment, None)

    async def delete(self, policy: str, author: str) -> PolicyVersion:
        """Not in force any more; its history stays. Raises PolicyNotFound, and InvalidState when it is deleted."""
        newest = await self._store.policies.get(policy)
        if newest.deleted:
            raise InvalidState(f"policy {policy!r} is deleted already", fix="roll it back to have it again")
        return await self._add(_DELETE, policy, author, newest.text, "deleted", newest.version, deleted=True)

    async def findings(self, verified: AuditVerification) -> builtins.list[AuditFinding]:
        """Where what is in force is not what the audit log has last of it, as far back as that goes.

        So shows a database that was put back to an earlier moment, or that somebody else has written to.
        """
        async with self._writing:
            last = await self._last_changes()
            in_force = {version.id: version for version in await self._store.policies.in_force()}
            began_anew = (await self._audit.find(AuditQuery(action="audit.break", limit=1))).entries
        found = []
        for policy in sorted(in_force.keys() | last.keys()):
            entry, version = last.get(policy), in_force.get(policy)
            digest = None if version is None else _digest(version.text)
            if entry is None and verified.first == 0 and not began_anew:
                found.append(AuditFinding(f"policy {policy!r}", "it is in force, and no entry says so"))
            elif entry is not None and digest != _said(entry):
                what = f"what is in force of it is not what entry {entry.sequence} says"
                found.append(AuditFinding(f"policy {policy!r}", what))
        return found

    async def _last_changes(self) -> dict[str, Written]:
        """By policy, the last that was done."""
        last: dict[str, Written] = {}
        undone: Counter[tuple[str, str, str]] = Counter()
        before: int | None = None
        while True:
            page = await self._audit.find(AuditQuery(action="policy", before=before, limit=MOST_PAGE))
            for entry in filter(_is_change, page.entries):
                change = (entry.action, entry.target, entry.input_digest)
                if entry.decision == "error":
                    undone[change] += 1
                elif undone[change]:
                    undone[change] -= 1
                else:
                    last.setdefault(entry.target, entry)
            before = page.next_before
            if before is None:
                return last

    async def diff(self, policy: str, old: int, new: int | None = None) -> str:
        """What changed between two versions, as a unified diff. Raises PolicyNotFound."""
        before, after = await self.get(policy, old), await self.get(policy, new)
        lines = difflib.unified_diff(
            before.text.splitlines(keepends=True), after.text.splitlines(keepends=True),
            f"{policy} version {before.version}", f"{policy} version {after.version}",
        )  # fmt: skip
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)

    async def dry_run(self, request: DryRun) -> DryRunReport:
        """How recent requests would be judged with a policy in the place of the one of its id, or beside the others.

        Raises InvalidRequest. Only what is known of a past request counts: not how much was live at that moment.
        """
        candidate = read_policy(request.text, "the policy")
        now = [_read(version) for version in await self._store.policies.in_force()]
        then = [*(document for document in now if document.id != candidate.id), candidate]
        records = await self._store.recent(time.time() - request.hours * 3600.0, _MOST_TRIED)
        judges = court()
        changed = []
        before_count = after_count = 0
        for record in records:
            before, _ = _judged(judges, record, now)
            after, reasons = _judged(judges, record, then)
            before_count += before is Verdict.REJECT
            after_count += after is Verdict.REJECT
            if before is not after:
                changed.append(
                    ChangedVerdict(record.id, record.tenant, record.template, before.value, after.value, reasons)
                )
        return DryRunReport(len(records), before_count, after_count, tuple(changed[:_MOST_SHOWN]))

    async def _add(
        self, action: str, policy: str, author: str, text: str, comment: str, expected: int | None, *,
        deleted: bool = False,
    ) -> PolicyVersion:  # fmt: skip
        digest = _digest(text)
        entry = AuditEntry(
            actor=author, tenant=author, action=action, target=policy, decision="allow", input_digest=digest,
            summary=comment,
        )  # fmt: skip
        made = PolicyVersion(
            id=policy, version=0, text=text, digest=digest, author=author, comment=comment, created_at=time.time(),
            deleted=deleted,
        )  # fmt: skip
        # Who asked may go away: what is written down is then done all the same.
        return await asyncio.shield(asyncio.create_task(self._change(entry, made, expected)))

    async def _change(self, entry: AuditEntry, made: PolicyVersion, expected: int | None) -> PolicyVersion:
        async with self._writing:
            await self._audit.record(entry)
            try:
                kept = await self._store.policies.add(made, expected)
            except TartarusError as error:
                self._audit.note(msgspec.structs.replace(entry, decision="error", reason=str(error)))
                raise
        await self._put_in_force()
        _log.info("policy_changed", policy=kept.id, version=kept.version, author=kept.author, deleted=kept.deleted)
        return kept


def _is_change(entry: Written) -> bool:
    """Whether it says that a policy changes, or that it did not after all."""
    return entry.action in _CHANGES and entry.decision in {"allow", "error"}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _said(entry: Written) -> str | None:
    """The digest of what is in force after a change."""
    return None if entry.action == _DELETE else entry.input_digest


def _read(version: PolicyVersion) -> PolicyDocument:
    return read_policy(version.text, f"policy {version.id!r}, version {version.version}")


def _judged(
    judges: Court, record: SandboxRecord, documents: builtins.list[PolicyDocument]
) -> tuple[Verdict, tuple[str, ...]]:
    asked = Asked(
        tenant=record.tenant, caller=record.tenant, roles=(), spec=record.spec, template=record.template,
        resources=record.spec.resources.over(Resources()), isolation=record.isolation, usage=Usage(),
        limits=limits_of(documents, record.tenant, record.template),
    )  # fmt: skip
    verdict, rulings = judges.pre_admit(asked)
    return verdict, tuple(ruling.reason for ruling in rulings if ruling.verdict is not Verdict.ACCEPT)
