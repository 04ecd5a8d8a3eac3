"""Failed runs (Cocytus): each is classified once, when it ends or does not begin, and kept for its tenant."""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import structlog

from tartarus.model.enforcement import Violation, ViolationKind
from tartarus.model.errors import (
    BuildFailed,
    CommandNotFound,
    ImageNotFound,
    ImageRefused,
    InvalidRequest,
    NotExecutable,
    RegistryFailed,
    RequestRejected,
    SnapshotNotFound,
    TartarusError,
    TemplateBlocked,
    TemplateFailed,
    TemplateNotFound,
    TimeLimit,
    Unsupported,
)
from tartarus.model.ids import new_id
from tartarus.model.lamentations import MAX_TRACE_BYTES, Category, Fault, Lamentation, LamentationFilter
from tartarus.model.sandbox import Reason, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.node.outputlog import OutputLog
from tartarus.node.sandbox import Sandbox
from tartarus.store.sandboxes import SandboxStore
from tartarus.telemetry.metrics import Metrics

_log = structlog.get_logger("tartarus.node.lamentations")
_LAST_WORDS_S = 2.0
"""How long the end of a command's output may take to be read after its end."""
_MOST_CAUSES = 10
_FOR_VIOLATIONS = frozenset({Category.NETWORK, Category.POLICY, Category.RESOURCE, Category.TIMEOUT})
_ATTEMPT = "pending"
_IMAGE = (
    ImageNotFound, ImageRefused, RegistryFailed, BuildFailed, TemplateFailed, TemplateBlocked, TemplateNotFound,
    SnapshotNotFound,
)  # fmt: skip
_AS_ASKED = (CommandNotFound, NotExecutable, InvalidRequest, Unsupported, TemplateNotFound, SnapshotNotFound)
"""Requests that can only fail again as they are."""


