"""What the control layer needs of templates, snapshots, modules and uploads, as protocols; see `ports`."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Protocol

from tartarus.model.library import (
    CreateSnapshot,
    CreateTemplate,
    Progress,
    PushRequest,
    ScanRequest,
    SnapshotInfo,
    TemplateInfo,
    Upload,
)
from tartarus.model.modules import ModuleInfo
from tartarus.model.snapshots import ImportSnapshot


class Modules(Protocol):
    """The tenant's WebAssembly modules."""

    async def add(self, tenant: str, upload: str) -> ModuleInfo:
        """Compile one that was uploaded."""

    async def find(self, tenant: str, digest: str) -> ModuleInfo:
        """One that is compiled. Raises ModuleNotFound."""

    async def list(self, tenant: str) -> builtins.list[ModuleInfo]:
        """All that are kept, the one that was used last first."""

    async def remove(self, tenant: str, word: str) -> None:
        """Forget one, by the beginning of its digest. Raises ModuleNotFound, InvalidRequest."""


class Templates(Protocol):
    """What sandboxes are made from: built-in templates, and the tenant's own. Ids, names and id prefixes are taken.

    Another tenant's template is TemplateNotFound. The streams of progress end work that nobody reads any more: closing
    one cancels what it reports, and leaves nothing half-done.
    """

    async def list(self, tenant: str) -> builtins.list[TemplateInfo]:
        """Every one that the tenant may use."""

    async def get(self, tenant: str, name: str) -> TemplateInfo:
        """One of them."""

    def create(self, tenant: str, request: CreateTemplate) -> AsyncIterator[Progress]:
        """Pull, import or build one, and warm it; ends with Done, or raises.

        The first event comes at once, or the refusal: a name that is taken or built in, an upload that is not there.
        """

    async def remove(self, tenant: str, name: str) -> None:
        """Forget one of the tenant's own. Live sandboxes of it go on."""

    def warm(self, tenant: str, name: str) -> AsyncIterator[Progress]:
        """Make its warm snapshot anew; the old one serves until the new one is proven. Ends with Done."""

    async def scan(self, tenant: str, name: str, request: ScanRequest) -> Any:
        """Known vulnerabilities of its packages and the policy's verdict, as JSON can carry it."""

    async def sbom(self, tenant: str, name: str) -> bytes:
        """Its packages as a CycloneDX document (JSON)."""

    def push(self, tenant: str, name: str, request: PushRequest) -> AsyncIterator[Progress]:
        """Push it to a registry as an image; ends with Pushed."""


class Snapshots(Protocol):
    """Snapshots of the tenant's sandboxes; another tenant's are SnapshotNotFound."""

    async def create(self, tenant: str, request: CreateSnapshot) -> SnapshotInfo:
        """Keep what a live sandbox has changed, as a layer over its template, or its memory too."""

    async def bring(self, tenant: str, request: ImportSnapshot) -> SnapshotInfo:
        """Keep one that was exported. Raises SnapshotRefused."""

    def export(self, tenant: str, name: str) -> AsyncIterator[bytes]:
        """One of memory as a file."""

    async def list(self, tenant: str) -> builtins.list[SnapshotInfo]:
        """The tenant's, newest first."""

    async def get(self, tenant: str, name: str) -> SnapshotInfo:
        """One of them, by id, name or id prefix."""

    async def delete(self, tenant: str, name: str) -> None:
        """Forget one. Live sandboxes made from it go on."""


class Uploads(Protocol):
    """Files that wait to be used once."""

    async def put(self, tenant: str, chunks: AsyncIterable[bytes]) -> Upload:
        """Keep a file, whole or not at all."""

    async def remove(self, tenant: str, upload_id: str) -> None:
        """Remove one. Raises UploadNotFound."""
