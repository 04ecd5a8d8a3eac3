"""From a record of a sandbox that starts to one that runs: its guest and its command, or nothing when that fails."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import structlog

from tartarus.model.contract import Contract
from tartarus.model.errors import GuestFailed, TimeLimit, Unsupported
from tartarus.model.sandbox import Isolation, SandboxRecord
from tartarus.node.enrolment import Enrolment
from tartarus.node.guarding import Tally
from tartarus.node.memory import Memory, Source, attached
from tartarus.node.networking import Line, Networking
from tartarus.node.offers import Offer
from tartarus.node.outputlog import OutputLog
from tartarus.node.pool import SnapshotPool
from tartarus.node.sandbox import Sandbox
from tartarus.node.secrecy import Held, Secrecy
from tartarus.node.spares import Spare
from tartarus.node.starting import wants_clone
from tartarus.runtimes.base import Guest, GuestRequest, RootFs, Runtime, Wire
from tartarus.runtimes.confine.recording import CallRecorder
from tartarus.store.sandboxes import SandboxStore
from tartarus.telemetry.metrics import Metrics

_log = structlog.get_logger("tartarus.node")
_START_LIMIT_S = 30.0
"""How long a guest may take from its fork to its command's start; templates are prepared before."""


class Launcher:
    """Starts the sandboxes of a node. `adopt` hears of each one that runs, `on_end` of each that ended."""

    def __init__(
        self, store: SandboxStore, metrics: Metrics, runtimes: Mapping[Isolation, Runtime], pool: SnapshotPool,
        memory: Memory, secrecy: Secrecy, *, rootfs: Callable[[SandboxRecord, Offer], Awaitable[RootFs]],
        log: Callable[[str], OutputLog], adopt: Callable[[Sandbox], None], on_end: Callable[[Sandbox], None],
        networking: Networking,
    ) -> None:  # fmt: skip
        self._store = store
        self._metrics = metrics
        self._runtimes = runtimes
        self._pool = pool
        self._memory = memory
        self._secrecy = secrecy
        self._rootfs = rootfs
        self._log = log
        self._adopt = adopt
        self._on_end = on_end
        self._networking = networking

    async def start(
        self, record: SandboxRecord, enrolment: Enrolment, offer: Offer, begun: Spare | Source | None, clock: float,
        contract: Contract | None = None, calls: Tally | None = None,
    ) -> Sandbox:  # fmt: skip
        """A sandbox that runs, with its command started, and that is written down. When this raises, its guest is gone.

        `begun`: what it is made of, if not a fresh guest. `clock`: when it was asked for (time.perf_counter).
        `contract`: what it may reach, of the network that it gets before anything in it runs.
        `calls`: counts what it is refused of an escape's system calls.
        """
        held = await self._secrecy.fetch(record)
        opening: asyncio.Task[Line] | None = None
        try:
            if contract is None:
                return await self._start(record, enrolment, offer, begun, clock, None, None, held, calls)
            opening = asyncio.create_task(self._networking.line(record, contract))
            if record.isolation is Isolation.CONTAINER:  # whose guest is made meanwhile, and joined to it then
                return await self._start(record, enrolment, offer, begun, clock, opening, None, held, calls)
            line = await opening
            async with line.wire() as wire:
                return await self._start(record, enrolment, offer, begun, clock, opening, wire, held, calls)
        except BaseException:
            held.close()
            if opening is not None:
                await asyncio.shield(_abandon(opening))
            raise

    async def _start(
        self,
        record: SandboxRecord,
        enrolment: Enrolment,
        offer: Offer,
        begun: Spare | Source | None,
        clock: float,
        opening: asyncio.Task[Line] | None,
        wire: Wire | None,
        held: Held,
        calls: Tally | None,
    ) -> Sandbox:
        spare = begun if isinstance(begun, Spare) else None
        spec = record.spec
        template = offer.template
        rootfs = await self._rootfs(record, offer)
        limits = spec.resources.over(template.resources)
        warm = False
        recorder: CallRecorder | None = None
        mounts = spec.mounts
        if opening is not None and spare is None:
            mounts = (*mounts, *await self._networking.mounts(record.isolation))
        if spare is not None:
            guest, ready = spare.give(), True
        elif isinstance(begun, Source):
            request = GuestRequest(record.id, record.id, limits, mounts, network=wire)
            guest, ready = await self._memory.restore(begun, rootfs, request), True
        else:
            warm = (wants_clone(template, spec) and calls is None) or record.isolation is Isolation.WASM
            request = GuestRequest(
                record.id, record.id, limits, mounts, secrets=bool(spec.secrets), network=wire,
                watch=None if calls is None else calls.add,
            )  # fmt: skip
            try:
                if spec.record_calls:
                    refuse_if_watched(calls)
                    recorder, asker = CallRecorder.open()
                    request = msgspec.structs.replace(request, recorder=asker)
                guest, ready = await self._clone(record.isolation, rootfs, request, warm=warm)
            finally:
                if request.recorder >= 0:
                    os.close(request.recorder)
        try:
            if spare is not None and spare.resources != limits:
                guest.limit(limits)
            line = None
            if opening is not None:
                line = await opening
                line.add(held.credential)
                await enrolment.first()
                await line.attach(guest)
            sandbox = await self._run(record, rootfs, guest, begun, held)
            if spare is not None:
                warm = sandbox.main is None or (await sandbox.main.started())[1]
        except BaseException:
            await asyncio.shield(guest.destroy())
            raise
        sandbox.recorder = recorder
        start_ms = round((time.perf_counter() - clock) * 1e3, 3)
        try:
            sandbox.record = await enrolment.running(started_at=time.time(), start_ms=start_ms, warm=warm and ready)
        except BaseException:
            await asyncio.shield(guest.destroy())
            raise
        sandbox.offer = offer
        sandbox.line = line
        sandbox.calls = calls
        self._adopt(sandbox)
        if isinstance(begun, Source):
            self._metrics.restored(template.id, record.isolation.value, start_ms / 1e3)
        else:
            self._metrics.launched(template.id, start_ms / 1e3, warm=warm and ready)
        sandbox.supervise()
        return sandbox

    async def _clone(
        self, isolation: Isolation, rootfs: RootFs, request: GuestRequest, *, warm: bool
    ) -> tuple[Guest, bool]:
        """A guest, and whether its snapshot stood ready; from another snapshot when that one died meanwhile."""
        attempts = 3  # first the interpreter may be found dead, then its nursery
        while True:
            attempts -= 1
            try:
                snapshot, ready = await self._pool.get(rootfs, isolation, warm=warm)
                return await self._runtimes[isolation].clone(snapshot, request, warm=warm), ready
            except GuestFailed as error:
                if not attempts or self._pool.stands(rootfs, isolation, warm=warm):
                    raise
                _log.warning("snapshot_died", template=rootfs.template.id, isolation=isolation.value, error=str(error))

    async def _run(
        self, record: SandboxRecord, rootfs: RootFs, guest: Guest, begun: Spare | Source | None, held: Held
    ) -> Sandbox:
        places = self._runtimes[record.isolation].places(rootfs, record.id)
        log = self._log(record.id)
        if isinstance(begun, Source):
            return await attached(begun, record, rootfs.template, guest, self._store, log, places, self._on_end)
        parked = None if begun is None else begun.parked
        sandbox = Sandbox(record, rootfs.template, guest, self._store, log, places, self._on_end, parked)
        sandbox.held = held
        command = record.spec.command
        main = sandbox.start_command(command) if command is not None and not held else None
        limit_s = record.spec.timeout_s
        try:
            # The guest may have stopped its own agent: nothing from inside is waited for without a limit.
            async with asyncio.timeout(min(_START_LIMIT_S, limit_s or _START_LIMIT_S)):
                await guest.ready()
                if held:
                    # No instruction of the template's or the user's has run in it yet.
                    await held.deliver(sandbox.channel)
                    main = sandbox.start_command(command) if command is not None else None
                if main is not None:
                    await main.started()
        except TimeoutError:
            if limit_s is not None and limit_s <= _START_LIMIT_S:
                raise TimeLimit(f"the sandbox had not started at its time limit of {limit_s:g} s") from None
            raise GuestFailed(f"the sandbox did not start within {_START_LIMIT_S:g} s") from None
        return sandbox


async def _abandon(opening: asyncio.Task[Line]) -> None:
    """Close a line that no sandbox will have, also one that is still being opened."""
    await asyncio.wait([opening])
    if not opening.cancelled() and opening.exception() is None:
        await opening.result().close()


def refuse_if_watched(calls: object) -> None:
    """A filter has one listener, and a policy's comes first."""
    if calls is not None:
        raise Unsupported(
            "the calls of this sandbox can't be recorded", why="a policy has it watched for those of escapes",
            fix="record where that policy does not hold",
        )  # fmt: skip
