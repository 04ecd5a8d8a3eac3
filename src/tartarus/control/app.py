"""The Litestar application: routes, error answers and limits. Nothing that a request does not need is switched on."""

from __future__ import annotations

from litestar import Litestar
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from tartarus import __version__
from tartarus.control.answers import on_error, on_http_error
from tartarus.control.api import Api, ApiRequest, ApiSocket, refuse_unknown_parameters
from tartarus.control.auditing import audited
from tartarus.control.routes import ROUTES

# A spec holds a command line, and the kernel's cap on that is 2 MiB; JSON may double it.
MAX_BODY_BYTES = 5 * 1024 * 1024


def make_app(api: Api) -> Litestar:
    """The application that serves `api`."""
    return Litestar(
        route_handlers=ROUTES,
        state=State({"api": api}),
        request_class=ApiRequest,
        websocket_class=ApiSocket,
        middleware=[audited],
        before_request=refuse_unknown_parameters,
        exception_handlers={HTTPException: on_http_error, Exception: on_error},
        request_max_body_size=MAX_BODY_BYTES,
        # Generated when it is first asked for; no page that would load scripts from elsewhere.
        openapi_config=OpenAPIConfig(
            title="Tartarus", version=__version__, path="/v1/schema", render_plugins=[JsonRenderPlugin(path="/")]
        ),
        logging_config=None,
        # Litestar would install a telemetry and a debugger hook of its own otherwise.
        debug=False,
    )
