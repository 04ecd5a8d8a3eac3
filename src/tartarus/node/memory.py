"""Live sandboxes to saved ones and back (Nyx): what snapshots of memory, forks and hibernation have in common."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tartarus.images.memory import Facts, KeptSet, MemorySets, Taken
from tartarus.images.memory.bundle import Seals
from tartarus.model.errors import InvalidRequest, IsolationUnavailable, SnapshotRefused, TartarusError, Unsupported
from tartarus.model.sandbox import Isolation, Network, ResourceRequest, SandboxRecord, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.model.template import Template
from tartarus.node.levels import Levels
from tartarus.node.offers import Offer, Offers
from tartarus.node.outputlog import OutputLog
from tartarus.node.pool import SnapshotPool
from tartarus.node.sandbox import Sandbox
from tartarus.node.secrecy import refuse_to_save
from tartarus.node.sessions import SandboxSession
from tartarus.runtimes.base import Guest, GuestRequest, Places, RootFs, Runtime
from tartarus.store.sandboxes import SandboxStore

_log = structlog.get_logger("tartarus.node.memory")
RESTORE_LIMIT_S = 30.0
"""How long a restored guest may take until its agent answers."""


class Written(msgspec.Struct, frozen=True):
    """What `Memory.write` left in a directory."""

    facts: Facts
    paused_ms: float


class Source(msgspec.Struct, frozen=True):
    """What a sandbox goes on from: a set in the store, or (`digest` empty) files that a fork just wrote to `path`."""

    facts: Facts
    tenant: str = ""
    set_id: str = ""
    digest: str = ""
    path: Path | None = None

    @property
    def isolation(self) -> Isolation:
        """The level at which it was saved."""
        return Isolation(self.facts.isolation)

    @property
    def offer(self) -> Offer:
        """What it was made of."""
        return msgspec.convert(self.facts.offer, Offer)

    @property
    def session(self) -> SandboxSession | None:
        """What its agent and its host had open."""
        return None if self.facts.session is None else msgspec.convert(self.facts.session, SandboxSession)

    @property
    def spec(self) -> SandboxSpec:
        """What the saved sandbox was asked to be."""
        return msgspec.convert(self.facts.details["spec"], SandboxSpec)


class Memory:
    """One host's saved sandboxes. `sets` has them on disk, `seals` the keys that exported ones are sealed with."""

    def __init__(self, settings: Settings, levels: Levels, pool: SnapshotPool, offers: Offers) -> None:
        self.sets = MemorySets(settings.state_dir / "memory", settings.memory_budget_bytes)
        self.seals = Seals(settings.state_dir / "snapshot-keys")
        self._levels = levels
        self._pool = pool
        self._offers = offers
        self._cooling: asyncio.Task[None] | None = None

    def can_save(self, isolation: Isolation) -> bool:
        """Whether that level's guests can be saved."""
        runtime = self._levels.runtimes.get(isolation)
        return runtime is not None and runtime.capabilities().saves_memory

    def require(self, sandbox: Sandbox) -> None:
        """Raise Unsupported for a sandbox whose memory can't be saved, saying what to do instead."""
        refuse_to_save(sandbox.record.spec)
        level = sandbox.record.isolation
        if not self.can_save(level):
            raise Unsupported(
                f"the memory of a sandbox at the {level.value} level can't be saved",
                why="only gVisor and microVMs can write down what runs in them",
                fix="run it with --isolation gvisor or microvm; or keep its files: tartarus snapshot create SANDBOX",
            )

    async def write(self, sandbox: Sandbox, place: Path, *, go_on: bool, details: dict[str, Any]) -> Written:
        """Save a live sandbox into an empty directory. When this raises, it goes on as before.

        With `go_on` it goes on in any case; else it stands still until its guest is resumed or destroyed.
        """
        self.require(sandbox)
        offer = sandbox.offer
        assert offer is not None  # the node sets it before anybody can find the sandbox
        limits = sandbox.record.spec.resources.over(offer.template.resources)
        began = time.perf_counter()
        session = await sandbox.quiesce()
        if sandbox.guard is not None:
            sandbox.guard.stands_still()
        try:
            saved = await sandbox.guest.save(place, go_on=go_on)
        except BaseException:
            sandbox.unquiesce()
            raise
        if go_on:
            sandbox.unquiesce()
            if sandbox.guard is not None:
                sandbox.guard.has_another_guest()
        _log.info(
            "saved", sandbox=sandbox.record.id, isolation=sandbox.record.isolation.value,
            paused_ms=round(saved.paused_ms, 1), took_ms=round((time.perf_counter() - began) * 1e3, 1),
        )  # fmt: skip
        facts = Facts(
            isolation=sandbox.record.isolation.value, needs=saved.needs, offer=msgspec.to_builtins(offer),
            resources=limits, session=msgspec.to_builtins(session),
            details={"spec": msgspec.to_builtins(sandbox.spec), **details},
        )  # fmt: skip
        return Written(facts, saved.paused_ms)

    async def save(
        self, sandbox: Sandbox, set_id: str, *, go_on: bool, details: dict[str, Any] | None = None
    ) -> tuple[KeptSet, float]:
        """Save a live sandbox as a set of its tenant's, and say how many milliseconds it stood still for it.

        The set is on disk when this returns. When this raises, nothing is kept and the sandbox goes on.
        """
        tenant = sandbox.record.tenant
        async with self.sets.staging(tenant) as place:
            written = await self.write(sandbox, place, go_on=go_on, details=details or {})
            try:
                kept = await self.sets.keep(tenant, set_id, place, written.facts)
            except BaseException:
                if not go_on:
                    await sandbox.guest.resume()
                    sandbox.unquiesce()
                raise
        return kept, written.paused_ms

    async def source(self, tenant: str, set_id: str, digest: str) -> Source:
        """A set of the tenant's, to go on from. Raises SnapshotNotFound and SnapshotRefused."""
        return Source(await self.sets.facts(tenant, set_id, digest), tenant, set_id, digest)

    async def restore(self, source: Source, rootfs: RootFs, request: GuestRequest, *, alone: bool = False) -> Guest:
        """A guest that goes on where `source` was saved; its channel still stands.

        `alone`: nothing else goes on from there, now or later, unless this fails. Raises SnapshotRefused when it
        can't go on here or is not what was written: nothing was started then.
        """
        runtime = self._runtime(source.isolation)
        snapshot, _ = await self._pool.get(rootfs, source.isolation, warm=False)
        check_needs(source.facts.needs, runtime.needs(snapshot))
        session = source.session
        async with self._files(source) as (path, taken):
            lend = taken.lend if taken is not None and alone else None
            request = msgspec.structs.replace(request, session=None if session is None else session.channel, lend=lend)
            guest = await runtime.restore(snapshot, path, request)
            try:
                if taken is not None:
                    taken.confirm()
            except BaseException:
                await guest.destroy()
                raise
        return guest

    @contextlib.asynccontextmanager
    async def _files(self, source: Source) -> AsyncIterator[tuple[Path, Taken | None]]:
        if source.path is not None:
            yield source.path, None
            return
        async with self.sets.taken(source.tenant, source.set_id, source.digest) as taken:
            if taken.facts != source.facts:
                raise SnapshotRefused("the memory snapshot was replaced meanwhile", fix="try again")
            yield taken.path, taken

    def _runtime(self, isolation: Isolation) -> Runtime:
        runtime = self._levels.runtimes.get(isolation)
        if runtime is None:
            raise IsolationUnavailable(
                f"the snapshot goes on at the {isolation.value} level, which this host can't give",
                why=self._levels.unavailable.get(isolation, ""),
                fix="tartarus doctor shows how to get it",
            )
        return runtime

    def cool(self) -> None:
        """Begin to pack what has rested, unless that goes on already."""
        if self._cooling is None or self._cooling.done():
            self._cooling = asyncio.get_running_loop().create_task(self._cool())

    async def _cool(self) -> None:
        try:
            await self.sets.cool()
        except TartarusError as error:
            _log.warning("not_packed", error=str(error))

    async def close(self) -> None:
        """End what goes on in the background."""
        self.sets.stop()
        if self._cooling is not None:
            await asyncio.wait([self._cooling])


