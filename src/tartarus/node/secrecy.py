"""The secrets of sandboxes: granted and fetched before one is made, in its memory before its command starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from tartarus.guest.channel import GuestChannel
from tartarus.model.audit import AuditEntry
from tartarus.model.contract import HTTPS_PORT
from tartarus.model.errors import (
    FileFailed,
    GuestFailed,
    InvalidRequest,
    InvalidState,
    SecretRefused,
    SecretUnavailable,
    Unsupported,
)
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxRecord, SandboxSpec
from tartarus.model.secrets import SecretsSection
from tartarus.model.states import State
from tartarus.network.egress.messages import Credential
from tartarus.node.auditing import Auditor
from tartarus.secrets.broker import Broker, Granted
from tartarus.secrets.held import Secret
from tartarus.secrets.redaction import Redactor

if TYPE_CHECKING:
    from tartarus.node.sandbox import Sandbox

_FILE_MODE = 0o400
_REFRESH_LIMIT_S = 30.0
"""The guest is hostile by then, and may take nothing."""


class Held:
    """What one sandbox has, for as long as it lives. `close` wipes it."""

    def __init__(self, granted: Sequence[Granted], values: Sequence[Secret], redactor: Redactor) -> None:
        self._granted = tuple(granted)
        self._values = list(values)
        self._redactor = redactor
        self._spellings = [redactor.add(value) for value in values]

    def __bool__(self) -> bool:
        return bool(self._values)

    def added_to(self, command: ExecSpec) -> ExecSpec:
        """The sandbox's own command with its variables, which nothing else gets."""
        values = {
            one.use.target: value.reveal().decode("utf-8", "surrogateescape")
            for one, value in zip(self._granted, self._values, strict=True)
            if one.use.as_ == "env"
        }
        return msgspec.structs.replace(command, env=command.env | values)

    def credential(self, host: str) -> Credential | None:
        """What the egress proxy is to add to requests for that domain, if there is such a secret."""
        for one, value in zip(self._granted, self._values, strict=True):
            if one.use.as_ == "proxy" and one.use.target == host:
                said = one.grant.prefix.encode() + value.reveal()
                return Credential(HTTPS_PORT, one.grant.header, said.decode("ascii"))
        return None

    async def deliver(self, channel: GuestChannel) -> None:
        """Write the files; each appears whole, readable by the template's user alone. Raises SecretUnavailable."""
        # Its own copies: the sandbox may end meanwhile, and the values with it.
        files = [
            (one, value.reveal())
            for one, value in zip(self._granted, self._values, strict=True)
            if one.use.as_ == "file"
        ]
        for one, content in files:
            try:
                await channel.write(one.use.target, content, mode=_FILE_MODE, in_memory=True)
            except FileFailed as error:
                raise SecretUnavailable(
                    f"secret {one.use.ref!r} can't be put at {one.use.target}", why=error.why,
                    fix="that place must be the sandbox's own memory: nothing may have been put over it",
                ) from None  # fmt: skip

    def scrub(self, text: str) -> str:
        """`text` without any value that is held by any sandbox."""
        return self._redactor.text(text)

    def close(self) -> None:
        """Wipe all values; safe to repeat."""
        for spellings in self._spellings:
            self._redactor.remove(spellings)
        for value in self._values:
            value.close()
        self._spellings.clear()
        self._values.clear()
        self._granted = ()


