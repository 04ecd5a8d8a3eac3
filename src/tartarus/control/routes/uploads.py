"""Uploads: what a template is to be made from is sent as bytes; the daemon opens no path that a client names."""

from __future__ import annotations

from litestar import Response, delete, put
from litestar.params import FromPath

from tartarus.control.api import ApiRequest
from tartarus.model.library import Upload


@put("/v1/uploads", request_max_body_size=None, audit="upload.add")
async def upload(request: ApiRequest) -> Response[Upload]:
    """Keep the body, whole or not at all, to be used once within an hour."""
    made = await request.api.uploads.put(request.peer.tenant, request.stream())
    return Response(made, status_code=201, headers={"location": f"/v1/uploads/{made.id}"})


@delete("/v1/uploads/{upload_id:str}", audit="upload.remove")
async def remove(request: ApiRequest, upload_id: FromPath[str]) -> None:
    """Remove an upload that is not needed after all."""
    await request.api.uploads.remove(request.peer.tenant, upload_id)


ROUTES = [upload, remove]
