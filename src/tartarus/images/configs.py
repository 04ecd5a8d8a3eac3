"""An image's configuration document: how it is run, on what, and the digests of its layers' contents."""

from __future__ import annotations

import msgspec

from tartarus.images.manifests import ARCHITECTURES, decode
from tartarus.images.oci import ImageConfig, Platform
from tartarus.images.reference import is_digest
from tartarus.model.errors import ImageRefused


class _Health(msgspec.Struct):
    Test: list[str] | None = None


class _Run(msgspec.Struct):
    Env: list[str] | None = None
    Entrypoint: list[str] | None = None
    Cmd: list[str] | None = None
    WorkingDir: str = ""
    User: str = ""
    Labels: dict[str, str] | None = None
    ExposedPorts: dict[str, object] | None = None
    Shell: list[str] | None = None
    StopSignal: str = ""
    Healthcheck: _Health | None = None


class _Rootfs(msgspec.Struct):
    diff_ids: list[str] | None = None


class _Config(msgspec.Struct):
    architecture: str = ""
    os: str = ""
    variant: str = ""
    config: _Run | None = None
    rootfs: _Rootfs | None = None


def read_config(content: bytes) -> tuple[ImageConfig, Platform, tuple[str, ...]]:
    """An image's configuration: how it is run, on what, and the digests of its layers' contents (`diff_ids`)."""
    found = decode(content, _Config, "image's configuration")
    diff_ids = tuple((found.rootfs.diff_ids if found.rootfs is not None else None) or ())
    for diff_id in diff_ids:
        if not is_digest(diff_id):
            raise ImageRefused(f"the image names a layer's content by {diff_id[:100]!r}", why="only SHA-256 is taken")
    platform = Platform(found.os or "linux", ARCHITECTURES.get(found.architecture, found.architecture), found.variant)
    return _run_config(found.config or _Run()), platform, diff_ids


def _run_config(run: _Run) -> ImageConfig:
    env = {}
    for pair in run.Env or []:
        name, equals, value = pair.partition("=")
        if not name or "\0" in pair:
            raise ImageRefused(f"the image sets a variable that no process could have: {pair[:100]!r}")
        if equals:  # without one, Docker leaves the variable unset
            env[name] = value
    words = (run.Entrypoint, run.Cmd, run.Shell, (run.WorkingDir, run.User))
    if any("\0" in word for part in words for word in part or ()):
        raise ImageRefused("the image has a NUL byte in its command, its directory or its user")
    return ImageConfig(
        env=env,
        entrypoint=tuple(run.Entrypoint or ()),
        cmd=tuple(run.Cmd or ()),
        # As Docker does: one that is not absolute begins at the root.
        workdir=f"/{run.WorkingDir.lstrip('/')}" if run.WorkingDir else "",
        user=run.User,
        labels=run.Labels or {},
        exposed_ports=tuple(run.ExposedPorts or ()),
        shell=tuple(run.Shell or ()),
        stop_signal=run.StopSignal,
        healthcheck=tuple((run.Healthcheck.Test if run.Healthcheck is not None else None) or ()),
    )


def write_config(config: ImageConfig, diff_ids: tuple[str, ...], platform: Platform) -> bytes:
    """The configuration as the specification has it. Without dates, so that equal images have equal digests."""
    run: dict[str, object] = {
        "User": config.user,
        "ExposedPorts": {port: {} for port in config.exposed_ports},
        "Env": [f"{name}={value}" for name, value in config.env.items()],
        "Entrypoint": config.entrypoint,
        "Cmd": config.cmd,
        "WorkingDir": config.workdir,
        "Labels": config.labels,
        "StopSignal": config.stop_signal,
        "Shell": config.shell,
        "Healthcheck": {"Test": config.healthcheck} if config.healthcheck else None,
    }
    document: dict[str, object] = {"architecture": platform.architecture, "os": platform.os}
    if platform.variant:
        document["variant"] = platform.variant
    document["config"] = {name: value for name, value in run.items() if value}
    document["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    return msgspec.json.encode(document)
