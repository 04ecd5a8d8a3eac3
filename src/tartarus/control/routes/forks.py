"""Copies of a live sandbox."""

from __future__ import annotations

from litestar import post
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.forking import ForkRequest, ForkResult


@post(
    "/v1/sandboxes/{sandbox_id:str}/fork",
    dto=Strict[ForkRequest],
    return_dto=None,
    status_code=200,
    audit="sandbox.fork",
)
async def fork(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[ForkRequest]) -> ForkResult:
    """Make live copies, with memory where the level can; each child's error is its own."""
    sandbox = await request.live(sandbox_id)
    return await request.unless_gone(request.api.node.fork(request.peer.tenant, sandbox.record.id, data))


ROUTES = [fork]
