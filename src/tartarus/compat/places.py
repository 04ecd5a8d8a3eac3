"""Which of a container's mounts no sandbox may have: engines' sockets, and what the host stands on."""

from __future__ import annotations

import os
import stat

# Whoever holds an engine's socket, or its files, holds the host.
_ENGINES = (
    "/run/docker.sock", "/run/podman/podman.sock", "/run/containerd/containerd.sock", "/run/crio/crio.sock",
    "/var/lib/docker", "/var/lib/containers", "/var/lib/containerd", "/var/lib/kubelet",
)  # fmt: skip
_HOST = ("/proc", "/sys", "/dev", "/boot", "/run", "/etc", "/root", "/usr", "/bin", "/sbin", "/lib", "/lib64")


def refusal(source: str, *, engine_socket: str = "", volume: bool = False) -> str:
    """Why a host path is not shown to a sandbox; nothing when it may be.

    `volume`: it is one of the engine's own volumes, which may lie among the engine's files.
    """
    if not source.startswith("/") or "\0" in source:
        return "its source is no path"
    path = os.path.realpath(source)
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return "its source does not exist on this host"
    except OSError as error:
        return f"its source can't be looked at: {error.strerror}"
    if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
        return "it is a socket or a device of the host"
    if volume and not path.endswith("/_data"):
        return "it is no volume of the engine's"
    for socket in (*_ENGINES, *((engine_socket,) if engine_socket else ())):
        held = os.path.realpath(socket)
        if _contains(path, held) or (_contains(held, path) and not volume):
            return "it holds an engine's socket or files: whoever has those, has the host"
    for place in _HOST:
        if _contains(path, os.path.realpath(place)) or _contains(place, path):
            return f"it is part of what the host stands on ({place})"
    return ""


def _contains(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