class Secrecy:
    """One node's. Raises InvalidRequest for a configuration that can't be."""

    def __init__(self, settings: SecretsSection, audit: Auditor, redactor: Redactor | None = None) -> None:
        self._broker = Broker(settings)
        self._audit = audit
        self._redactor = redactor or Redactor()

    def granted(self, tenant: str, template: str, spec: SandboxSpec, isolation: Isolation) -> SandboxSpec:
        """The request with its secrets by their grants' names. Raises SecretRefused, Unsupported, InvalidRequest."""
        if not spec.secrets:
            return spec
        try:
            granted = self._broker.grant(tenant, template, spec.secrets)
        except SecretRefused:
            # What is no name of ours is not written down: somebody may have typed the secret itself.
            names = ", ".join(use.ref for use in spec.secrets if self._broker.knows(use.ref)) or "unknown"
            self._audit.note(
                AuditEntry(
                    actor=tenant, tenant=tenant, action="secret.deliver", target=names, decision="deny",
                    reason=f"not granted for template {template}",
                )
            )  # fmt: skip
            raise
        if isolation is Isolation.PROCESS and any(one.use.as_ == "file" for one in granted):
            raise Unsupported(
                "a process-level sandbox takes no secrets as files",
                why="it has no memory-only directory of its own: they would lie on the host's disk",
                fix="use --isolation container or stronger, or as=env",
            )
        if spec.idle_s is not None:
            raise InvalidRequest(
                "a sandbox with secrets is not hibernated", why="its memory would be written to disk",
                fix="leave the idle time out",
            )  # fmt: skip
        return msgspec.structs.replace(spec, secrets=tuple(one.use for one in granted))

    async def fetch(self, record: SandboxRecord) -> Held:
        """The values of a sandbox's secrets, all or none.

        Raises SecretRefused, SecretUnavailable, and DaemonUnavailable when the audit log can't take it.
        """
        if not record.spec.secrets:
            return Held((), (), self._redactor)
        granted = self._broker.grant(record.tenant, record.template, record.spec.secrets)
        await self._recorded(record, granted)
        fetched = await asyncio.gather(*(self._broker.fetch(one) for one in granted), return_exceptions=True)
        values = [one for one in fetched if isinstance(one, Secret)]
        failed = [one for one in fetched if isinstance(one, BaseException)]
        if failed:
            for value in values:
                value.close()
            raise failed[0]
        return Held(granted, values, self._redactor)

    async def refresh(self, sandbox: Sandbox) -> tuple[str, ...]:
        """Fetch a running sandbox's secrets anew and replace its files; the names of what was replaced.

        A variable stays what it was. Raises InvalidState, and what `fetch` and `Held.deliver` do.
        """
        async with sandbox.turn:  # a pause comes before or after
            _require_running(sandbox)
            held = await self.fetch(sandbox.record)
            try:
                _require_running(sandbox)
            except InvalidState:
                held.close()
                raise
            before, sandbox.held = sandbox.held, held
            if sandbox.line is not None:
                sandbox.line.add(held.credential)
            if before is not None:
                before.close()
            try:
                async with asyncio.timeout(_REFRESH_LIMIT_S):
                    await held.deliver(sandbox.channel)
            except TimeoutError:
                raise GuestFailed(f"the sandbox did not take its secrets within {_REFRESH_LIMIT_S:g} s") from None
        return tuple(use.ref for use in sandbox.record.spec.secrets if use.as_ != "env")

    async def _recorded(self, record: SandboxRecord, granted: Sequence[Granted]) -> None:
        """On disk before any provider is asked: the last entry brings those before it along."""
        entries = [
            AuditEntry(
                actor=record.tenant, tenant=record.tenant, action="secret.deliver", target=one.use.ref,
                decision="allow", summary=f"as {one.use.as_}", sandbox=record.id,
            )
            for one in granted
        ]  # fmt: skip
        for entry in entries[:-1]:
            self._audit.add(entry)
        await self._audit.record(entries[-1])


def _require_running(sandbox: Sandbox) -> None:
    if sandbox.record.state is not State.RUNNING or sandbox.is_ending:
        state = "being ended" if sandbox.is_ending else sandbox.record.state.value
        raise InvalidState(f"can't renew the secrets of a sandbox that is {state}")


def refuse_to_save(spec: SandboxSpec) -> None:
    """Raise Unsupported for a sandbox that was given secrets: what is written of it would have them.

    Removing their files would not do: whatever runs in it has read them.
    """
    if spec.secrets:
        raise Unsupported(
            "a sandbox with secrets is not saved, copied or hibernated",
            why="what it read of its secrets would be on disk, or in the copies",
            fix="pause it instead, or make it without secrets",
        )
