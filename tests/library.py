"""Templates and snapshots kept in memory, for tests of what is around them: the API, the SDK, the command line.

The tests' own, and no part of the product. It makes nothing: it takes requests as the real service does, and plays
their progress. References that begin with ``mute`` or ``slow`` hang, before their first word or after it; ``broken`` fails half-way
and ``sudden`` breaks down.
"""

from __future__ import annotations

import asyncio
import hashlib
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from tartarus.model.errors import (
    BuildFailed,
    InvalidRequest,
    NameTaken,
    RegistryFailed,
    SnapshotNotFound,
    SnapshotRefused,
    TemplateExists,
    TemplateNotFound,
    Unsupported,
)
from tartarus.model.ids import new_id
from tartarus.model.library import (
    BuildOutput,
    CreateSnapshot,
    CreateTemplate,
    DockerfileSource,
    Done,
    ImageSource,
    Progress,
    Pushed,
    PushRequest,
    ScanRequest,
    SnapshotInfo,
    Step,
    StepProgress,
    StepState,
    TemplateBase,
    TemplateInfo,
    UploadSource,
)
from tartarus.model.snapshots import ImportSnapshot, SnapshotKind
from tartarus.node.uploads import Uploads

STARTED, UPDATED, DONE, CACHED = StepState.STARTED, StepState.UPDATED, StepState.DONE, StepState.CACHED
EXPORTED = b"a sealed set"
BUILT_IN = TemplateInfo(id="host", name="host", title="Host base", base="host", builtin=True)
FINDING = {
    "id": "CVE-2026-1", "package": "openssl", "version": "3.0.1", "severity": "high", "fixed_in": ["3.0.2"],
    "summary": "a\nproblem",
}  # fmt: skip


class Templates:
    """The tenants' templates, and what was asked for."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self.own: dict[tuple[str, str], TemplateInfo] = {}
        self.requests: list[CreateTemplate] = []
        self.pushes: list[PushRequest] = []
        self.received: list[dict[str, Any]] = []
        self.cancelled = asyncio.Event()
        self.scans: list[tuple[ScanRequest, int]] = []

    async def list(self, tenant: str) -> list[TemplateInfo]:
        return [BUILT_IN, *(info for (owner, _), info in self.own.items() if owner == tenant)]

    async def get(self, tenant: str, name: str) -> TemplateInfo:
        for info in await self.list(tenant):
            if name in (info.name, info.id):
                return info
        raise TemplateNotFound(f"no template {name!r}", fix="see yours with: tartarus template list")

    async def create(self, tenant: str, request: CreateTemplate) -> AsyncIterator[Progress]:
        self.requests.append(request)
        if request.name == BUILT_IN.name:
            raise TemplateExists(f"{request.name!r} is built in", fix="choose another name")
        if (tenant, request.name) in self.own and not request.replace:
            raise TemplateExists(f"you already have a template {request.name!r}")
        source = request.source
        base = ""
        if isinstance(source, ImageSource):
            base = source.reference
            async for event in self._pull(source.reference):
                yield event
        elif isinstance(source, UploadSource):
            base = "upload"
            async with self._uploads.claimed(tenant, source.upload) as path:
                yield StepProgress(Step.IMPORT, STARTED, "Importing")
                self.received.append(await asyncio.to_thread(content, path))
            yield StepProgress(Step.IMPORT, DONE, "Imported")
        elif isinstance(source, DockerfileSource):
            base = "Dockerfile"
            if source.context:
                async with self._uploads.claimed(tenant, source.context) as path:
                    self.received.append(await asyncio.to_thread(content, path))
            async for event in self._build(source):
                yield event
        elif isinstance(source, TemplateBase):
            base = (await self.get(tenant, source.template)).name
        async for event in self._finish(tenant, request, base):
            yield event

    async def _pull(self, reference: str) -> AsyncIterator[Progress]:
        if reference.startswith("mute"):
            await self._hang()
        yield StepProgress(Step.PULL, STARTED, f"Pulling {reference}")
        if reference.startswith("slow"):
            await self._hang()
        if reference.startswith("broken"):
            raise RegistryFailed("the registry hung up", why="half-way", fix="try again")
        if reference.startswith("sudden"):
            raise RuntimeError("a bug")
        for done in (1000, 2000):
            yield StepProgress(Step.PULL, UPDATED, item="sha256:1", bytes_done=done, bytes_total=2000)
        yield StepProgress(Step.PULL, DONE, item="sha256:1")
        yield StepProgress(Step.PULL, DONE, f"Pulled {reference}")

    async def _hang(self) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            self.cancelled.set()

    async def _build(self, source: DockerfileSource) -> AsyncIterator[Progress]:
        yield StepProgress(Step.BUILD, STARTED, "Building")
        lines = [line for line in source.dockerfile.splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            item = f"{number}/{len(lines)}"
            if line.startswith("FROM"):
                yield StepProgress(Step.BUILD, CACHED, line, item=item)
                continue
            yield StepProgress(Step.BUILD, STARTED, line, item=item)
            yield BuildOutput(f"running {line}\n\x1b[31mred\x1b[0m\n", item=item)
            if "exit 3" in line:
                raise BuildFailed(
                    f"step {number} of {len(lines)}, line {number}: {line}", why="it exited with 3",
                    fix="open a shell there with: tartarus run -it --template build-x-failed -- sh",
                )  # fmt: skip
            yield StepProgress(Step.BUILD, DONE, line, item=item)
        yield StepProgress(Step.BUILD, DONE, "Built")

    async def _finish(self, tenant: str, request: CreateTemplate, base: str) -> AsyncIterator[Progress]:
        yield StepProgress(Step.ROOTFS, STARTED, "Unpacking")
        yield StepProgress(Step.ROOTFS, DONE, "Unpacked")
        yield StepProgress(Step.SNAPSHOT, DONE, "Warmed")
        said = request.definition
        before = self.own.get((tenant, request.name))
        info = TemplateInfo(
            id=before.id if before else new_id("tpl"), name=request.name, title=said.name, base=base,
            description=said.description, build=before.build + 1 if before else 1, created_at=time.time(),
            digest="sha256:" + "1" * 64, layers=2, size_bytes=123 * 1024**2, warm_ms=12.0, warmed_at=time.time(),
            resources=said.resources.defaults, limits=said.resources, labels=said.labels,
        )  # fmt: skip
        self.own[tenant, request.name] = info
        yield Done(info)

    async def remove(self, tenant: str, name: str) -> None:
        found = await self.get(tenant, name)
        if found.builtin:
            raise InvalidRequest(f"{name!r} is built in")
        del self.own[tenant, found.name]

    async def warm(self, tenant: str, name: str) -> AsyncIterator[Progress]:
        info = await self.get(tenant, name)
        yield StepProgress(Step.SNAPSHOT, STARTED, "Warming")
        yield StepProgress(Step.SNAPSHOT, DONE, "Warmed")
        yield Done(msgspec.structs.replace(info, warm_ms=9.0))

    async def scan(self, tenant: str, name: str, request: ScanRequest) -> Any:
        name = (await self.get(tenant, name)).name
        size = 0
        if request.database:
            async with self._uploads.claimed(tenant, request.database) as path:
                size = path.stat().st_size
        self.scans.append((request, size))
        return {
            "template": name,
            "report": {"source": "a test", "packages": 3, "checked": 2, "findings": [FINDING], "gaps": ["one"],
                       "database_date": "2026-11-20"},
            "counts": {"high": 1, "low": 0},
            "verdict": {"blocked": name == "blocked", "reasons": ["CVE-2026-1 is high"], "notes": []},
        }  # fmt: skip

    async def sbom(self, tenant: str, name: str) -> bytes:
        await self.get(tenant, name)
        return b'{"bomFormat": "CycloneDX", "specVersion": "1.6", "components": []}'

    async def push(self, tenant: str, name: str, request: PushRequest) -> AsyncIterator[Progress]:
        await self.get(tenant, name)
        self.pushes.append(request)
        yield StepProgress(Step.PUSH, STARTED, "Pushing")
        yield StepProgress(Step.PUSH, DONE, "Pushed")
        yield Pushed(request.reference, "sha256:" + "2" * 64)


def content(path: Path) -> dict[str, Any]:
    """What was uploaded: a tar's members, and the digest of the whole."""
    found: dict[str, Any] = {"digest": hashlib.sha256(path.read_bytes()).hexdigest()}
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            found["members"] = {member.name: member for member in archive}
    return found


