"""WebAssembly modules: uploaded, compiled once, and then named by their sha256 in a sandbox's spec."""

from __future__ import annotations

from litestar import Response, get, post
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.library import AddModule, ModuleInfo


@post("/v1/modules", dto=Strict[AddModule], return_dto=None, audit="module.add")
async def add(request: ApiRequest, data: JSONBody[AddModule]) -> Response[ModuleInfo]:
    """Compile an uploaded module or component, in a sandbox, and keep it for the caller."""
    made = await request.unless_gone(request.api.modules.add(request.peer.tenant, data.upload))
    return Response(made, status_code=201, headers={"location": f"/v1/modules/{made.digest}"})


@get("/v1/modules/{module_id:str}")
async def show(request: ApiRequest, module_id: FromPath[str]) -> ModuleInfo:
    """One of the caller's modules, ready to run."""
    return await request.api.modules.find(request.peer.tenant, module_id)


ROUTES = [add, show]
