"""Checkpoints: take one, list them, start a sandbox anew from one. They are deleted as the snapshots that they are."""

from __future__ import annotations

from litestar import Response, get, post
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.library import SnapshotInfo
from tartarus.model.lifecycle import CheckpointRequest
from tartarus.model.sandbox import SandboxRecord


@post(
    "/v1/sandboxes/{sandbox_id:str}/checkpoints",
    dto=Strict[CheckpointRequest],
    return_dto=None,
    audit="sandbox.checkpoint",
)
async def take(
    request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[CheckpointRequest]
) -> Response[SnapshotInfo]:
    """Keep a sandbox as it is now, with its memory where the level can save that; it goes on."""
    made = await request.api.node.checkpoints.take(await request.live(sandbox_id), data)
    return Response(made, status_code=201, headers={"location": f"/v1/snapshots/{made.id}"})


@get("/v1/checkpoints")
async def listing(request: ApiRequest) -> list[SnapshotInfo]:
    """The caller's checkpoints, newest first."""
    return await request.api.node.checkpoints.list(request.peer.tenant)


@post("/v1/checkpoints/{snapshot_id:str}/resume", audit="checkpoint.resume")
async def resume(request: ApiRequest, snapshot_id: FromPath[str]) -> Response[SandboxRecord]:
    """Make a sandbox as the checkpoint's was, from where it was."""
    sandbox = await request.api.node.checkpoints.resume(request.peer.tenant, snapshot_id)
    sandbox.detach()
    record = sandbox.record
    return Response(record, status_code=201, headers={"location": f"/v1/sandboxes/{record.id}"})


ROUTES = [take, listing, resume]