async def attached(
    source: Source,
    record: SandboxRecord,
    template: Template,
    guest: Guest,
    store: SandboxStore,
    log: OutputLog,
    places: Places,
    on_end: Callable[[Sandbox], None],
) -> Sandbox:
    """The sandbox of a restored guest, running. A command that was asked for takes the place of the one in it."""
    session = source.session
    assert session is not None  # only templates' machines are saved without one
    command = record.spec.command
    fresh = command is not None and command != source.spec.command
    if fresh:
        session = msgspec.structs.replace(session, main=None)
    async with asyncio.timeout(RESTORE_LIMIT_S):
        sandbox = await Sandbox.attached(record, template, guest, store, log, places, on_end, session, others="detach")
        if fresh and command is not None:
            await sandbox.start_command(command).started()
    return sandbox


def continued(spec: SandboxSpec, source: Source) -> SandboxSpec:
    """What a sandbox is that `spec` asks to go on from `source`.

    Raises Unsupported or InvalidRequest for what can't be another than it was saved with.
    """
    if spec.isolation not in {Isolation.AUTO, source.isolation}:
        raise Unsupported(
            f"the snapshot goes on at the {source.isolation.value} level, not at {spec.isolation.value}",
            why="memory fits the level that it was taken at",
            fix="leave --isolation out",
        )
    limits = source.facts.resources
    if spec.resources.over(limits) != limits:
        raise InvalidRequest(
            "a snapshot of memory goes on with the limits that it was taken with",
            fix="leave out --memory, --cpus, --pids and --disk",
        )
    if spec.mounts:
        raise InvalidRequest(
            "a snapshot of memory takes no mounts", why="what runs in it has its files open", fix="leave out --mount"
        )
    if spec.secrets:
        raise InvalidRequest(
            "a snapshot of memory takes no secrets", why="what runs in it goes on before they could be there",
            fix="leave --secret out, or go on from a snapshot of files",
        )  # fmt: skip
    if spec.security is not None or spec.record_calls:
        raise InvalidRequest(
            "a snapshot of memory is hardened as it was", why="what runs in it began so",
            fix="leave --security out, or go on from a snapshot of files",
        )  # fmt: skip
    if spec.network is not Network.NONE and source.spec.network is Network.NONE:
        raise InvalidRequest(
            "this snapshot of memory takes no network", why="what runs in it began without one",
            fix="leave --network and --allow out, or go on from a snapshot of files",
        )  # fmt: skip
    saved, usual = source.spec, SandboxSpec()
    said = {name: value for name in spec.__struct_fields__ if (value := getattr(spec, name)) != getattr(usual, name)}
    said |= {"timeout_s": spec.timeout_s, "name": spec.name, "labels": spec.labels, "env": saved.env | spec.env}
    said["publish"] = spec.publish  # those of the one that was saved may be in use
    said |= {"template": saved.template, "isolation": source.isolation}
    said |= {"resources": ResourceRequest(**msgspec.structs.asdict(limits))}
    return msgspec.structs.replace(saved, **said)


def check_foreign(source: Source) -> None:
    """Raise SnapshotRefused for a set from elsewhere that could not be used, or would show files of this host."""
    try:
        spec = source.spec
        _ = source.isolation, source.offer, source.session
    except (KeyError, ValueError, TartarusError) as error:
        raise SnapshotRefused("the memory snapshot can't be used here", why=f"it can't be read: {error}") from error
    if spec.mounts:
        raise SnapshotRefused("the memory snapshot can't be used here", why="it was taken with mounts of another host")


def check_needs(saved: dict[str, str], here: dict[str, str]) -> None:
    """Raise SnapshotRefused, naming each thing that differs, unless a guest with those needs can go on here."""
    differing = [
        f"{name} was {saved.get(name, 'nothing')!r} and is {here.get(name, 'nothing')!r}"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]
    if differing:
        raise SnapshotRefused(
            "the memory snapshot can't go on here; nothing was started",
            why="; ".join(differing)[:2000],
            fix="use the host, versions and template that it was taken with, or take it anew",
        )