class Lamentations:
    """One node's. `make`: makes a sandbox, for dead letters that are tried again."""

    def __init__(
        self, store: SandboxStore, metrics: Metrics, kept_s: float,
        make: Callable[[str, SandboxSpec], Awaitable[Sandbox]],
    ) -> None:  # fmt: skip
        self._sandboxes = store
        self._store = store.lamentations
        self._metrics = metrics
        self._kept_s = kept_s
        self._make = make
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """What an earlier daemon was just trying again is a dead letter still."""
        await self._store.unclaim(_ATTEMPT)

    async def close(self) -> None:
        """Write what is still to be written; nobody reads any more what commands said last."""
        for listening in self._listening:
            listening.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def sweep(self) -> None:
        """Forget what is older than the host keeps it."""
        await self._store.purge(time.time() - self._kept_s)

    # What happens.

    def ended(
        self, record: SandboxRecord, log: OutputLog | None = None, violation: Violation | None = None,
        scrub: Callable[[str], str] | None = None,
    ) -> None:  # fmt: skip
        """A sandbox has ended; nothing is written for one that did as it was told.

        `violation`: what it was ended for. `scrub`: takes its secrets out of its words, as long as it is known to have
        any, which is now.
        """
        found = of_end(record, violation)
        if found is None:
            return
        if scrub is not None and log is not None:
            words = scrub(log.last_words.decode("utf-8", "replace"))
            found, log = msgspec.structs.replace(found, stack_trace=words), None
        self._spawn(self._last_words(found, log))

    def not_started(self, tenant: str, spec: SandboxSpec, error: Exception) -> None:
        """A request came to nothing."""
        lament = of_request(tenant, spec, error)
        self.wail(lament, spec if lament.dead_letter else None)

    def wail(self, lament: Lamentation, spec: SandboxSpec | None = None) -> None:
        """Keep one, soon."""
        self._spawn(self._keep(lament, spec))

    async def _last_words(self, lament: Lamentation, log: OutputLog | None) -> None:
        if log is not None:
            listening = asyncio.get_running_loop().create_task(log.finished(_LAST_WORDS_S))
            self._listening.add(listening)
            await asyncio.wait([listening])
            self._listening.discard(listening)
            words = log.last_words.decode("utf-8", "replace")
            lament = msgspec.structs.replace(lament, stack_trace=words)
        await self._keep(lament, None)

    async def _keep(self, lament: Lamentation, spec: SandboxSpec | None) -> None:
        self._metrics.lamented(lament.category.value)
        try:
            await self._store.add(lament, spec)
        except TartarusError as error:  # a full disk, most likely: the daemon's log is what is left
            _log.error("not_kept", sandbox=lament.sandbox_id, category=lament.category.value,
                       message=lament.message, error=str(error))  # fmt: skip

    # What is asked.

    async def list(self, tenant: str, wanted: LamentationFilter) -> builtins.list[Lamentation]:
        """The tenant's that fit, newest first."""
        await self._settled()
        return await self._store.list(tenant, wanted)

    async def get(self, tenant: str, lament_id: str) -> Lamentation:
        """One of them. Raises LamentationNotFound."""
        return await self._store.get(tenant, lament_id)

    async def purge(self, tenant: str, older_than_s: float) -> int:
        """Forget the tenant's that are older than so many seconds; returns how many."""
        await self._settled()
        return await self._store.purge(time.time() - older_than_s, tenant)

    async def retry(self, tenant: str, lament_id: str) -> Sandbox:
        """Make what a dead letter asked for. When this raises, it is a dead letter still.

        Raises LamentationNotFound, InvalidState, and what making a sandbox raises.
        """
        spec = await self._store.claim(tenant, lament_id, _ATTEMPT)
        try:
            sandbox = await self._make(tenant, spec)
        except BaseException:
            await asyncio.shield(self._store.retried(tenant, lament_id, ""))
            raise
        await asyncio.shield(self._store.retried(tenant, lament_id, sandbox.record.id))
        return sandbox

    async def _settled(self) -> None:
        """Failures of this moment are among what is asked for."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_LAST_WORDS_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def of_end(record: SandboxRecord, violation: Violation | None = None) -> Lamentation | None:
    """The failure that an ended sandbox is; None for success, and for one that somebody ended on purpose."""
    category, fault = _end(record)
    if category is Category.POLICY and violation is not None and violation.kind is ViolationKind.NETWORK:
        category = Category.NETWORK
    if category is None:
        return None
    message = record.message
    if not message and record.exit_signal:
        message = f"signal {record.exit_signal} ended its command"
    if not message and record.exit_code is not None:
        message = f"its command exited with status {record.exit_code}"
    metadata = {"state": record.state.value, "isolation": record.isolation.value, "name": record.name}
    metadata["reason"] = "" if record.reason is None else record.reason.value
    if violation is not None and category in _FOR_VIOLATIONS:
        metadata |= {"violation": violation.kind.value, "fury": violation.fury.value}
    metadata["exit_code"] = "" if record.exit_code is None else str(record.exit_code)
    return Lamentation(
        id=new_id("lam"), tenant=record.tenant, sandbox_id=record.id, template=record.template,
        timestamp=record.ended_at or time.time(), category=category, fault=fault, message=message,
        metadata={key: value for key, value in metadata.items() if value},
    )  # fmt: skip


def _end(record: SandboxRecord) -> tuple[Category | None, Fault]:
    if record.reason is Reason.POLICY_VIOLATION:
        return Category.POLICY, Fault.POLICY
    if record.state is State.TIMED_OUT:
        return Category.TIMEOUT, Fault.LIMIT
    if record.state is State.LOST:
        return Category.GUEST_LOST, Fault.PLATFORM
    if record.reason is Reason.RESOURCE_LIMIT:
        return (Category.OUT_OF_MEMORY if record.state is State.FAILED else Category.RESOURCE), Fault.LIMIT
    if record.state is State.FAILED:
        return (Category.SIGNAL if record.exit_signal else Category.EXIT_CODE), Fault.PROGRAM
    return None, Fault.PROGRAM


def of_request(tenant: str, spec: SandboxSpec, error: Exception) -> Lamentation:
    """The failure that a request is which came to nothing."""
    category, fault = _start(error)
    code = error.code if isinstance(error, TartarusError) else TartarusError.code
    return Lamentation(
        id=new_id("lam"), tenant=tenant, sandbox_id=getattr(error, "sandbox_id", ""), template=spec.template[:128],
        timestamp=time.time(), category=category, fault=fault, message=str(error)[:MAX_TRACE_BYTES],
        stack_trace=_causes(error), dead_letter=not isinstance(error, _AS_ASKED),
        metadata={key: value for key, value in {
            "code": code, "name": spec.name, "isolation": spec.isolation.value,
            "command": "" if spec.command is None else spec.command.argv[0][:256],
        }.items() if value},
    )  # fmt: skip


def _start(error: Exception) -> tuple[Category, Fault]:
    if isinstance(error, RequestRejected):
        return Category.POLICY, Fault.POLICY
    if isinstance(error, TimeLimit):
        return Category.TIMEOUT, Fault.LIMIT
    if isinstance(error, _IMAGE):
        return Category.IMAGE, Fault.PROGRAM if isinstance(error, _AS_ASKED) else Fault.PLATFORM
    if isinstance(error, _AS_ASKED):
        return Category.START_FAILED, Fault.PROGRAM
    return (Category.START_FAILED if _is_guest(error) else Category.INFRASTRUCTURE), Fault.PLATFORM


def _is_guest(error: Exception) -> bool:
    return isinstance(error, TartarusError) and error.code == "guest_failed"


def _causes(error: BaseException) -> str:
    """Each cause below the error, one a line. No frames: they would show a tenant the host's paths."""
    lines: list[str] = []
    seen = {id(error)}  # an error may be its own cause
    cause = error.__cause__
    while cause is not None and id(cause) not in seen and len(lines) < _MOST_CAUSES:
        seen.add(id(cause))
        lines.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "\n".join(lines)[:MAX_TRACE_BYTES]
