"""Templates that users make: pulled, imported or built, proven by starting them, kept warm, forgotten."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import structlog

from tartarus.images import catalogue
from tartarus.images.described import describe, without_warm_up
from tartarus.images.stackview import StackView
from tartarus.model.errors import (
    InvalidRequest,
    InvalidState,
    TartarusError,
    TemplateBlocked,
    TemplateExists,
    TemplateFailed,
    TemplateNotFound,
)
from tartarus.model.ids import new_id
from tartarus.model.library import (
    CreateTemplate,
    DockerfileSource,
    Done,
    Progress,
    PushRequest,
    ScanRequest,
    Step,
    StepProgress,
    StepState,
    TemplateBase,
    TemplateInfo,
    TemplateRecord,
    TemplateStatus,
    built_in,
)
from tartarus.model.sandbox import Isolation
from tartarus.model.template import Template
from tartarus.node.offers import IMAGE, Offer, Offers, own_offer
from tartarus.node.progress import Tell, streamed
from tartarus.node.proving import Proof, Prover
from tartarus.node.scanning import Scanner
from tartarus.node.selection import stricter
from tartarus.store.sandboxes import SandboxStore

if TYPE_CHECKING:
    from tartarus.node.library import Tools
    from tartarus.node.stacks import Stack

_log = structlog.get_logger("tartarus.node.templates")

_ATTEMPTS = 5
T = TypeVar("T")


class TemplateService:
    """Every tenant's templates. `open` before use, `close` at the end."""

    def __init__(self, store: SandboxStore, offers: Offers, tools: Tools, prover: Prover, scanner: Scanner) -> None:
        self._store = store.templates
        self._offers = offers
        self._tools = tools
        self._prover = prover
        self._scanner = scanner
        self._warming: set[asyncio.Task[None]] = set()
        self._replacing: set[str] = set()
        self._making: Counter[str] = Counter()

    async def open(self) -> None:
        """Forget what an earlier daemon was making when it ended, and warm again what is used."""
        for record in await self._store.all():
            if record.status is TemplateStatus.BUILDING:
                await self._store.remove(record)
                self._tools.stacks.release(record.tenant, record.id)
            elif record.status is TemplateStatus.READY and record.warm_up is not None:
                self._spawn(self._warm_again(record))

    async def close(self) -> None:
        """Stop warming."""
        for task in self._warming:
            task.cancel()
        await asyncio.gather(*self._warming, return_exceptions=True)

    async def list(self, tenant: str) -> builtins.list[TemplateInfo]:
        """The built-in ones, then the tenant's own."""
        own = [record.info for record in await self._store.list(tenant)]
        return [*(built_in(template) for template in catalogue().values()), *own]

    async def get(self, tenant: str, name: str) -> TemplateInfo:
        """One of them. Raises TemplateNotFound."""
        template = catalogue().get(name)
        return built_in(template) if template is not None else (await self._store.get(tenant, name)).info

    async def create(self, tenant: str, request: CreateTemplate) -> AsyncIterator[Progress]:
        """Make one, proven, and end with Done; closing the stream stops the work and leaves nothing.

        A template of that name serves until its replacement is proven, and goes on if that fails.
        """
        if request.name in catalogue():
            raise InvalidRequest(f"{request.name!r} is a built-in template", fix="choose another name")
        old = await self._own(tenant, request.name)
        if old is not None and not request.replace:
            raise TemplateExists(
                f"you already have a template {request.name!r}",
                fix=f"choose another name, give --replace, or remove it: tartarus template rm {request.name}",
            )
        async with streamed(lambda tell: self._create(tenant, request, old, tell)) as events:
            async for event in events:
                yield event

    def is_making(self, tenant: str) -> bool:
        """Whether a template of the tenant's is being made, of layers and blobs that no record names yet."""
        return self._making[tenant] > 0

    async def _create(
        self,
        tenant: str,
        request: CreateTemplate,
        old: TemplateRecord | None,
        tell: Tell,
        followed: frozenset[str] = frozenset(),
    ) -> None:
        """`followed` are the templates whose replacement led to this one's."""
        if old is not None and (old.id in self._replacing or old.status is TemplateStatus.BUILDING):
            raise InvalidState(f"template {old.name!r} is being made already", fix="wait until that has ended")
        self._making[tenant] += 1
        if old is not None:
            self._replacing.add(old.id)
        try:
            record = await self._created(tenant, request, old, tell)
        finally:
            self._making[tenant] -= 1
            if old is not None:
                self._replacing.discard(old.id)
        if old is not None:
            self._spawn(self._follow(record, followed | {record.id}))
        tell(Done(template=record.info))

    async def _created(
        self, tenant: str, request: CreateTemplate, old: TemplateRecord | None, tell: Tell
    ) -> TemplateRecord:
        now = time.time()
        record = TemplateRecord(
            id=new_id("tpl"), tenant=tenant, name=request.name, status=TemplateStatus.BUILDING,
            definition=request.definition, base="", created_at=now, updated_at=now,
        )  # fmt: skip
        record = old or record
        # What is being made holds its blobs under a name of its own until it takes the place of the old one.
        holder = f"{record.id}.{record.build + 1}" if old is not None else record.id
        try:
            if old is None:
                await _whole(self._store.insert(record))
            made = await self._make(tenant, holder, request, tell)
            if old is not None and old.status is TemplateStatus.READY and made["status"] is TemplateStatus.BLOCKED:
                raise TemplateBlocked(
                    f"what was to replace template {old.name!r} is blocked", why=made["message"],
                    fix="the one before goes on; build on newer packages, or change the policy",
                )  # fmt: skip
        except BaseException as error:
            await asyncio.shield(self._failed(record, old, holder, error))
            raise
        changes = {**made, "definition": request.definition, "updated_at": time.time()}
        return await _whole(self._serve(record, old, holder, changes))

    async def _serve(
        self, record: TemplateRecord, old: TemplateRecord | None, holder: str, changes: dict[str, Any]
    ) -> TemplateRecord:
        """Put what was made in service, and let go of what it replaces."""
        try:
            before = await self._store.get(record.tenant, record.id)
            if old is not None:
                changes["build"] = before.build + 1
            record = await self._change(record, **changes)
        except Exception as error:  # it was removed meanwhile, or the disk is full
            await self._failed(record, old, holder, error)
            self._prover.retire(record.tenant, Offer.of(changes["details"]))
            raise
        if old is not None:
            await self._retire(before, served=record.digest)
        return record

    async def _follow(self, base: TemplateRecord, followed: frozenset[str]) -> None:
        """Make anew what stands on a template that was replaced; each serves as it was until that is proven."""
        for record in await self._store.list(base.tenant):
            said = record.details.get("request")
            # Two that stand on each other would follow each other for ever.
            if said is None or record.id in followed or record.status is not TemplateStatus.READY:
                continue
            request = msgspec.convert(said, CreateTemplate)
            if isinstance(request.source, TemplateBase) and request.source.template in {base.name, base.id}:
                async with self._prover.one_at_a_time:
                    try:
                        await self._create(base.tenant, request, record, lambda _event: None, followed)
                    except TartarusError as error:
                        _log.warning("not_followed", template=record.name, base=base.name, error=str(error))

    async def _failed(
        self, record: TemplateRecord, old: TemplateRecord | None, holder: str, error: BaseException
    ) -> None:
        self._tools.stacks.release(record.tenant, holder)
        with contextlib.suppress(TemplateNotFound):  # it was removed meanwhile
            if old is None:
                await self._store.remove(await self._store.get(record.tenant, record.id))
            elif isinstance(error, TartarusError):
                await self._change(old, message=f"the newest build failed: {error}", updated_at=time.time())

    async def _change(self, record: TemplateRecord, **changes: Any) -> TemplateRecord:
        """Set fields of a template as it is now: its warm-up may have been noted meanwhile. Raises TemplateNotFound."""
        for _ in range(_ATTEMPTS):
            record = await self._store.get(record.tenant, record.id)
            with contextlib.suppress(InvalidState):
                return await self._store.update(record, **changes)
        raise InvalidState(f"template {record.name!r} keeps changing", fix="try again in a moment")

    async def _make(self, tenant: str, holder: str, request: CreateTemplate, tell: Tell) -> dict[str, Any]:
        """The fields of a record that is ready, its sandboxes proven to start."""
        offer, stack = await self._offer(tenant, holder, request, tell)
        blocked, findings = await self._scanner.check(stack.layers, tell)
        proof = Proof()
        if not blocked:
            tell(StepProgress(step=Step.SNAPSHOT, state=StepState.STARTED, text="starting and warming"))
            offer, proof = await self._proven(tenant, offer, request)
            tell(StepProgress(step=Step.SNAPSHOT, state=StepState.DONE, text="Created snapshot"))
        # What it takes to make it anew when its base changes; of a build or a pull nothing is kept.
        again = {"request": msgspec.to_builtins(request)} if isinstance(request.source, TemplateBase) else {}
        return {
            "status": TemplateStatus.BLOCKED if blocked else TemplateStatus.READY,
            "message": blocked,
            "base": stack.base,
            "digest": offer.key,
            "size_bytes": stack.size_bytes,
            "layers": offer.layers,
            "warm_up": offer.template.warm_up,
            "warmed_at": proof.warmed_at,
            "warm_ms": proof.warm_ms,
            "warm_error": proof.warm_error,
            "details": {**offer.encode(), **stack.details(holder), "scan": findings, **again},
        }

    async def _offer(self, tenant: str, holder: str, request: CreateTemplate, tell: Tell) -> tuple[Offer, Stack]:
        if isinstance(request.source, TemplateBase):
            found = await self._offers.find(tenant, request.source.template)
            if found.template.base != IMAGE:
                return self._on_host(request, found), self._tools.stacks.nothing(request.source.template)
        if isinstance(request.source, DockerfileSource):
            stack = await self._tools.builder.build(tenant, holder, request, tell)
        else:
            stack = await self._tools.stacks.make(tenant, holder, request, tell)
        tell(StepProgress(step=Step.ROOTFS, state=StepState.STARTED, text="laying the sandbox's own files above it"))
        with StackView(stack.layers, self._offers.uid_base) as view:
            template = await asyncio.to_thread(describe, request.name, stack.config, view, request.definition)
            self._check_user(template)
            system = await self._tools.stacks.system_layer(tenant, template, view)
        tell(StepProgress(step=Step.ROOTFS, state=StepState.DONE, text="Built rootfs"))
        layers = (system, *stack.names)
        limits = request.definition.resources
        floor = stricter(Isolation.CONTAINER, request.definition.isolation)
        return Offer(template, self._tools.stacks.key(template, layers), floor, limits, layers), stack

    def _on_host(self, request: CreateTemplate, found: Offer) -> Offer:
        """A template over the host's own programs: packages, variables and a warm-up of its own."""
        said, base = request.definition, found.template
        if said.user:
            raise InvalidRequest("a template over the host's programs has no users of its own", fix="drop user")
        template = self._tools.stacks.over_host(request.name, base, said)
        return Offer(
            template, self._tools.stacks.key(template, found.layers), said.isolation, said.resources, found.layers
        )

    def _check_user(self, template: Template) -> None:
        if template.user.uid and self._offers.ids == 1:
            raise InvalidRequest(
                f"the image runs as user {template.user.name or template.user.uid}",
                why="without root or subordinate ids, this daemon's sandboxes have one user, root",
                fix="run the daemon as root, get subordinate ids (/etc/subuid), or set user: root",
            )

    async def _proven(self, tenant: str, offer: Offer, request: CreateTemplate) -> tuple[Offer, Proof]:
        """The offer as it starts here. An image whose Python can't be parked starts cold, unless it has a script."""
        try:
            return offer, await self._prover.prove(tenant, offer, request.definition.ready_check)
        except TemplateFailed as error:
            if offer.template.warm_up is None or request.definition.warmup_script:
                raise
            _log.warning("not_warmed", template=request.name, error=str(error))
            cold = msgspec.structs.replace(offer, template=without_warm_up(offer.template), key=f"{offer.key}-cold")
            proof = await self._prover.prove(tenant, cold, request.definition.ready_check)
            return cold, msgspec.structs.replace(proof, warm_error=str(error))

    async def remove(self, tenant: str, name: str) -> None:
        """Forget one of the tenant's own; its live sandboxes go on. Raises TemplateNotFound, InvalidRequest."""
        if name in catalogue():
            raise InvalidRequest(f"{name!r} is a built-in template", fix="it takes no space until it is used")
        record = await self._store.get(tenant, name)
        await self._store.remove(record)
        await self._retire(record)

    async def _retire(self, record: TemplateRecord, *, served: str = "") -> None:
        """Let go of what a record says was made; `served` is the key of what serves in its place."""
        if "offer" not in record.details:
            return
        offer = Offer.of(record.details)
        if offer.key != served:
            self._prover.retire(record.tenant, offer)
        holder = record.details.get("holder")
        if isinstance(holder, str) and holder:
            self._tools.stacks.release(record.tenant, holder)

    async def warm(self, tenant: str, name: str) -> AsyncIterator[Progress]:
        """Park its interpreter anew; the old one serves until the new one stands. Ends with Done."""
        async with streamed(lambda tell: self._warm(tenant, name, tell)) as events:
            async for event in events:
                yield event

    async def _warm(self, tenant: str, name: str, tell: Tell) -> None:
        offer = await self._offers.find(tenant, name)
        tell(StepProgress(step=Step.SNAPSHOT, state=StepState.STARTED, text="starting and warming"))
        if name in catalogue():
            await self._prover.prove(tenant, offer, ())
            info = built_in(offer.template)
        else:
            info = (await self._rewarm(await self._store.get(tenant, name), raising=True)).info
        tell(StepProgress(step=Step.SNAPSHOT, state=StepState.DONE, text="Created snapshot"))
        tell(Done(template=info))

    async def _rewarm(self, record: TemplateRecord, *, raising: bool) -> TemplateRecord:
        try:
            proof = await self._prover.prove(record.tenant, own_offer(record), record.definition.ready_check)
        except TartarusError as error:
            _log.warning("not_warmed", template=record.name, tenant=record.tenant, error=str(error))
            record = await self._change(record, warm_error=str(error))
            if raising:
                raise
            return record
        return await self._change(record, warmed_at=proof.warmed_at, warm_ms=proof.warm_ms, warm_error="")

    async def _warm_again(self, record: TemplateRecord) -> None:
        """After a restart; one at a time, so that the first user does not wait behind all of them."""
        async with self._prover.one_at_a_time:
            try:
                await self._rewarm(record, raising=False)
            except TartarusError as error:
                _log.warning("warm_up_not_stored", template=record.name, error=str(error))

    async def scan(self, tenant: str, name: str, request: ScanRequest) -> Any:
        """Known vulnerabilities of its packages and the policy's verdict."""
        return await self._scanner.scan(await self._layers(tenant, name), request, tenant)

    async def sbom(self, tenant: str, name: str) -> bytes:
        """Its packages as a CycloneDX document (JSON)."""
        return await self._scanner.sbom(await self._layers(tenant, name))

    async def _layers(self, tenant: str, name: str) -> Any:
        record = None if name in catalogue() else await self._own(tenant, name)
        if record is not None and record.status is TemplateStatus.BLOCKED:
            offer = Offer.of(record.details)  # of all templates the one whose findings are asked for
        else:
            offer = await self._offers.find(tenant, name)
        return await self._offers.prepared(tenant, offer, lambda _line: None)

    async def push(self, tenant: str, name: str, request: PushRequest) -> AsyncIterator[Progress]:
        """Push it to a registry as an image; ends with Pushed."""
        if name in catalogue():
            raise InvalidRequest(
                f"{name!r} stands on this host's own files, and is no image", fix="push one of your own"
            )
        record = await self._store.get(tenant, name)
        async with streamed(lambda tell: self._tools.stacks.push(record, request, tell)) as events:
            async for event in events:
                yield event

    async def _own(self, tenant: str, name: str) -> TemplateRecord | None:
        try:
            return await self._store.get(tenant, name)
        except TemplateNotFound:
            return None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Await what must not be left half done: a caller that is cancelled still waits for its end, which is near."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        running.exception()  # it has been seen
        raise
