"""Live copies of a sandbox: memory and all where the level can, its files elsewhere, and it is said which."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from tartarus.model.errors import TartarusError, Unsupported
from tartarus.model.forking import ForkChild, ForkError, ForkRequest, ForkResult
from tartarus.model.library import CreateSnapshot
from tartarus.model.sandbox import Isolation, Reason, SandboxSpec
from tartarus.model.snapshots import SnapshotKind
from tartarus.node.memory import Memory, Source
from tartarus.node.sandbox import Sandbox
from tartarus.node.snapshots import SnapshotService

_AT_ONCE = 4
"""Copies that are being started at the same time: more only wait for the same processors."""
FILES_NOTE = (
    "This level copies files, not memory: nothing runs in the copies yet. Use --isolation gvisor or microvm "
    "for copies that go on where their source stands."
)

Create = Callable[[str, SandboxSpec, Source | None], Awaitable[Sandbox]]


class Forker:
    """Makes copies. `live` lists the live sandboxes; `create` is the node's."""

    def __init__(
        self, memory: Memory, snapshots: SnapshotService, live: Callable[[], Iterable[Sandbox]], create: Create
    ) -> None:
        self._memory = memory
        self._snapshots = snapshots
        self._live = live
        self._create = create

    async def fork(self, sandbox: Sandbox, request: ForkRequest) -> ForkResult:
        """Copies of a live sandbox. One that can't be made is an error of its own; when this raises, there is none."""
        level = sandbox.record.isolation
        if self._memory.can_save(level):
            return await self._with_memory(sandbox, request)
        if level not in {Isolation.CONTAINER, Isolation.WASM}:
            raise Unsupported(
                f"a sandbox at the {level.value} level can't be forked",
                why="neither its memory nor its files can be taken from outside",
                fix="run it with --isolation gvisor or microvm; a container's files can be forked",
            )
        return await self._of_files(sandbox, request)

    async def _with_memory(self, sandbox: Sandbox, request: ForkRequest) -> ForkResult:
        async with self._memory.sets.staging(sandbox.record.tenant) as place:
            async with sandbox.turn:  # a pause, or its sleep, comes before or after
                written = await self._memory.write(sandbox, place, go_on=True, details={})
            source = Source(written.facts, path=place)
            children = await self._children(sandbox, request, sandbox.spec, source)
        return ForkResult(sandbox.record.id, SnapshotKind.MEMORY, round(written.paused_ms, 3), children)

    async def _of_files(self, sandbox: Sandbox, request: ForkRequest) -> ForkResult:
        tenant = sandbox.record.tenant
        kept = await self._snapshots.create(tenant, CreateSnapshot(sandbox.record.id))
        try:
            spec = msgspec.structs.replace(
                sandbox.spec, snapshot=kept.id, command=None, isolation=sandbox.record.isolation
            )
            children = await self._children(sandbox, request, spec, None)
        finally:
            # Live sandboxes made from it go on without it.
            await asyncio.shield(self._snapshots.delete(tenant, kept.id))
        return ForkResult(sandbox.record.id, SnapshotKind.FILES, kept.paused_ms or 0.0, children, FILES_NOTE)

    async def _children(
        self, sandbox: Sandbox, request: ForkRequest, spec: SandboxSpec, source: Source | None
    ) -> tuple[ForkChild, ...]:
        tenant = sandbox.record.tenant
        labels = spec.labels | request.labels
        names = self._names(tenant, request.name or spec.name, request.count)
        # Their source has its ports; each gets some that are free.
        publish = tuple(msgspec.structs.replace(one, port=0) for one in spec.publish)
        specs = [msgspec.structs.replace(spec, name=name, labels=labels, publish=publish) for name in names]
        room = asyncio.Semaphore(_AT_ONCE)
        made: list[Sandbox] = []

        async def one(wanted: SandboxSpec) -> ForkChild:
            async with room:
                try:
                    child = await self._create(tenant, wanted, source)
                except TartarusError as error:
                    return ForkChild(error=ForkError.of(error))
            made.append(child)
            child.detach()
            return ForkChild(child.record)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(wanted)) for wanted in specs]
        except BaseException:
            for child in made:
                with contextlib.suppress(TartarusError):
                    await asyncio.shield(child.kill(reason=Reason.USER_REQUEST))
            raise
        return tuple(task.result() for task in tasks)

    def _names(self, tenant: str, base: str, count: int) -> list[str]:
        """Names with the first numbers that no live sandbox of the tenant's has; none without a `base`."""
        if not base:
            return [""] * count
        base = base[: 63 - len("-9999")]
        taken = {one.record.name for one in self._live() if one.record.tenant == tenant}
        free = (name for number in itertools.count(1) if (name := f"{base}-{number}") not in taken)
        return list(itertools.islice(free, count))
