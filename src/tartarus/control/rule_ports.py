"""What the control layer needs of policies and system call profiles, as protocols; see `ports`."""

from __future__ import annotations

import builtins
from typing import Any, Protocol

from tartarus.model.audit import AuditFinding, AuditVerification
from tartarus.model.policies import DryRun, DryRunReport, PolicyVersion, PutPolicy, Rollback
from tartarus.model.seccomp import Profile, PutProfile, RecordedCalls


class Policies(Protocol):
    """The host's policies with their versions. Whoever may change them was checked before."""

    async def list(self) -> builtins.list[PolicyVersion]:
        """Those in force, by id."""

    async def get(self, policy: str, version: int | None = None) -> PolicyVersion:
        """One version, the newest if none is named. Raises PolicyNotFound."""

    async def history(self, policy: str) -> builtins.list[PolicyVersion]:
        """Every version, the newest first."""

    async def put(self, policy: str, author: str, request: PutPolicy) -> PolicyVersion:
        """A new version, from now on in force."""

    async def rollback(self, policy: str, author: str, request: Rollback) -> PolicyVersion:
        """An earlier version once more, as the newest."""

    async def delete(self, policy: str, author: str) -> PolicyVersion:
        """Not in force any more; its history stays."""

    async def findings(self, verified: AuditVerification) -> builtins.list[AuditFinding]:
        """Where what is in force is not what the audit log has last of it."""

    async def diff(self, policy: str, old: int, new: int | None = None) -> str:
        """What changed between two versions, as a unified diff."""

    async def dry_run(self, request: DryRun) -> DryRunReport:
        """How recent requests would be judged."""


class Profiles(Protocol):
    """System call profiles: built-in ones, and each tenant's own."""

    async def list(self, tenant: str) -> builtins.list[Profile]:
        """All that the tenant can name."""

    async def get(self, tenant: str, name: str) -> Profile:
        """One of them. Raises ProfileNotFound."""

    async def put(self, tenant: str, name: str, request: PutProfile) -> Profile:
        """Keep one."""

    async def remove(self, tenant: str, name: str) -> None:
        """Forget one of the tenant's own."""

    def recorded(self, sandbox: Any) -> RecordedCalls:
        """What a sandbox has called. Raises InvalidState for one whose calls are not recorded."""
