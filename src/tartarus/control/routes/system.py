"""The daemon itself: version, health, metrics, levels, shutdown."""

from __future__ import annotations

import os
from typing import Any

import msgspec
from litestar import Response, get, post

from tartarus import __version__
from tartarus.control.api import ApiRequest
from tartarus.model.errors import PermissionRefused
from tartarus.telemetry.metrics import CONTENT_TYPE

API_VERSION = 1


class Version(msgspec.Struct, frozen=True):
    """Which daemon this is. `started_at`: Unix seconds."""

    version: str
    api: int
    pid: int
    started_at: float


class Health(msgspec.Struct, frozen=True):
    """The daemon answers."""

    status: str = "ok"


@get("/v1/version")
async def version(request: ApiRequest) -> Version:
    """The daemon's version, for clients to compare with theirs."""
    return Version(version=__version__, api=API_VERSION, pid=os.getpid(), started_at=request.api.started_at)


@get(["/healthz", "/readyz"])
async def health() -> Health:
    """Alive and ready are the same thing: the socket is served only once the node has started."""
    return Health()


@get("/metrics", media_type=CONTENT_TYPE)
async def metrics(request: ApiRequest) -> bytes:
    """Metrics in Prometheus' text format."""
    return request.api.metrics.render()


@get("/v1/levels")
async def levels(request: ApiRequest) -> list[Any]:
    """Each isolation level: whether this host can give it, and what is missing."""
    return await request.api.node.levels()


@post("/v1/shutdown", status_code=202, audit="node.shutdown")
async def shutdown(request: ApiRequest) -> Response[None]:
    """Stop gracefully: sandboxes end as killed (node_drain), then the daemon."""
    if request.peer.uid not in {0, os.geteuid()}:
        raise PermissionRefused("only the daemon's owner may stop it")
    request.api.shut_down()
    return Response(None, status_code=202)


ROUTES = [version, health, metrics, levels, shutdown]
