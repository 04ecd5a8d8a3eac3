"""The API's operations on templates, snapshots and uploads, as data; see `calls`."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec

from tartarus.model.errors import DaemonUnavailable, InvalidRequest
from tartarus.model.forking import ForkRequest, ForkResult
from tartarus.model.library import (
    BuildOutput,
    CreateSnapshot,
    CreateTemplate,
    Done,
    Progress,
    Pushed,
    PushRequest,
    ScanRequest,
    SnapshotInfo,
    StepProgress,
    TemplateInfo,
    Upload,
)
from tartarus.model.modules import AddModule, ModuleInfo
from tartarus.model.snapshots import ImportSnapshot
from tartarus.sdk.calls import encode
from tartarus.sdk.decoding import LineDecoder
from tartarus.sdk.http import Call, target
from tartarus.sdk.websocket import broken

T = TypeVar("T")
OnProgress = Callable[[StepProgress | BuildOutput], object]


def _reads(kind: type[T]) -> Callable[[bytes], T]:
    return cast("Callable[[bytes], T]", msgspec.json.Decoder(cast("Any", kind)).decode)


def _nothing(_: bytes) -> None:
    return None


def _document(body: bytes) -> dict[str, Any]:
    return msgspec.json.decode(body, type=dict[str, Any])


def _one(kind: str, name: str, *more: str) -> str:
    if name in {"", ".", ".."}:  # which would be another place's address
        raise InvalidRequest(f"{name!r} is no name", fix="give an id or a name")
    return target(kind, name, *more)


def templates() -> Call[builtins.list[TemplateInfo]]:
    """Every template that the caller may use."""
    return Call("GET", target("templates"), _reads(list[TemplateInfo]))


def template(name: str) -> Call[TemplateInfo]:
    """One template."""
    return Call("GET", _one("templates", name), _reads(TemplateInfo))


def create_template(request: CreateTemplate) -> Call[None]:
    """Make one; its progress comes as JSON lines."""
    return Call("POST", target("templates"), _nothing, encode(request), patience_s=None)


def remove_template(name: str) -> Call[None]:
    """Forget one."""
    return Call("DELETE", _one("templates", name), _nothing)


def warm_template(name: str) -> Call[None]:
    """Make its warm snapshot anew; progress as JSON lines."""
    return Call("POST", _one("templates", name, "warm"), _nothing, b"", patience_s=None)


def push_template(name: str, request: PushRequest) -> Call[None]:
    """Push it to a registry; progress as JSON lines."""
    return Call("POST", _one("templates", name, "push"), _nothing, encode(request), patience_s=None)


def scan_request(upload: str, *, online: bool, tool: str) -> ScanRequest:
    """What to scan against. Raises InvalidRequest for a tool that there is not."""
    if tool not in {"", "trivy", "grype"}:
        raise InvalidRequest(f"{tool!r} is no scanner that can be asked", fix="use trivy or grype")
    return ScanRequest(upload, online, cast("Any", tool))


def scan_template(name: str, request: ScanRequest) -> Call[dict[str, Any]]:
    """Its known vulnerabilities."""
    return Call("POST", _one("templates", name, "scan"), _document, encode(request), patience_s=None)


def template_sbom(name: str) -> Call[dict[str, Any]]:
    """Its packages, as a CycloneDX document."""
    return Call("GET", _one("templates", name, "sbom"), _document, patience_s=None)


def upload() -> Call[Upload]:
    """Keep a streamed body."""
    return Call("PUT", target("uploads"), _reads(Upload), patience_s=None)


def remove_upload(upload_id: str) -> Call[None]:
    """Remove one that is not needed after all."""
    return Call("DELETE", _one("uploads", upload_id), _nothing)


def add_module(upload_id: str) -> Call[ModuleInfo]:
    """Compile an uploaded WebAssembly module."""
    return Call("POST", target("modules"), _reads(ModuleInfo), encode(AddModule(upload_id)), patience_s=None)


def module(digest: str) -> Call[ModuleInfo]:
    """A module that the daemon has compiled."""
    return Call("GET", _one("modules", digest), _reads(ModuleInfo))


def modules() -> Call[builtins.list[ModuleInfo]]:
    """The caller's modules."""
    return Call("GET", target("modules"), _reads(list[ModuleInfo]))


def remove_module(digest: str) -> Call[None]:
    """Forget one."""
    return Call("DELETE", _one("modules", digest), _nothing)


def create_snapshot(request: CreateSnapshot) -> Call[SnapshotInfo]:
    """Keep what a sandbox has changed."""
    return Call("POST", target("snapshots"), _reads(SnapshotInfo), encode(request), patience_s=None)


def snapshots() -> Call[builtins.list[SnapshotInfo]]:
    """The caller's snapshots."""
    return Call("GET", target("snapshots"), _reads(list[SnapshotInfo]))


def snapshot(name: str) -> Call[SnapshotInfo]:
    """One snapshot."""
    return Call("GET", _one("snapshots", name), _reads(SnapshotInfo))


def import_snapshot(request: ImportSnapshot) -> Call[SnapshotInfo]:
    """Keep one that was exported and uploaded."""
    return Call("POST", target("snapshots", "import"), _reads(SnapshotInfo), encode(request), patience_s=None)


def export_snapshot(name: str) -> Call[None]:
    """One of memory, as a stream of bytes."""
    return Call("GET", _one("snapshots", name, "export"), _nothing, patience_s=None)


def fork(sandbox: str, request: ForkRequest) -> Call[ForkResult]:
    """Live copies of a sandbox."""
    return Call("POST", target("sandboxes", sandbox, "fork"), _reads(ForkResult), encode(request), patience_s=None)


def delete_snapshot(name: str) -> Call[None]:
    """Forget one."""
    return Call("DELETE", _one("snapshots", name), _nothing)


class Following:
    """A stream of progress: what it said on the way, and its end."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._lines = LineDecoder()
        self._end: Done | Pushed | None = None

    def receive(self, data: bytes) -> None:
        """Take bytes of the answer. Raises the error that the work ended with."""
        for line in self._lines.receive(data):
            try:
                # The type checker knows no unions as values.
                event: Progress = msgspec.convert(line, cast("Any", Progress))
            except msgspec.ValidationError as error:
                raise broken(str(error)) from error
            if isinstance(event, (Done, Pushed)):
                self._end = event
            elif self._on_progress is not None:
                self._on_progress(event)

    def template(self) -> TemplateInfo:
        """The template that came out of it."""
        if not isinstance(self._end, Done):
            raise _cut_off()
        return self._end.template

    def pushed(self) -> Pushed:
        """Where the image is now."""
        if not isinstance(self._end, Pushed):
            raise _cut_off()
        return self._end


def _cut_off() -> DaemonUnavailable:
    return DaemonUnavailable("the daemon went away before the work was done", fix="see its log, daemon.log")
