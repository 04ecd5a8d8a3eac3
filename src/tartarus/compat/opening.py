"""Finding an engine on this host and opening it, by kind and perhaps by its socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tartarus.compat.children import ended
from tartarus.compat.engines import LegacyRuntime
from tartarus.model.errors import EngineFailed, InvalidRequest

KINDS = ("docker", "podman", "containerd")
_SERVICE_S = 20.0
# Podman's service ends by itself when nobody has asked it anything for so long, should we be killed.
_IDLE_S = 60


@contextlib.contextmanager
def opened(
    kind: str, socket: str = "", namespace: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[LegacyRuntime]:
    """An engine, by kind; Podman's service is started when it does not run. `namespace`: containerd's.

    Raises EngineFailed and InvalidRequest.
    """
    environment = os.environ if environment is None else environment
    place = socket or _named(kind, environment) or _usual(kind, environment)
    if kind == "podman" and not socket and not _is_socket(place) and shutil.which("podman"):
        with _podman_service(environment) as place:
            yield reopen(kind, place, namespace)
        return
    yield reopen(kind, place, namespace)


def reopen(kind: str, socket: str, namespace: str = "") -> LegacyRuntime:
    """The same engine again, from what `words` said of it."""
    if kind in {"docker", "podman"}:
        from tartarus.compat.docker import DockerRuntime

        return DockerRuntime(socket, kind)
    from tartarus.compat.containerd import ContainerdRuntime

    return ContainerdRuntime(socket, namespace)


def found(environment: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Kinds and sockets of the engines that seem to be here, without asking them."""
    environment = os.environ if environment is None else environment
    places = [(kind, _usual(kind, environment)) for kind in KINDS]
    return [(kind, place) for kind, place in places if _is_socket(place)]


def _named(kind: str, environment: Mapping[str, str]) -> str:
    """The socket that the engine's own variable names."""
    variable = {"docker": "DOCKER_HOST", "podman": "CONTAINER_HOST", "containerd": "CONTAINERD_ADDRESS"}[kind]
    said = environment.get(variable, "")
    if "://" in said and not said.startswith("unix://"):
        raise InvalidRequest(
            f"{variable} names an engine that is not on this host", why="only a local socket is used",
            fix=f"unset {variable}, or give the socket with --socket",
        )  # fmt: skip
    return said.removeprefix("unix://")


def _usual(kind: str, environment: Mapping[str, str]) -> str:
    own = environment.get("XDG_RUNTIME_DIR", "") if os.geteuid() != 0 else ""
    usual = {
        "docker": ("docker.sock", "/run/docker.sock"),
        "podman": ("podman/podman.sock", "/run/podman/podman.sock"),
        "containerd": ("containerd/containerd.sock", "/run/containerd/containerd.sock"),
    }
    rootless, system = usual[kind]
    place = f"{own}/{rootless}"
    return place if own and _is_socket(place) else system


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


@contextlib.contextmanager
def _podman_service(environment: Mapping[str, str]) -> Iterator[str]:
    """Podman's API for as long as we need it: Podman has no daemon. Ending it ends no container.

    Should we be killed, it ends by itself and takes its socket away; the directory is always the same one.
    """
    place = _private_directory(environment)
    socket = place / f"{os.getpid()}.sock"
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["podman", "system", "service", "--time", str(_IDLE_S), f"unix://{socket}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        _await_socket(process, socket)
        yield str(socket)
    finally:
        ended(process)
        socket.unlink(missing_ok=True)


def _private_directory(environment: Mapping[str, str]) -> Path:
    own = environment.get("XDG_RUNTIME_DIR", "") if os.geteuid() != 0 else "/run"
    place = Path(own or tempfile.gettempdir()) / f"tartarus-podman-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise EngineFailed(f"{place} is not a directory of yours alone", fix="remove it")
    return place


def _await_socket(process: subprocess.Popen[bytes], socket: Path) -> None:
    until = time.monotonic() + _SERVICE_S
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise EngineFailed(
                "podman's service did not start", fix="try: podman system service --time 0 unix:///tmp/podman.sock"
            )
        time.sleep(0.02)
