"""Collecting what is left to see of a frozen sandbox: record, processes, output, contract, files, memory.

Each piece by itself: one that can't be had (its level has none, a hostile tree, a guest that does not take part) is
named with the reason, and the others are kept. Only a full disk ends it all, for another try later.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tartarus.durable import write_whole
from tartarus.images.memory import MemorySets
from tartarus.images.store import LayerStore
from tartarus.images.unpack.capture import copy_tree
from tartarus.model.audit import MOST_PAGE, AuditPage, AuditQuery
from tartarus.model.errors import NoSpace, TartarusError
from tartarus.model.quarantine import Case, Evidence
from tartarus.node.memory import Memory
from tartarus.node.offers import Offers
from tartarus.node.quarantine.cases import explained
from tartarus.node.quarantine.processes import processes_of
from tartarus.node.sandbox import Sandbox
from tartarus.node.secrecy import refuse_to_save

_log = structlog.get_logger("tartarus.node.quarantine")
_READ_BYTES = 1024 * 1024
Contract = Callable[[str], Awaitable[dict[str, Any] | None]]
"""A sandbox's contract and its counters, by the sandbox's id."""


class Collector:
    """Collects evidence into a directory."""

    def __init__(self, memory: Memory, offers: Offers, sets: MemorySets) -> None:
        self.contract: Contract | None = None
        self.audit: Callable[[AuditQuery], Awaitable[AuditPage]] | None = None
        self._memory = memory
        self._offers = offers
        self._sets = sets

    async def collect(self, sandbox: Sandbox, case: Case, place: Path) -> tuple[Evidence, ...]:
        """All there is. Raises NoSpace; the sandbox stays frozen."""
        steps: dict[str, Callable[[], Awaitable[Evidence]]] = {
            "record": lambda: self._json(place, "record", sandbox.record),
            "use": lambda: self._use(sandbox, place),
            "processes": lambda: self._processes(sandbox, place),
            "output": lambda: self._output(sandbox, place),
            "contract": lambda: self._contract(sandbox, place),
            "audit": lambda: self._audited(sandbox, place),
            "files": lambda: self._files(sandbox, place),
            "memory": lambda: self._of_memory(sandbox, case),
        }
        found = []
        for name, step in steps.items():
            try:
                found.append(await step())
            except NoSpace:
                raise
            except OSError as error:
                told = explained(error)
                if isinstance(told, NoSpace):
                    raise told from error
                found.append(Evidence(name, missing=str(error)))
            except (TartarusError, TimeoutError) as error:
                found.append(Evidence(name, missing=str(error) or type(error).__name__))
        return tuple(found)

    async def _json(self, place: Path, name: str, value: object) -> Evidence:
        return await asyncio.to_thread(_written, place, name, msgspec.json.format(msgspec.json.encode(value)))

    async def _use(self, sandbox: Sandbox, place: Path) -> Evidence:
        return await self._json(place, "use", sandbox.guest.stats())

    async def _processes(self, sandbox: Sandbox, place: Path) -> Evidence:
        group = sandbox.guest.group
        if group is None:
            return Evidence("processes", missing="this host made it no control group")
        return await self._json(place, "processes", await processes_of(group.pids()))

    async def _output(self, sandbox: Sandbox, place: Path) -> Evidence:
        return await asyncio.to_thread(_output, sandbox.log.segments, place)

    async def _contract(self, sandbox: Sandbox, place: Path) -> Evidence:
        facts = None if self.contract is None else await self.contract(sandbox.record.id)
        if not facts:
            return Evidence("contract", missing="it had no network")
        return await self._json(place, "contract", facts)

    async def _audited(self, sandbox: Sandbox, place: Path) -> Evidence:
        if self.audit is None:
            return Evidence("audit", missing="no audit log is kept here")
        return await self._json(
            place, "audit", await self.audit(AuditQuery(sandbox=sandbox.record.id, limit=MOST_PAGE))
        )

    async def _files(self, sandbox: Sandbox, place: Path) -> Evidence:
        changes = sandbox.guest.changes()
        if changes is None:
            return Evidence("files", missing="the host can't look at the files of this level, or without root")
        refuse_to_save(sandbox.record.spec)
        opened = os.open(changes, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            store = await asyncio.to_thread(LayerStore, place / "files")
            kept = await copy_tree(store, opened, self._offers.unpack_base, kind="files", times=True)
        finally:
            os.close(opened)
        return Evidence("files", str(kept.path.relative_to(place)), kept.bytes, kept.digest.removeprefix("sha256:"))

    async def _of_memory(self, sandbox: Sandbox, case: Case) -> Evidence:
        level = sandbox.record.isolation
        if not self._memory.can_save(level):
            return Evidence("memory", missing=f"the {level.value} level can't write down what runs in it")
        # Its agent has a part in this, so it runs for a moment once more: without any network by then.
        async with self._sets.staging(case.tenant) as staged:
            written = await self._memory.write(sandbox, staged, go_on=True, details={"case": case.id})
            with contextlib.suppress(TartarusError):  # whoever asked for evidence freezes it once more
                await sandbox.guest.pause()
            kept = await self._sets.keep(case.tenant, case.id, staged, written.facts)
        return Evidence("memory", f"memory:{kept.id}", kept.size_bytes, kept.digest.removeprefix("sha256:"))


def _written(place: Path, name: str, data: bytes) -> Evidence:
    path = place / f"{name}.json"
    write_whole(path, data)
    return Evidence(name, path.name, len(data), hashlib.sha256(data).hexdigest())


def _output(segments: list[Path], place: Path) -> Evidence:
    digest, size = hashlib.sha256(), 0
    target = place / "output.log"
    with target.open("wb") as out:
        for segment in segments:
            with contextlib.suppress(FileNotFoundError), segment.open("rb") as source:
                while piece := source.read(_READ_BYTES):
                    digest.update(piece)
                    size += len(piece)
                    out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    return Evidence("output", target.name, size, digest.hexdigest())
