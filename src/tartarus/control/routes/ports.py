"""HTTP and WebSockets to a sandbox's own ports. It takes no network: they go over the guest's channel."""

from __future__ import annotations

from litestar import route, websocket
from litestar.enums import HttpMethod
from litestar.params import FromPath
from litestar.types import ASGIApp

from tartarus.control.api import ApiRequest, ApiSocket
from tartarus.control.gateway.address import Address
from tartarus.control.gateway.conversation import converse
from tartarus.control.gateway.exchange import Forwarded

_ROOT = "/v1/sandboxes/{sandbox_id:str}/ports/{port:int}"
_PATHS = [_ROOT, _ROOT + "/{rest:path}"]
# All but TRACE, whose answer would repeat what was asked.
_METHODS = [method for method in HttpMethod if method is not HttpMethod.TRACE]


@route(
    _PATHS,
    http_method=_METHODS,
    request_max_body_size=None,
    audit="port.request",
    is_forwarded=True,
    include_in_schema=False,
)
async def forward(request: ApiRequest, sandbox_id: FromPath[str], port: FromPath[int]) -> ASGIApp:
    """What its server at that port answers; a sandbox that sleeps is woken."""
    address = Address.of(request.scope, sandbox_id, port)
    return Forwarded(request, await request.live(sandbox_id), address)


@websocket(_PATHS, audit="port.connect")
async def talk(socket: ApiSocket, sandbox_id: FromPath[str], port: FromPath[int]) -> None:
    """A WebSocket to its server at that port."""
    await converse(socket, sandbox_id, port)


ROUTES = [forward, talk]
