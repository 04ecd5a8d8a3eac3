"""Hibernation: a sandbox's memory goes to disk, and comes back when it is needed."""

from __future__ import annotations

from litestar import post
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.lifecycle import HibernateRequest
from tartarus.model.sandbox import SandboxRecord


@post(
    "/v1/sandboxes/{sandbox_id:str}/hibernate",
    dto=Strict[HibernateRequest],
    return_dto=None,
    status_code=200,
    audit="sandbox.hibernate",
)
async def hibernate(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[HibernateRequest]) -> SandboxRecord:
    """Put a sandbox to sleep, now or later; now answers once nothing of it is left in memory."""
    sandbox = await request.live(sandbox_id, wake=False)
    if data.after_s is None:
        return await request.api.node.sleeper.sleep(sandbox)
    request.api.node.sleeper.schedule_sleep(sandbox, data.after_s)
    return sandbox.record


@post("/v1/sandboxes/{sandbox_id:str}/wake", status_code=200, audit="sandbox.wake")
async def wake(request: ApiRequest, sandbox_id: FromPath[str]) -> SandboxRecord:
    """Let a hibernated sandbox go on; answers once it runs. One that is awake is fine."""
    sandbox = await request.live(sandbox_id, wake=False)
    return await request.api.node.sleeper.wake(sandbox)


ROUTES = [hibernate, wake]
