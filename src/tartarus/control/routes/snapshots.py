"""Snapshots of sandboxes: take, list, show, delete; those of memory also as a file, out and in."""

from __future__ import annotations

from litestar import Response, delete, get, post
from litestar.params import FromPath, JSONBody
from litestar.response import Stream

from tartarus.control.api import ApiRequest
from tartarus.control.cutting import whole_or_cut
from tartarus.control.decode import Strict
from tartarus.control.streaming import primed
from tartarus.model.library import CreateSnapshot, SnapshotInfo
from tartarus.model.snapshots import ImportSnapshot


@post("/v1/snapshots", dto=Strict[CreateSnapshot], return_dto=None, audit="snapshot.create")
async def create(request: ApiRequest, data: JSONBody[CreateSnapshot]) -> Response[SnapshotInfo]:
    """Keep what a live sandbox of the caller's has changed, or with `kind` ``memory`` all of it."""
    return _made(await request.unless_gone(request.api.snapshots.create(request.peer.tenant, data)))


@post("/v1/snapshots/import", dto=Strict[ImportSnapshot], return_dto=None, audit="snapshot.import")
async def bring(request: ApiRequest, data: JSONBody[ImportSnapshot]) -> Response[SnapshotInfo]:
    """Keep a snapshot of memory that a trusted host exported."""
    return _made(await request.unless_gone(request.api.snapshots.bring(request.peer.tenant, data)))


@get("/v1/snapshots")
async def listing(request: ApiRequest) -> list[SnapshotInfo]:
    """The caller's snapshots, newest first."""
    return await request.api.snapshots.list(request.peer.tenant)


@get("/v1/snapshots/{snapshot_id:str}")
async def show(request: ApiRequest, snapshot_id: FromPath[str]) -> SnapshotInfo:
    """One snapshot, by id, name or unique id prefix."""
    return await request.api.snapshots.get(request.peer.tenant, snapshot_id)


@get("/v1/snapshots/{snapshot_id:str}/export", audit="snapshot.export")
async def export(request: ApiRequest, snapshot_id: FromPath[str]) -> Stream:
    """A snapshot of memory as one sealed file."""
    pieces = await primed(request.api.snapshots.export(request.peer.tenant, snapshot_id))
    return Stream(whole_or_cut(request, pieces), media_type="application/octet-stream")


@delete("/v1/snapshots/{snapshot_id:str}", audit="snapshot.delete")
async def remove(request: ApiRequest, snapshot_id: FromPath[str]) -> None:
    """Delete a snapshot; sandboxes made from it go on."""
    await request.api.snapshots.delete(request.peer.tenant, snapshot_id)


def _made(info: SnapshotInfo) -> Response[SnapshotInfo]:
    return Response(info, status_code=201, headers={"location": f"/v1/snapshots/{info.id}"})


ROUTES = [create, bring, listing, show, export, remove]
