"""WebAssembly modules: uploaded, compiled once, and then named by their sha256 in a sandbox's spec."""

from __future__ import annotations

from litestar import Response, delete, get, post
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.modules import AddModule, ModuleInfo


@post("/v1/modules", dto=Strict[AddModule], return_dto=None, audit="module.add")
async def add(request: ApiRequest, data: JSONBody[AddModule]) -> Response[ModuleInfo]:
    """Compile an uploaded module or component, in a sandbox, and keep it for the caller."""
    made = await request.unless_gone(request.api.modules.add(request.peer.tenant, data.upload))
    return Response(made, status_code=201, headers={"location": f"/v1/modules/{made.digest}"})


@get("/v1/modules/{module_id:str}")
async def show(request: ApiRequest, module_id: FromPath[str]) -> ModuleInfo:
    """One of the caller's modules, ready to run."""
    return await request.api.modules.find(request.peer.tenant, module_id)


@get("/v1/modules")
async def listing(request: ApiRequest) -> list[ModuleInfo]:
    """The caller's modules, the one that was used last first."""
    return await request.api.modules.list(request.peer.tenant)


@delete("/v1/modules/{module_id:str}", audit="module.remove")
async def remove(request: ApiRequest, module_id: FromPath[str]) -> None:
    """Forget a module, by its sha256 or the unique beginning of it; sandboxes that were made of it go on."""
    await request.api.modules.remove(request.peer.tenant, module_id)


ROUTES = [add, listing, show, remove]
