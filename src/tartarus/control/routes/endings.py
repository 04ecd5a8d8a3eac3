"""Graceful ends: one sandbox's, and a whole node's."""

from __future__ import annotations

import asyncio
import os

from litestar import delete, get, post
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.errors import PermissionRefused
from tartarus.model.lifecycle import DrainReport, DrainRequest, Stopped, StopRequest


@post(
    "/v1/sandboxes/{sandbox_id:str}/stop",
    dto=Strict[StopRequest],
    return_dto=None,
    status_code=200,
    audit="sandbox.stop",
)
async def stop(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[StopRequest]) -> Stopped:
    """End a sandbox gracefully; answers once it is gone. It goes on when the client does not wait."""
    record, sandbox = await request.api.find(request.peer.tenant, sandbox_id)
    if sandbox is None:
        return Stopped(record)
    return await request.api.node.terminator.stop(sandbox, data)


@post("/v1/drain", dto=Strict[DrainRequest], return_dto=None, status_code=200, audit="node.drain")
async def drain(request: ApiRequest, data: JSONBody[DrainRequest]) -> DrainReport:
    """Take no new sandboxes, and end every one gracefully. It goes on when the client does not wait."""
    _check_owner(request)
    return await asyncio.shield(asyncio.ensure_future(request.api.node.terminator.drain(data)))


@get("/v1/drain")
async def draining(request: ApiRequest) -> DrainReport:
    """Whether the node takes new sandboxes, and which it has."""
    _check_owner(request)
    return request.api.node.terminator.report()


@delete("/v1/drain", audit="node.undrain")
async def undo(request: ApiRequest) -> None:
    """Take new sandboxes again."""
    _check_owner(request)
    request.api.node.terminator.undo()


def _check_owner(request: ApiRequest) -> None:
    if request.peer.uid not in {0, os.geteuid()}:
        raise PermissionRefused("only the daemon's owner may drain it")


ROUTES = [stop, drain, draining, undo]
