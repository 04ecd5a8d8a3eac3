"""Dockerfiles, built in our own sandboxes: what the builder asks for, done with the node's means."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from tartarus.images import LayerStore
from tartarus.images.described import describe
from tartarus.images.dockerfile import Base, Built, Event, Output, RunStep, build
from tartarus.images.dockerfile import BuildRequest as DockerfileBuild
from tartarus.images.oci import Descriptor, ImageConfig
from tartarus.images.stackview import StackView
from tartarus.images.unpack.layers import unpack_layer
from tartarus.images.unpack.merge import merge_layers
from tartarus.model.definition import BuildNetwork, Definition
from tartarus.model.errors import IsolationUnavailable, TemplateBlocked, TemplateExists, TemplateNotFound
from tartarus.model.ids import new_id
from tartarus.model.library import (
    BuildOutput,
    CreateTemplate,
    DockerfileSource,
    StepProgress,
    StepState,
    TemplateRecord,
    TemplateStatus,
)
from tartarus.model.library import Step as Part
from tartarus.model.sandbox import Isolation
from tartarus.model.template import Template
from tartarus.node.connecting import Connections
from tartarus.node.levels import Levels
from tartarus.node.offers import Offer, Offers
from tartarus.node.pool import host_meminfo
from tartarus.node.progress import Tell
from tartarus.node.proving import Prover
from tartarus.node.scanning import Scanner
from tartarus.node.stacks import Stack, Stacks, make_stack
from tartarus.node.steps import Step, run_step, step_resources
from tartarus.node.uploads import Uploads
from tartarus.runtimes.base import RootFs, base_environment
from tartarus.store.sandboxes import SandboxStore

_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
_HASH_BYTES = 1024**2
_KEPT = "kept_of_a_failure"


class Builder:
    """Builds for all tenants; each build is a `_Run`."""

    def __init__(
        self, store: SandboxStore, offers: Offers, stacks: Stacks, levels: Levels, connections: Connections,
        uploads: Uploads, contexts: Path, scanner: Scanner, prover: Prover,
    ) -> None:  # fmt: skip
        self.store = store.templates
        self.offers = offers
        self.stacks = stacks
        self.levels = levels
        self.connections = connections
        self._uploads = uploads
        self._contexts = contexts
        self.scanner = scanner
        self.prover = prover

    async def build(self, tenant: str, holder: str, request: CreateTemplate, tell: Tell) -> Stack:
        """Build the request's Dockerfile. Raises as `images.dockerfile.build` does, and IsolationUnavailable."""
        source = request.source
        assert isinstance(source, DockerfileSource)
        why = self.levels.unavailable.get(Isolation.CONTAINER)
        if why is not None:
            raise IsolationUnavailable("build steps need the container level", why=why, fix="run tartarus doctor")
        tell(StepProgress(step=Part.BUILD, state=StepState.STARTED, text="Building"))
        run = _Run(self, tenant, holder, request, source, tell)
        async with self._context(tenant, source) as context:
            built = await build(
                DockerfileBuild(
                    dockerfile=source.dockerfile, context=context, build_args=source.args, target=source.target,
                    cache_scope=run.cache_scope,
                ),
                run, await asyncio.to_thread(self.offers.layers, tenant), self.offers.uid_base, run.watch,
            )  # fmt: skip
        for note in built.notes:
            tell(StepProgress(step=Part.BUILD, state=StepState.UPDATED, text=note))
        tell(StepProgress(step=Part.BUILD, state=StepState.DONE, text="Built image"))
        return await run.stack_of(built)

    @contextlib.asynccontextmanager
    async def _context(self, tenant: str, source: DockerfileSource) -> AsyncIterator[Path | None]:
        """The build context as a directory, unpacked by a jailed process, for as long as the build takes."""
        if not source.context:
            yield None
            return
        place = self._contexts / new_id("ctx")
        place.mkdir(mode=0o700, parents=True)
        try:
            async with self._uploads.claimed(tenant, source.context) as archive:
                digest = await asyncio.to_thread(_sha256, archive)
                blob = Descriptor(media_type=_LAYER_TAR, digest=digest, size=archive.stat().st_size)
                store = LayerStore(place, remove=self.offers.remover)
                yield await unpack_layer(store, archive, blob, digest, self.offers.unpack_base)
        finally:
            await asyncio.shield(asyncio.to_thread(self.offers.remover, place))


