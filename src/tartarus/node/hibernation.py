"""Sandboxes that sleep (Hypnos): their memory on disk, nothing of them in memory, until somebody needs them.

Persist first, then release: the guest ends only when its memory and the record that says so are on disk. Until then
whatever fails leaves a sandbox that runs on; from then on whatever fails leaves one that can be woken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import structlog

from tartarus.model.errors import InvalidState, TartarusError, Unsupported
from tartarus.model.sandbox import Isolation, SandboxRecord, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.model.states import State
from tartarus.model.template import Template
from tartarus.node.admission import Admission
from tartarus.node.idleness import Idleness
from tartarus.node.memory import RESTORE_LIMIT_S, Memory, Source
from tartarus.node.networking import Networking
from tartarus.node.offers import Offer
from tartarus.node.outputlog import OutputLog
from tartarus.node.sandbox import Sandbox
from tartarus.node.secrecy import refuse_to_save
from tartarus.policy.contracts import contract_of
from tartarus.runtimes.base import Guest, GuestRequest, Places, RootFs
from tartarus.store.sandboxes import SandboxStore
from tartarus.telemetry.metrics import Metrics

_log = structlog.get_logger("tartarus.node.hibernation")
_LOOK_EVERY_S = 0.5
_AWAKE = frozenset({State.RUNNING, State.PAUSED})


class SleepManager:
    """One node's. `live`: its sandboxes, sleeping ones too; `rootfs`: what a sandbox of an offer stands on."""

    def __init__(
        self,
        settings: Settings,
        store: SandboxStore,
        memory: Memory,
        metrics: Metrics,
        live: dict[str, Sandbox],
        rootfs: Callable[[SandboxRecord, Offer], Awaitable[RootFs]],
        places: Callable[[SandboxRecord, RootFs], Places],
        log: Callable[[str], OutputLog],
        on_end: Callable[[Sandbox], None],
        admission: Admission,
        networking: Networking,
    ) -> None:
        self._settings = settings
        self._networking = networking
        self._store = store
        self._memory = memory
        self._metrics = metrics
        self._live = live
        self._rootfs = rootfs
        self._places = places
        self._output_log = log
        self._on_end = on_end
        self._admission = admission
        self._idleness: dict[str, Idleness] = {}
        self._later: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[None] | None = None

    # Asked by users.

    def check(self, spec: SandboxSpec, isolation: Isolation) -> None:
        """Raise Unsupported for a new sandbox that asks to be put to sleep when idle, and can't be."""
        if spec.idle_s is not None:
            self._require(isolation)

    async def sleep(self, sandbox: Sandbox) -> SandboxRecord:
        """Write a sandbox's memory to disk and give all else back. When this raises, it runs on, or had ended.

        Goes on when its caller goes away. Raises Unsupported, InvalidState, NoSpace, GuestFailed.
        """
        refuse_to_save(sandbox.record.spec)
        self._require(sandbox.record.isolation)
        self._cancel_later(sandbox.record.id)
        return await self._owned(self._sleep(sandbox))

    async def wake(self, sandbox: Sandbox) -> SandboxRecord:
        """Let a sleeping sandbox go on; one that is awake is fine. Several at once wake it once.

        When this raises, it sleeps on: SnapshotRefused for memory that is not what was written, or NoSpace.
        """
        if not sandbox.asleep and sandbox.record.state is not State.HIBERNATED and not sandbox.turn.locked():
            return sandbox.record
        return await self._owned(self._wake(sandbox))

    def schedule_sleep(self, sandbox: Sandbox, after_s: float) -> None:
        """Put it to sleep that many seconds from now, whatever it does then; another time replaces this one."""
        refuse_to_save(sandbox.record.spec)
        self._require(sandbox.record.isolation)
        sandbox_id = sandbox.record.id
        self._cancel_later(sandbox_id)

        def begin() -> None:
            self._later.pop(sandbox_id, None)
            self._spawn(self._tried(self._sleep(sandbox), sandbox))

        self._later[sandbox_id] = asyncio.get_running_loop().call_later(after_s, begin)

    def is_sleeping(self, sandbox_id: str) -> bool:
        """Whether it sleeps now."""
        sandbox = self._live.get(sandbox_id)
        return sandbox is not None and sandbox.asleep

    # Called by the node.

    async def open(self) -> None:
        """Take over the sandboxes that slept, or were just waking, when an earlier daemon ended; then watch."""
        for record in await self._store.alive():
            if record.saved and record.state in {State.HIBERNATED, State.STARTING}:
                try:
                    await self._take_over(record)
                except TartarusError as error:  # a full disk; the record stays, and the next daemon finds it
                    _log.error("not_taken_over", sandbox=record.id, error=str(error))
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Leave the sleeping asleep, for the next daemon."""
        if self._watching is not None:
            self._watching.cancel()
        for sandbox_id in list(self._later):
            self._cancel_later(sandbox_id)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sandbox in [each for each in self._live.values() if each.asleep]:
            self._live.pop(sandbox.record.id)
            await sandbox.leave()

    def ended(self, sandbox: Sandbox) -> None:
        """A sandbox has ended: forget what was kept of it."""
        record = sandbox.record
        self._idleness.pop(record.id, None)
        self._cancel_later(record.id)
        if record.saved:
            self._metrics.hibernated(-1)
            self._spawn(self._forget(record))

    # How it is done.

    async def _sleep(self, sandbox: Sandbox) -> SandboxRecord:
        async with sandbox.turn:
            if sandbox.asleep:
                return sandbox.record
            record = sandbox.record
            if record.state not in _AWAKE or sandbox.is_ending:
                raise InvalidState(f"can't hibernate a sandbox that is {record.state.value}")
            began = time.perf_counter()
            try:
                kept = await self._persist(sandbox)
            except BaseException:
                self._metrics.slept(None)
                raise
            await self._release(sandbox)
            self._metrics.slept(time.perf_counter() - began)
            self._metrics.hibernated(1)
            _log.info("hibernated", sandbox=record.id, bytes=kept, seconds=round(time.perf_counter() - began, 3))
            return sandbox.record

    async def _persist(self, sandbox: Sandbox) -> int:
        """Its memory, then its record. When this raises, nothing is kept, and it runs on if it had not ended."""
        record = sandbox.record
        sets = self._memory.sets
        kept, _ = await self._memory.save(sandbox, record.id, go_on=False)
        try:
            sandbox.record = await self._store.transition(record.id, _AWAKE, State.HIBERNATED, saved=kept.digest)
        except BaseException:
            await self._go_on(sandbox, kept.digest)
            await sets.remove(record.tenant, record.id)
            raise
        return kept.size_bytes

    async def _go_on(self, sandbox: Sandbox, digest: str) -> None:
        """Its files are kept and its record is not: it goes on from the files, as it would when woken."""
        source = await self._memory.source(sandbox.record.tenant, sandbox.record.id, digest)
        await sandbox.fall_asleep()
        await self._go_offline(sandbox)
        guest = await self._restored(sandbox, source)
        try:
            await sandbox.wake_up(guest)
        except BaseException:
            await asyncio.shield(self._not_woken(sandbox, guest))
            raise

    async def _not_woken(self, sandbox: Sandbox, guest: Guest) -> None:
        await guest.destroy()
        await self._go_offline(sandbox)

    async def _go_offline(self, sandbox: Sandbox) -> None:
        """Give its slot back, of a sandbox whose guest has gone."""
        line, sandbox.line = sandbox.line, None
        if line is not None:
            await line.close()

    async def _release(self, sandbox: Sandbox) -> None:
        try:
            await sandbox.fall_asleep()
        except InvalidState:  # it was killed at this very moment
            await sandbox.wait()
            raise InvalidState("the sandbox ended while it was being hibernated") from None
        await self._go_offline(sandbox)
        if sandbox.calls_waiting:
            self._spawn(self._tried(self._wake(sandbox), sandbox))

    async def _wake(self, sandbox: Sandbox) -> SandboxRecord:
        async with sandbox.turn:
            if not sandbox.asleep or sandbox.is_ending:
                return sandbox.record
            began = time.perf_counter()
            record = sandbox.record
            if sandbox.place is not None:
                sandbox.place = self._admission.admit_again(sandbox.place)
            source = await self._memory.source(record.tenant, record.id, record.saved)
            try:
                guest = await self._begun(sandbox, source)
                try:
                    async with asyncio.timeout(RESTORE_LIMIT_S):
                        await sandbox.wake_up(guest)
                except BaseException:
                    await asyncio.shield(self._not_woken(sandbox, guest))
                    raise
            except BaseException:
                self._metrics.woke(None)
                if sandbox.record.state is State.STARTING and not sandbox.is_ending:
                    sandbox.record = await self._store.transition(record.id, {State.STARTING}, State.HIBERNATED)
                raise
            sandbox.record = await self._store.transition(record.id, {State.STARTING}, State.RUNNING, saved="")
            self._metrics.woke(time.perf_counter() - began)
            self._metrics.hibernated(-1)
            _log.info("woken", sandbox=record.id, seconds=round(time.perf_counter() - began, 3))
            self._spawn(self._forget(record))
            return sandbox.record

    async def _begun(self, sandbox: Sandbox, source: Source) -> Guest:
        """Its guest, standing still, and its record, starting: neither waits for the other."""
        record = sandbox.record
        moving = self._spawn(self._store.transition(record.id, {State.HIBERNATED}, State.STARTING))
        try:
            guest = await self._restored(sandbox, source)
        except BaseException:
            sandbox.record = await moving
            raise
        try:
            sandbox.record = await moving
        except BaseException:
            await asyncio.shield(self._not_woken(sandbox, guest))
            raise
        return guest

    async def _restored(self, sandbox: Sandbox, source: Source) -> Guest:
        """Its guest, with a slot of its own, held to its contract, where it has a network."""
        record = sandbox.record
        rootfs = await self._rootfs(record, source.offer)
        request = GuestRequest(record.id, record.id, source.facts.resources, record.spec.mounts)
        # What was saved knows of another contract than that which it began with.
        contract = contract_of(source.spec, self._admission.limits(record.tenant, record.template).network)
        async with asyncio.timeout(RESTORE_LIMIT_S):
            if contract is None:
                return await self._memory.restore(source, rootfs, request, alone=True)
            sandbox.line = await self._networking.line(record, contract)
            sandbox.line.sworn_anew = source.spec.contract != record.spec.contract
            try:
                async with sandbox.line.wire() as wire:
                    mounts = (*request.mounts, *await self._networking.mounts(record.isolation))
                    request = msgspec.structs.replace(request, network=wire, mounts=mounts)
                    return await self._memory.restore(source, rootfs, request, alone=True)
            except BaseException:
                await asyncio.shield(self._go_offline(sandbox))
                raise

    async def _take_over(self, record: SandboxRecord) -> None:
        if record.state is State.STARTING:  # it was being woken: what it was woken from is still there
            record = await self._store.transition(record.id, {State.STARTING}, State.HIBERNATED)
        log = self._output_log(record.id)
        try:
            source = await self._memory.source(record.tenant, record.id, record.saved)
            rootfs = await self._rootfs(record, source.offer)
            sandbox = Sandbox.sleeping(
                record, rootfs.template, self._store, log, self._places(record, rootfs), self._on_end, source.session
            )
            sandbox.offer = source.offer
        except TartarusError as error:
            _log.error("not_wakeable", sandbox=record.id, error=str(error))
            nowhere = Places(home="/", workdir="/", prefix="/")
            template = Template(id=record.template, name=record.template)
            sandbox = Sandbox.sleeping(record, template, self._store, log, nowhere, self._on_end, None)
        sandbox.place = self._admission.known(record)
        self._live[record.id] = sandbox
        self._metrics.hibernated(1)
        sandbox.supervise()
        sandbox.detach()

    async def _forget(self, record: SandboxRecord) -> None:
        try:
            await self._memory.sets.remove(record.tenant, record.id)
        except (TartarusError, OSError) as error:  # the next sweep finds it
            _log.warning("set_not_removed", sandbox=record.id, error=str(error))

    # Idle sandboxes, and sleeping ones that are needed.

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            for sandbox in list(self._live.values()):
                try:
                    self._look(sandbox)
                except TartarusError as error:
                    _log.debug("not_looked_at", sandbox=sandbox.record.id, error=str(error))

    def _look(self, sandbox: Sandbox) -> None:
        if sandbox.turn.locked() or sandbox.is_ending:
            return
        if sandbox.asleep:
            if sandbox.calls_waiting:
                self._spawn(self._tried(self._wake(sandbox), sandbox))
            return
        idle_s = sandbox.record.spec.idle_s
        if idle_s is None or sandbox.record.state is not State.RUNNING or not self._settings.enable_hypnos:
            return
        idleness = self._idleness.setdefault(sandbox.record.id, Idleness())
        now = time.monotonic()
        if idleness.since(now, sandbox.channel.traffic, sandbox.guest.stats().cpu_usec) >= idle_s:
            idleness.begin(now)  # should it fail, it is tried again as long from now
            self._spawn(self._tried(self._sleep(sandbox), sandbox))

    async def _tried(self, work: Coroutine[Any, Any, SandboxRecord], sandbox: Sandbox) -> None:
        """Do what nobody waits for."""
        try:
            await work
        except (TartarusError, OSError, TimeoutError) as error:
            _log.warning("sleep_or_wake_failed", sandbox=sandbox.record.id, error=str(error))

    def _require(self, isolation: Isolation) -> None:
        if not self._settings.enable_hypnos:
            raise Unsupported(
                "hibernation is switched off here",
                why="the daemon's configuration says EnableHypnos: false",
                fix="ask whoever runs the daemon; pause and resume work",
            )
        if not self._memory.can_save(isolation):
            raise Unsupported(
                f"a sandbox at the {isolation.value} level can't be hibernated",
                why="only gVisor and microVMs can write down what runs in them",
                fix="run it with --isolation gvisor or microvm; here, pause it, or keep its files with snapshot",
            )

    async def _owned(self, work: Coroutine[Any, Any, SandboxRecord]) -> SandboxRecord:
        """Whoever asked may go away: half a hibernation is none."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # that nobody waits for it any more is no reason for a warning

    def _cancel_later(self, sandbox_id: str) -> None:
        timer = self._later.pop(sandbox_id, None)
        if timer is not None:
            timer.cancel()
