"""System call profiles: built-in ones and the caller's own; and what a sandbox has called."""

from __future__ import annotations

from litestar import delete, get, put
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.seccomp import Profile, PutProfile, RecordedCalls


@get("/v1/seccomp")
async def listing(request: ApiRequest) -> list[Profile]:
    """The built-in profiles, then the caller's, by name."""
    return await request.api.node.profiles.list(request.peer.tenant)


@get("/v1/seccomp/{profile_id:str}")
async def show(request: ApiRequest, profile_id: FromPath[str]) -> Profile:
    """One profile, by its name."""
    return await request.api.node.profiles.get(request.peer.tenant, profile_id)


@put("/v1/seccomp/{profile_id:str}", dto=Strict[PutProfile], return_dto=None, audit="seccomp.put")
async def keep(request: ApiRequest, profile_id: FromPath[str], data: JSONBody[PutProfile]) -> Profile:
    """Keep a profile, in the place of one of that name; sandboxes that run go on with what they began with."""
    return await request.api.node.profiles.put(request.peer.tenant, profile_id, data)


@delete("/v1/seccomp/{profile_id:str}", audit="seccomp.remove")
async def remove(request: ApiRequest, profile_id: FromPath[str]) -> None:
    """Forget one of the caller's profiles."""
    await request.api.node.profiles.remove(request.peer.tenant, profile_id)


@get("/v1/sandboxes/{sandbox_id:str}/calls")
async def recorded(request: ApiRequest, sandbox_id: FromPath[str]) -> RecordedCalls:
    """The system calls that a sandbox has made until now, of one that was made with `record_calls`."""
    return request.api.node.profiles.recorded(await request.live(sandbox_id, wake=False))


ROUTES = [listing, show, keep, remove, recorded]