class _Run:
    """One build: the `StepRunner` of the Dockerfile's builder."""

    def __init__(
        self, builder: Builder, tenant: str, holder: str, request: CreateTemplate, source: DockerfileSource, tell: Tell
    ) -> None:
        self._builder = builder
        self._tenant = tenant
        self._holder = holder
        self._request = request
        self._source = source
        self._tell = tell
        self._network = request.network is BuildNetwork.OPEN
        fresh = new_id("cache") if source.no_cache else ""
        self.cache_scope = f"{tenant} {self._network} {request.ca_bundle} {fresh}"

    def watch(self, event: Event) -> None:
        """Pass on what the builder says."""
        item = f"{event.step}/{event.steps}" if event.step else ""
        if event.kind == "output":
            self._tell(BuildOutput(text=event.text, item=item))
            return
        state = {"started": StepState.STARTED, "cached": StepState.CACHED, "done": StepState.DONE}.get(
            event.kind, StepState.UPDATED
        )
        self._tell(StepProgress(step=Part.BUILD, state=state, text=event.text, item=item))

    async def base(self, reference: str, say: Callable[[str], None]) -> Base:
        """A template of the tenant's of that name, else an image."""
        stacks = self._builder.stacks
        try:
            stack = await stacks.of_template(self._tenant, reference)
        except TemplateNotFound:
            say(f"pulling {reference}")
            stack = await stacks.pulled(self._tenant, self._holder, reference, self._source.credentials, self._tell)
        return Base(
            layers=stack.layers, config=stack.config, key=hashlib.sha256(repr(stack.names).encode()).hexdigest()
        )

    async def run(self, step: RunStep, tree: Path, lock: int, output: Output) -> int:
        """A RUN, in a container sandbox over the layers so far."""
        del lock  # nothing that outlives this process writes there: the guest ends with it
        builder = self._builder
        with StackView(step.layers, builder.offers.uid_base) as view:
            config = ImageConfig(env=dict(step.env), workdir="/", user=step.user)
            template = await asyncio.to_thread(describe, "build", config, view, Definition())
            template = msgspec.structs.replace(template, warm_up=None)
            system = await builder.stacks.system_layer(self._tenant, template, view)
        rootfs = await self._rootfs(template, system, step.layers)
        async with builder.connections.connection(
            network=self._network, certificates=self._request.ca_bundle
        ) as connection:
            env = base_environment(template.user.home, template.user.name) | connection.env | dict(step.env)
            status = await run_step(
                builder.levels.runtimes[Isolation.CONTAINER], rootfs,
                Step(argv=step.argv, env=env, workdir=step.workdir or "/", mounts=connection.mounts),
                tree, step_resources(host_meminfo()[1]), output,
                owner=builder.offers.uid_base, connect=connection.connect, remove=builder.offers.remover,
            )  # fmt: skip
        return status.shell_status

    async def _rootfs(self, template: Template, system: str, layers: tuple[Path, ...]) -> RootFs:
        store = await asyncio.to_thread(self._builder.offers.layers, self._tenant)
        layers = tuple(await merge_layers(store, layers, self._builder.offers.unpack_base))
        top = store.find(system)
        assert top is not None
        return RootFs(template, (top, *layers), (), new_id("build"))

    async def keep_failed(self, layers: tuple[Path, ...], config: ImageConfig) -> str:
        """The state before the step that failed, as a template ``NAME-failed``; the next failure takes its place.

        Never that of a template that was made under that name, and nothing that the scan policy keeps from use.
        Raises TemplateExists and TemplateBlocked.
        """
        builder, name = self._builder, f"{self._request.name}-failed"[-63:].lstrip("-._")
        old = await self._kept_before(name)
        blocked, findings = await builder.scanner.check(layers, self._tell)
        if blocked:
            raise TemplateBlocked("the scan policy keeps it from use", why=blocked)
        store = await asyncio.to_thread(builder.offers.layers, self._tenant)
        stack = make_stack(store, layers, config, f"a failed build of {self._request.name}", "")
        with StackView(layers, builder.offers.uid_base) as view:
            template = await asyncio.to_thread(describe, name, config, view, Definition())
            template = msgspec.structs.replace(template, warm_up=None)
            system = await builder.stacks.system_layer(self._tenant, template, view)
        names = (system, *stack.names)
        offer = Offer(template, builder.stacks.key(template, names), Isolation.CONTAINER, layers=names)
        now = time.time()
        if old is not None:
            await builder.store.remove(old)
            builder.prover.retire(self._tenant, Offer.of(old.details))
        await builder.store.insert(
            TemplateRecord(
                id=new_id("tpl"), tenant=self._tenant, name=name, status=TemplateStatus.READY, definition=Definition(),
                base=stack.base, created_at=now, updated_at=now, digest=offer.key, size_bytes=stack.size_bytes,
                layers=names, details={**offer.encode(), **stack.details(""), "scan": findings, _KEPT: True},
            )
        )  # fmt: skip
        return name

    async def _kept_before(self, name: str) -> TemplateRecord | None:
        """What the last failure left under that name. Raises TemplateExists when it is something else."""
        try:
            old = await self._builder.store.get(self._tenant, name)
        except TemplateNotFound:
            return None
        if _KEPT not in old.details:
            raise TemplateExists(f"you have a template {name!r} of your own")
        return old

    async def stack_of(self, built: Built) -> Stack:
        """The finished build's stack."""
        store = await asyncio.to_thread(self._builder.offers.layers, self._tenant)
        layers = tuple(await merge_layers(store, built.layers, self._builder.offers.unpack_base))
        return make_stack(store, layers, built.config, "a Dockerfile", "")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_HASH_BYTES):
            digest.update(data)
    return f"sha256:{digest.hexdigest()}"