class Snapshots:
    """The tenants' snapshots."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads
        self.own: dict[tuple[str, str], SnapshotInfo] = {}

    async def create(self, tenant: str, request: CreateSnapshot) -> SnapshotInfo:
        if request.name and any(owner == tenant and info.name == request.name for (owner, _), info in self.own.items()):
            raise NameTaken(f"you already have a snapshot {request.name!r}")
        info = SnapshotInfo(
            id=new_id("snap"), tenant=tenant, name=request.name, sandbox=request.sandbox, template="host",
            digest="sha256:" + "3" * 64, size_bytes=4096, created_at=time.time(), labels=request.labels,
            kind=request.kind, isolation="gvisor" if request.kind is SnapshotKind.MEMORY else "", paused_ms=12.5,
        )  # fmt: skip
        self.own[tenant, info.id] = info
        return info

    async def bring(self, tenant: str, request: ImportSnapshot) -> SnapshotInfo:
        async with self.uploads.claimed(tenant, request.upload) as path:
            if path.read_bytes() != EXPORTED:
                raise SnapshotRefused("the file is no memory snapshot")
        return await self.create(tenant, CreateSnapshot("elsewhere", request.name, request.labels, SnapshotKind.MEMORY))

    async def export(self, tenant: str, name: str) -> AsyncIterator[bytes]:
        info = await self.get(tenant, name)
        if info.kind is not SnapshotKind.MEMORY:
            raise Unsupported("only snapshots of memory can be exported")
        yield EXPORTED[:3]
        yield EXPORTED[3:]

    async def list(self, tenant: str) -> list[SnapshotInfo]:
        return [info for (owner, _), info in self.own.items() if owner == tenant][::-1]

    async def get(self, tenant: str, name: str) -> SnapshotInfo:
        for info in await self.list(tenant):
            if name in (info.id, info.name):
                return info
        raise SnapshotNotFound(f"no snapshot {name!r}")

    async def delete(self, tenant: str, name: str) -> None:
        del self.own[tenant, (await self.get(tenant, name)).id]


class Library:
    """Both."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads
        self.templates = Templates(uploads)
        self.snapshots = Snapshots(uploads)
