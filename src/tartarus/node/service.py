"""The node: from a sandbox that was asked for to one that runs, and the keeping of all of them."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

import msgspec
import structlog

from tartarus.images import LayerStore
from tartarus.model.errors import InvalidState, IsolationUnavailable, SandboxNotFound, TimeLimit
from tartarus.model.forking import ForkRequest, ForkResult
from tartarus.model.ids import new_id
from tartarus.model.sandbox import Isolation, Reason, ResourceRequest, SandboxRecord, SandboxSpec
from tartarus.model.secrets import SecretsSection
from tartarus.model.security import combined
from tartarus.model.settings import Settings
from tartarus.model.states import TERMINAL, State
from tartarus.node import reconcile, selection
from tartarus.node.admission import Admission, Place
from tartarus.node.auditing import EXEMPT, Auditor
from tartarus.node.checkpoints import Checkpoints
from tartarus.node.contracting import Contracts
from tartarus.node.enrolment import Enrolment, may_wait
from tartarus.node.forking import Forker
from tartarus.node.furies import Furies
from tartarus.node.guarding import Tally
from tartarus.node.hibernation import SleepManager
from tartarus.node.judging import Afterwards
from tartarus.node.launching import Launcher
from tartarus.node.levels import LevelReport, Levels
from tartarus.node.library import Library
from tartarus.node.memory import Memory, Source, continued
from tartarus.node.modules import Modules
from tartarus.node.networking import Networking
from tartarus.node.offers import Offer, Offers
from tartarus.node.outputlog import OutputLog, finished, remove_old
from tartarus.node.policies import PolicyService
from tartarus.node.pool import SnapshotPool, host_meminfo
from tartarus.node.profiles import Profiles
from tartarus.node.publishing import Published
from tartarus.node.sandbox import Sandbox
from tartarus.node.secrecy import Secrecy
from tartarus.node.spares import Spare, SparePool, could_serve
from tartarus.node.starting import as_failure, is_called, preparing, unwanted
from tartarus.node.termination import stop_order
from tartarus.node.terminator import Terminator
from tartarus.node.trying import prove_level
from tartarus.policy.contracts import contract_of
from tartarus.policy.judges import court
from tartarus.runtimes.base import RootFs
from tartarus.secrets.redaction import Redactor
from tartarus.store.sandboxes import SandboxStore
from tartarus.telemetry.metrics import Metrics

_log = structlog.get_logger("tartarus.node")
_RECONCILE_EVERY_S = 60.0
_LAYERS_KEPT_S = 30 * 86400.0


class Node:
    """One host's sandboxes. `start` before use, `stop` at the end."""

    def __init__(
        self, settings: Settings, store: SandboxStore, metrics: Metrics | None = None, redactor: Redactor | None = None
    ) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics or Metrics(settings.node_name)
        self._levels = Levels(settings)
        self.audit = Auditor(settings)
        judges = court()
        self.admission = Admission(judges, exempt=EXEMPT, rejected=self.audit.rejected)
        self._afterwards = Afterwards(judges, self.audit)
        self.policies = PolicyService(store, self.admission, self.audit)
        self.secrecy = Secrecy(SecretsSection(settings.secret_providers, settings.secret_grants), self.audit, redactor)
        self.profiles = Profiles(settings.state_dir / "seccomp", self._levels.id_map)
        self._pool = SnapshotPool(self._levels.runtimes, host_meminfo)
        self._spares = SparePool(self._levels.runtimes, self._pool, host_meminfo, lambda: bool(self._creating))
        self._live: dict[str, Sandbox] = {}
        self._starting: set[str] = set()
        self._creating: set[asyncio.Task[Sandbox]] = set()
        self._offers = Offers(settings, store, self._levels)
        self.memory = Memory(settings, self._levels, self._pool, self._offers)
        self.networking = Networking(settings, self._metrics, self.audit.note)
        self.contracts = Contracts(self.admission, self.audit)
        self.library = Library(
            settings, store, self._levels, self._pool, self._offers, self._spares, self.memory, self._awake,
            self.networking, self.profiles,
        )  # fmt: skip
        self._forker = Forker(self.memory, self.library.snapshots, self._live.values, self.create)
        self.modules = Modules(
            settings, self._levels, self._pool, self._offers, self.library.uploads, self._spares.relieve
        )
        self._launcher = Launcher(
            store, self._metrics, self._levels.runtimes, self._pool, self.memory, self.secrecy, adopt=self._adopt,
            rootfs=self._rootfs_of, log=self._open_log, on_end=self._ended, networking=self.networking,
        )  # fmt: skip
        self.sleeper = SleepManager(
            settings, store, self.memory, self._metrics, self._live, networking=self.networking,
            rootfs=self._rootfs_of, log=self._open_log, on_end=self._ended, admission=self.admission,
            places=lambda record, rootfs: self._levels.runtimes[record.isolation].places(rootfs, record.id),
        )  # fmt: skip
        self.checkpoints = Checkpoints(store, self.library.snapshots, self.memory, self.create)
        self.terminator = Terminator(self._live.values, self._end_creations, self.sleeper, self.checkpoints)
        self.furies = Furies(
            settings, store, self._metrics, self._levels, self.memory, self._offers,
            lambda record: self.admission.limits(record.tenant, record.template),
            self._make, self.audit, self.networking,
        )  # fmt: skip
        self.library.held = lambda: (sandbox.offer for sandbox in self._live.values())
        self._background: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """End what an earlier daemon left, then keep comparing."""
        await self.audit.open()
        await self.policies.open()
        self._levels.open()
        groups = await reconcile.groups_without_sandboxes(self._levels.hierarchy, set())
        directories = reconcile.directories_without_sandboxes(self._settings.state_dir / "process", set())
        lost = await reconcile.records_without_guests(self._store, set(), at_start=True, lost=self.furies.lost)
        if groups or directories or lost:
            _log.info("cleaned_up", groups=groups, directories=directories, lost=lost)
        await self.networking.open()
        await self.library.open()
        await self.modules.open()
        await self.sleeper.open()
        await self.furies.open(self._live.values())
        self._background = asyncio.create_task(self._reconcile_forever())

    async def stop(self, reason: Reason) -> None:
        """End every sandbox gracefully with `reason`, within the daemon's own grace; then templates' parked guests."""
        self._stopping = True
        if self._background is not None:
            self._background.cancel()
        await self._end_creations()
        await self.sleeper.close()
        await self.furies.let_go()
        most_s = self._settings.stop_grace_s
        await asyncio.gather(
            *(
                sandbox.stop(stop_order(sandbox.record.spec, sandbox.template, most_s=most_s), reason=reason)
                for sandbox in list(self._live.values())
            ),
            return_exceptions=True,
        )
        await self.furies.close()
        await self.library.close()
        await self.networking.close()
        await self._spares.close()
        await self._pool.close()
        await self._levels.close()
        await self._afterwards.close()
        await self.audit.close()

    async def create(self, tenant: str, spec: SandboxSpec, source: Source | None = None) -> Sandbox:
        """Make a sandbox and start its command, or go on from a saved one.

        When this raises, nothing is left but the record of the failure.
        """
        try:
            return await self._make(tenant, spec, source)
        except Exception as error:
            if tenant != EXEMPT:
                self.furies.not_started(tenant, spec, error)
            raise

    async def _make(self, tenant: str, spec: SandboxSpec, source: Source | None = None) -> Sandbox:
        if self._stopping:
            raise InvalidState("the daemon is stopping", fix="try again in a moment")
        self.terminator.check()
        creating = asyncio.create_task(self._create(tenant, spec, source))
        self._creating.add(creating)
        creating.add_done_callback(self._creating.discard)
        try:
            return await creating
        except asyncio.CancelledError:
            if not creating.cancelled() and creating.exception() is None:
                await unwanted(creating.result())  # made just then, and nobody else will have it
            if self._stopping:
                raise InvalidState("the daemon is stopping", fix="try again in a moment") from None
            self.terminator.check()
            raise

    async def _end_creations(self) -> None:
        for creating in self._creating:
            creating.cancel()
        await asyncio.gather(*self._creating, return_exceptions=True)

    async def fork(self, tenant: str, id_or_name: str, request: ForkRequest) -> ForkResult:
        """Live copies of a live sandbox. When this raises, there is none."""
        return await self._forker.fork(await self._awake(tenant, id_or_name), request)

    async def _create(self, tenant: str, spec: SandboxSpec, source: Source | None) -> Sandbox:
        began = time.time()
        clock = time.perf_counter()
        if source is None and spec.snapshot:
            source = await self.library.snapshots.source(tenant, spec.snapshot)
            spec = spec if source is None else continued(spec, source)
        offer = await self._offers.find(tenant, spec.template, spec.snapshot) if source is None else source.offer
        template = offer.template
        limits = spec.resources.over(template.resources)
        offer.limits.check(limits, template.id)
        spec = msgspec.structs.replace(
            self.admission.with_defaults(tenant, template.id, spec),
            resources=ResourceRequest(**msgspec.structs.asdict(limits)),
            security=spec.security if source is not None else combined(template.security, spec.security),
        )
        isolation, why = await self._choose_level(tenant, spec, offer)
        self.profiles.check(spec, template.user, isolation)
        spec = self.secrecy.granted(tenant, template.id, spec, isolation)
        self.sleeper.check(spec, isolation)
        contract = contract_of(spec, self.admission.limits(tenant, template.id).network)
        self.networking.check(spec, contract, isolation)
        place = self.admission.admit(tenant, spec, template.id, limits, isolation)
        published = Published([], self.sleeper.wake)
        try:
            published = Published.bind(tenant, spec.publish, self.sleeper.wake)
            spec = msgspec.structs.replace(spec, labels=spec.labels | place.tags, publish=published.ports)
            sandbox = await self._create_admitted(place, spec, source, offer, why, began, clock)
        except BaseException:
            place.give_back()
            published.close()
            raise
        sandbox.place = place
        try:
            if place.quarantine:
                await self.furies.suspected(sandbox, place.quarantine)
            await published.serve(sandbox)
        except BaseException:
            await unwanted(sandbox)
            raise
        finally:
            sandbox.published = published
            if sandbox.record.state in TERMINAL:
                place.give_back()
                published.close()
        return sandbox

    async def _create_admitted(
        self, place: Place, spec: SandboxSpec, source: Source | None, offer: Offer, why: str, began: float, clock: float
    ) -> Sandbox:
        tenant, isolation, template = place.asked.tenant, place.asked.isolation, offer.template
        limits = spec.resources.over(template.resources)
        given = self._levels.runtimes[isolation].capabilities()
        why = "; ".join(filter(None, [why, given.how, *given.missing]))
        spare: Spare | None = None
        watched = place.asked.limits.watches_calls and isolation is Isolation.CONTAINER
        if source is None and not watched and could_serve(template, isolation, spec):
            spare = self._spares.take(await self._rootfs(tenant, offer, isolation, spec), isolation, spec, limits)
        record = SandboxRecord(
            id=spare.id if spare is not None else new_id("sbx"), tenant=tenant, name=spec.name, template=template.id,
            isolation=isolation, isolation_reason=why, state=State.PENDING, spec=spec, created_at=began,
        )  # fmt: skip
        enrolment = Enrolment(self._store, record)
        self._starting.add(record.id)
        try:
            contract = contract_of(spec, place.asked.limits.network)
            if source is None and may_wait(spec, isolation):
                (enrolment.soon if contract is None else enrolment.meanwhile)()
                record = msgspec.structs.replace(record, state=State.STARTING)
            else:
                record = await enrolment.first()
            self.audit.created(record, place)
            return await self._launcher.start(
                record, enrolment, offer, spare or source, clock, contract, Tally() if watched else None
            )
        except asyncio.CancelledError:
            why, reason = ("the caller went away", Reason.USER_REQUEST)
            if self._stopping or self.terminator.draining:
                why, reason = ("the daemon stopped" if self._stopping else "the node is drained", Reason.NODE_DRAIN)
            await asyncio.shield(enrolment.never_ran(why, reason, State.KILLED))
            raise
        except Exception as error:
            failure = as_failure(error)
            failure.sandbox_id = record.id
            if record.state is State.STARTING and isinstance(failure, TimeLimit):
                await enrolment.never_ran(str(failure), Reason.TIMEOUT, State.TIMED_OUT)
            elif record.state is State.STARTING:
                await enrolment.never_ran(str(failure), Reason.START_FAILED, State.FAILED)
            raise failure from error
        finally:
            if spare is not None and not spare.given:
                self._spares.drop(spare)
            self._starting.discard(record.id)

    async def _choose_level(self, tenant: str, spec: SandboxSpec, offer: Offer) -> tuple[Isolation, str]:
        """Decide; a level that `auto` takes for the first time is first proved by starting its nursery."""
        while True:
            by_policy = self.admission.limits(tenant, offer.template.id).floor
            host_floor = selection.stricter(self._settings.isolation_floor, by_policy)
            unavailable = self._levels.unavailable | self.profiles.unable(spec, offer.template.user)
            isolation, why = selection.choose(spec, unavailable, offer.floor, host_floor)
            if spec.isolation is not Isolation.AUTO or isolation in self._levels.proved:
                return isolation, why
            try:
                await self._pool.get(await self._rootfs(tenant, offer, isolation, spec), isolation, warm=False)
                self._levels.proved.add(isolation)
            except IsolationUnavailable as error:
                _log.warning("level_unavailable", isolation=isolation.value, error=str(error))
                self._levels.unavailable[isolation] = f"{error.what}: {error.why}"

    async def _awake(self, tenant: str, id_or_name: str) -> Sandbox:
        sandbox = self.live(tenant, id_or_name)
        await self.sleeper.wake(sandbox)
        return sandbox

    def live(self, tenant: str, id_or_name: str) -> Sandbox:
        """A tenant's live sandbox by id, name or unique prefix of its id. Raises SandboxNotFound."""
        exact = self._live.get(id_or_name)
        if exact is not None and exact.record.tenant == tenant:
            return exact
        found = [
            sandbox
            for sandbox in self._live.values()
            if sandbox.record.tenant == tenant and is_called(sandbox.record, id_or_name)
        ]
        if len(found) != 1:
            raise SandboxNotFound(f"no live sandbox {id_or_name!r}", fix="tartarus ps --all lists yours")
        return found[0]

    def spares_ready(self, template_id: str) -> int:
        """How many sandboxes of this template stand made ahead, with a parked interpreter."""
        return self._spares.ready(template_id)

    async def levels(self) -> list[LevelReport]:
        """What each isolation level can do here, proved by starting a guest at it."""
        return await self._levels.prove(partial(prove_level, self.create, self.modules.compile))

    def log(self, record: SandboxRecord) -> OutputLog:
        """The output log of a sandbox, live or ended."""
        sandbox = self._live.get(record.id)
        return sandbox.log if sandbox is not None else finished(self._log_path(record.id))

    def _log_path(self, sandbox_id: str) -> Path:
        return self._settings.state_dir / "logs" / f"{sandbox_id}.log"

    def _open_log(self, sandbox_id: str) -> OutputLog:
        return OutputLog(self._log_path(sandbox_id))

    async def _rootfs_of(self, record: SandboxRecord, offer: Offer) -> RootFs:
        return await self._rootfs(record.tenant, offer, record.isolation, record.spec)

    async def _rootfs(self, tenant: str, offer: Offer, isolation: Isolation, spec: SandboxSpec) -> RootFs:
        rootfs = await self._offers.prepared(tenant, offer, preparing(offer.template.id))
        if isolation is Isolation.WASM:
            rootfs = await self.modules.rootfs(tenant, rootfs, spec.wasm)
        return await self.profiles.hardened(tenant, rootfs, isolation, spec.security)

    def _adopt(self, sandbox: Sandbox) -> None:
        self._live[sandbox.record.id] = sandbox
        self.furies.adopted(sandbox)

    def _ended(self, sandbox: Sandbox) -> None:
        self._live.pop(sandbox.record.id, None)
        self._metrics.ended(sandbox.record)
        self._afterwards.ended(sandbox.record)
        if sandbox.published is not None:
            sandbox.published.close()
        if sandbox.line is not None:
            self.networking.end(sandbox.line)
        if sandbox.place is not None:
            sandbox.place.give_back()
        self.furies.ended(sandbox)
        if sandbox.held is not None:
            sandbox.held.close()
        sandbox.count(self._metrics)
        self.sleeper.ended(sandbox)

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await self._reconcile_once()
            except Exception:  # noqa: BLE001 - whatever it is, it is said, and the next minute gets its chance
                _log.exception("reconcile_failed")
            await asyncio.sleep(_RECONCILE_EVERY_S)

    async def _reconcile_once(self) -> None:
        self._pool.relieve()
        self._spares.relieve()
        await self._pool.sweep()
        known = set(self._live) | self._starting
        await reconcile.records_without_guests(self._store, known, at_start=False, lost=self.furies.lost)
        # The sets are read anew: a sandbox that began during the wait above must not look like a leftover.
        known = set(self._live) | self._starting | self._spares.ids
        await reconcile.groups_without_sandboxes(self._levels.hierarchy, known, prefix="sbx-")
        cutoff = time.time() - self._settings.ended_kept_s
        await self._store.prune(cutoff)
        in_use = {layer.parent.name for rootfs in self._offers.in_use() for layer in rootfs.layers}
        layers = await asyncio.to_thread(LayerStore, self._settings.cache_dir / "templates")
        await asyncio.to_thread(layers.remove_unused, in_use, _LAYERS_KEPT_S)
        await self.library.sweep()
        await self.furies.sweep()
        await asyncio.to_thread(self.modules.sweep)
        remove_old(self._settings.state_dir / "logs", cutoff, self._live)
