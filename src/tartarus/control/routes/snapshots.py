"""Snapshots of sandboxes' files: take, list, show, delete."""

from __future__ import annotations

from litestar import Response, delete, get, post
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.library import CreateSnapshot, SnapshotInfo


@post("/v1/snapshots", dto=Strict[CreateSnapshot], return_dto=None)
async def create(request: ApiRequest, data: JSONBody[CreateSnapshot]) -> Response[SnapshotInfo]:
    """Keep what a live sandbox of the caller's has changed."""
    made = await request.unless_gone(request.api.snapshots.create(request.peer.tenant, data))
    return Response(made, status_code=201, headers={"location": f"/v1/snapshots/{made.id}"})


@get("/v1/snapshots")
async def listing(request: ApiRequest) -> list[SnapshotInfo]:
    """The caller's snapshots, newest first."""
    return await request.api.snapshots.list(request.peer.tenant)


@get("/v1/snapshots/{snapshot_id:str}")
async def show(request: ApiRequest, snapshot_id: FromPath[str]) -> SnapshotInfo:
    """One snapshot, by id, name or unique id prefix."""
    return await request.api.snapshots.get(request.peer.tenant, snapshot_id)


@delete("/v1/snapshots/{snapshot_id:str}")
async def remove(request: ApiRequest, snapshot_id: FromPath[str]) -> None:
    """Delete a snapshot; sandboxes made from it go on."""
    await request.api.snapshots.delete(request.peer.tenant, snapshot_id)


ROUTES = [create, listing, show, remove]
