"""`Quarantine`: sandboxes that are frozen and kept as evidence."""

from __future__ import annotations

import builtins

from tartarus.model.quarantine import Case, QuarantineReason, QuarantineRequest, ReleaseRequest
from tartarus.model.sandbox import ExecSpec, SandboxRecord
from tartarus.sdk import quarantine_calls as calls
from tartarus.sdk.client import Client


class Quarantine:
    """Quarantined sandboxes of one daemon, whose owner decides what becomes of them."""

    def __init__(self, client: Client | None = None) -> None:
        self._client = client or Client()

    def take(
        self, sandbox: str, *, reason: QuarantineReason | str = QuarantineReason.MANUAL_FLAG, detail: str = ""
    ) -> Case:
        """Freeze a live sandbox of yours, cut it off, and keep it as evidence. Raises InvalidState."""
        request = QuarantineRequest(QuarantineReason(reason), detail)
        return self._client.transport.call(calls.take(sandbox, request))

    def list(self) -> builtins.list[Case]:
        """Every case that you may see, newest first."""
        return self._client.transport.call(calls.cases())

    def get(self, name: str) -> Case:
        """One, by its id or its sandbox's. Raises CaseNotFound."""
        return self._client.transport.call(calls.case(name))

    def release(self, name: str, *, paused: bool = False) -> SandboxRecord:
        """Let it go on; `paused`: frozen until it is resumed. Its evidence stays. Raises InvalidState."""
        return self._client.transport.call(calls.release(name, ReleaseRequest(paused)))

    def destroy(self, name: str, *, keep_evidence: bool = False) -> None:
        """End it, and remove its evidence."""
        self._client.transport.call(calls.destroy(name, keep_evidence=keep_evidence))

    def examine(self, name: str, *argv: str) -> SandboxRecord:
        """A fresh sandbox that sees the evidence, read-only, at `/evidence`, and has no network."""
        command = ExecSpec(argv) if argv else None
        return self._client.transport.call(calls.examine(name, command))
