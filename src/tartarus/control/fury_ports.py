"""What the control layer needs of failures and quarantine, as protocols; see `ports`."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any, Protocol

from tartarus.model.lamentations import Lamentation, LamentationFilter
from tartarus.model.quarantine import Case, QuarantineReason, ReleaseRequest
from tartarus.model.sandbox import ExecSpec, SandboxRecord

if TYPE_CHECKING:
    from tartarus.control.ports import Sandbox


class Lamentations(Protocol):
    """The tenant's failed runs."""

    async def list(self, tenant: str, wanted: LamentationFilter) -> builtins.list[Lamentation]:
        """Those that fit, newest first."""

    async def get(self, tenant: str, lament_id: str) -> Lamentation:
        """One of them. Raises LamentationNotFound."""

    async def purge(self, tenant: str, older_than_s: float) -> int:
        """Forget the older ones; returns how many."""

    async def retry(self, tenant: str, lament_id: str) -> Sandbox:
        """Make what a dead letter asked for."""


class Quarantine(Protocol):
    """Sandboxes that are held."""

    async def take(self, sandbox: Any, reason: QuarantineReason, detail: str, *, by: str = "") -> Case:
        """Freeze one, and keep it as evidence."""

    def list(self) -> builtins.list[Case]:
        """Every case, newest first."""

    def get(self, name: str) -> Case:
        """One of them. Raises CaseNotFound."""

    async def release(self, name: str, by: str, request: ReleaseRequest) -> SandboxRecord:
        """Let it go on."""

    async def destroy(self, name: str, by: str, *, keep_evidence: bool = False) -> None:
        """End it."""

    async def examine(self, name: str, tenant: str, command: ExecSpec | None) -> Sandbox:
        """A sandbox that sees its evidence."""


class Furies(Protocol):
    """What the node does about failures and broken limits."""

    @property
    def lamentations(self) -> Lamentations:
        """Failed runs."""

    @property
    def quarantine(self) -> Quarantine:
        """Sandboxes that are held."""
