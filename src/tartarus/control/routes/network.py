"""A sandbox's network: the contract it is held to, what was counted, and another contract."""

from __future__ import annotations

from litestar import get, put
from litestar.params import FromPath, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.contract import Contract, NetworkState


@get("/v1/sandboxes/{sandbox_id:str}/network")
async def show(request: ApiRequest, sandbox_id: FromPath[str]) -> NetworkState:
    """The contract in force, and what was refused and carried since the sandbox began."""
    return await request.api.node.contracts.state(await request.live(sandbox_id, wake=False))


@put(
    "/v1/sandboxes/{sandbox_id:str}/network/contract",
    dto=Strict[Contract],
    return_dto=None,
    audit_refused="network.swear",
)
async def swear(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[Contract]) -> NetworkState:
    """Put another contract in force, at one moment: what it does not open any more ends then."""
    return await request.api.node.contracts.swear(await request.live(sandbox_id, wake=False), data)


ROUTES = [show, swear]
