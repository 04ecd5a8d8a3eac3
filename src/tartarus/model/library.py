"""Templates and snapshots as things that users own: what is asked for, what is known of them, and how work goes on.

`template.Template` is what the runtimes are given; this is what people create, list and remove.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

import msgspec

from tartarus.model.checks import check_labels, no_nul, require
from tartarus.model.definition import BuildNetwork, Definition, TemplateResources
from tartarus.model.ids import check_snapshot_name, check_template_name
from tartarus.model.sandbox import Resources
from tartarus.model.snapshots import SnapshotKind
from tartarus.model.template import Template, WarmUp

MAX_DOCKERFILE_BYTES = 1024**2
MAX_BUILD_ARGS = 256
_MAX_REFERENCE = 4096


class Credentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A login for one registry: a name and a password, or an identity `token`. Used once, never stored or shown."""

    registry: str
    username: str = ""
    password: str = ""
    token: str = ""

    def __repr__(self) -> str:
        return f"Credentials(registry={self.registry!r}, …)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # msgspec's own would show every field, in a traceback with variables for example.
        return [("registry", self.registry)]


class ImageSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="image"):
    """An image of a registry, such as ``python:3.11``."""

    reference: str
    credentials: tuple[Credentials, ...] = ()

    def __post_init__(self) -> None:
        _check_reference(self.reference)


class UploadSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="upload"):
    """An uploaded tar: a root file system, an OCI layout or what ``docker save`` wrote, told apart by content.

    `reference`: which image of an archive that holds several, or what to call one that says no name.
    """

    upload: str
    reference: str = ""

    def __post_init__(self) -> None:
        if self.reference:
            _check_reference(self.reference)


class DockerfileSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="dockerfile"):
    """A Dockerfile's text and its context, an uploaded tar (none: an empty one).

    `args` are build arguments, `target` the stage to stop at (the last one if empty); with `no_cache` every step runs.
    """

    dockerfile: str
    context: str = ""
    args: dict[str, str] = {}
    target: str = ""
    no_cache: bool = False
    credentials: tuple[Credentials, ...] = ()

    def __post_init__(self) -> None:
        no_nul(self.dockerfile, "the Dockerfile")
        size = len(self.dockerfile.encode("utf-8", "surrogatepass"))
        require(
            size <= MAX_DOCKERFILE_BYTES, f"the Dockerfile is {size} bytes long", f"use at most {MAX_DOCKERFILE_BYTES}"
        )
        require(len(self.args) <= MAX_BUILD_ARGS, f"{len(self.args)} build arguments", f"use at most {MAX_BUILD_ARGS}")
        for name, value in self.args.items():
            require(bool(name) and "=" not in name, f"{name!r} is not a build argument's name", "write NAME=value")
            no_nul(name + value, f"build argument {name}")
        no_nul(self.target, "the target")


class TemplateBase(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="template"):
    """Another template, by name or id: ``host``, a built-in one, or one of the caller's."""

    template: str


TemplateSource = ImageSource | UploadSource | DockerfileSource | TemplateBase


class CreateTemplate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new template: its name, what it is made from, and what its definition says besides.

    The definition's `id`, `base_image` and `dockerfile` were the client's to resolve into `name` and `source`.
    `ca_bundle` shows this host's certificates to the build's steps; `replace` puts it in the place of one of that name,
    which serves until the new one is proven.
    """

    name: str
    source: TemplateSource
    # Made anew for each: who describes the API hashes defaults, and this one holds mappings.
    definition: Definition = msgspec.field(default_factory=Definition)
    network: BuildNetwork = BuildNetwork.NONE
    ca_bundle: bool = False
    replace: bool = False

    def __post_init__(self) -> None:
        check_template_name(self.name)


class TemplateStatus(str, Enum):
    """`building`: not there yet; `ready`; `failed`: see `message`; `blocked`: the scan policy keeps it from use."""

    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"
    BLOCKED = "blocked"


class TemplateInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one template. Times are Unix seconds (UTC); `warm_ms` milliseconds; sizes bytes.

    `base` is what it was made from in words; `digest` names its content; `layers` counts its directories; `build`
    counts how often it was made anew; `version` is its author's. `warm_error` says why the newest warm-up failed.
    """

    id: str
    name: str
    title: str = ""
    description: str = ""
    version: str = ""
    build: int = 1
    status: TemplateStatus = TemplateStatus.READY
    message: str = ""
    base: str = ""
    digest: str = ""
    size_bytes: int = 0
    layers: int = 0
    created_at: float = 0.0
    updated_at: float = 0.0
    warmed_at: float | None = None
    warm_ms: float | None = None
    warm_error: str = ""
    resources: Resources = Resources()
    limits: TemplateResources = TemplateResources()
    warm_up: WarmUp | None = None
    labels: dict[str, str] = {}
    builtin: bool = False


class TemplateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A template as the store keeps it.

    `layers` are names in the layer store, top first. `details` is what the node keeps for itself, as JSON (the image's
    configuration, its blobs, its scan). `revision` guards against two writers.
    """

    id: str
    tenant: str
    name: str
    status: TemplateStatus
    definition: Definition
    base: str
    created_at: float
    updated_at: float
    build: int = 1
    message: str = ""
    digest: str = ""
    size_bytes: int = 0
    layers: tuple[str, ...] = ()
    warm_up: WarmUp | None = None
    warmed_at: float | None = None
    warm_ms: float | None = None
    warm_error: str = ""
    details: dict[str, Any] = {}
    revision: int = 0

    @property
    def info(self) -> TemplateInfo:
        """What its owner is shown."""
        said = self.definition
        return TemplateInfo(
            id=self.id, name=self.name, title=said.name, description=said.description, version=said.version,
            build=self.build, status=self.status, message=self.message, base=self.base, digest=self.digest,
            size_bytes=self.size_bytes, layers=len(self.layers), created_at=self.created_at,
            updated_at=self.updated_at, warmed_at=self.warmed_at, warm_ms=self.warm_ms, warm_error=self.warm_error,
            resources=said.resources.defaults, limits=said.resources, warm_up=self.warm_up, labels=said.labels,
        )  # fmt: skip


def built_in(template: Template) -> TemplateInfo:
    """What is shown of a template that comes with Tartarus."""
    return TemplateInfo(
        id=template.id, name=template.id, title=template.name, description=template.description, base=template.base,
        resources=template.resources, warm_up=template.warm_up, builtin=True,
    )  # fmt: skip


class Step(str, Enum):
    """The parts of the work on a template, in the order they come."""

    UPLOAD = "upload"
    PULL = "pull"
    IMPORT = "import"
    BUILD = "build"
    ROOTFS = "rootfs"
    SCAN = "scan"
    SNAPSHOT = "snapshot"
    PUSH = "push"


class StepState(str, Enum):
    """Where a step, or one item of it, is."""

    STARTED = "started"
    UPDATED = "updated"
    DONE = "done"
    CACHED = "cached"


class StepProgress(msgspec.Struct, frozen=True, tag="step"):
    """One step goes on, or with `item` one part of it: a layer's digest, ``4/9`` of a Dockerfile's steps.

    `text` says what it is, for people. Without `item`, ``done`` means that the whole step is over.
    """

    step: Step
    state: StepState
    text: str = ""
    item: str = ""
    bytes_done: int | None = None
    bytes_total: int | None = None


class BuildOutput(msgspec.Struct, frozen=True, tag="output"):
    """What a build's step `item` wrote; it comes from foreign code: don't print it as it is."""

    text: str
    item: str = ""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The last event: the template as it is now."""

    template: TemplateInfo


class Pushed(msgspec.Struct, frozen=True, tag="pushed"):
    """The last event of a push: where the image is now, and its manifest's digest."""

    reference: str
    digest: str


Progress = StepProgress | BuildOutput | Done | Pushed


class PushRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to push a template as an image."""

    reference: str
    credentials: tuple[Credentials, ...] = ()

    def __post_init__(self) -> None:
        _check_reference(self.reference)


class ScanRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to check a template's packages against.

    `database`: an upload, the OSV database's zip; without one, the daemon's own. `online` asks
    OSV's API instead, which learns the packages' names.

    `tool`: a scanner that is installed where the daemon runs, asked instead; with `online` it may update first.
    """

    database: str = ""
    online: bool = False
    tool: Literal["", "trivy", "grype"] = ""

    def __post_init__(self) -> None:
        both = self.database and (self.online or self.tool)
        require(not both, "both a database and the online service or a tool", "choose one")


class Upload(msgspec.Struct, frozen=True):
    """A file that waits in the daemon's cache to be used once. Times are Unix seconds, sizes bytes."""

    id: str
    size_bytes: int
    expires_at: float


class CreateSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot of a live sandbox, by the sandbox's id or name."""

    sandbox: str
    name: str = ""
    labels: dict[str, str] = {}
    kind: SnapshotKind = SnapshotKind.FILES

    def __post_init__(self) -> None:
        require(bool(self.sandbox), "no sandbox given", "give its id or name")
        if self.name:
            check_snapshot_name(self.name)
        check_labels(self.labels)


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot: `sandbox` and `template` are what it was taken of; `digest` names the content it adds.

    Of memory: `isolation` is the level at which it goes on, `paused_ms` how long the sandbox stood still for it.
    """

    id: str
    tenant: str
    name: str
    sandbox: str
    template: str
    digest: str
    size_bytes: int
    created_at: float
    labels: dict[str, str] = {}
    kind: SnapshotKind = SnapshotKind.FILES
    isolation: str = ""
    paused_ms: float | None = None


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as the store keeps it; `layers`, `details` and `revision` as in TemplateRecord."""

    id: str
    tenant: str
    name: str
    sandbox: str
    template: str
    digest: str
    size_bytes: int
    created_at: float
    labels: dict[str, str] = {}
    layers: tuple[str, ...] = ()
    details: dict[str, Any] = {}
    revision: int = 0

    @property
    def kind(self) -> SnapshotKind:
        """What was kept of the sandbox."""
        return SnapshotKind(self.details.get("kind", SnapshotKind.FILES.value))

    @property
    def isolation(self) -> str:
        """The level at which its memory goes on."""
        return str(self.details.get("isolation", ""))

    @property
    def paused_ms(self) -> float | None:
        """How long the sandbox stood still for it."""
        return self.details.get("paused_ms")

    @property
    def info(self) -> SnapshotInfo:
        """What its owner is shown."""
        return SnapshotInfo(**{name: getattr(self, name) for name in SnapshotInfo.__struct_fields__})


def _check_reference(reference: str) -> None:
    no_nul(reference, "the image's name")
    require(bool(reference.strip()), "no image given", "write it like python:3.11")
    require(
        len(reference) <= _MAX_REFERENCE, "the image's name is too long", f"use at most {_MAX_REFERENCE} characters"
    )
