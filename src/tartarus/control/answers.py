"""Every error of an HTTP request becomes a problem document here: ours, the framework's, and the unexpected."""

from __future__ import annotations

import http
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from tartarus.control.problems import MEDIA_TYPE, Problem, as_tartarus_error, problem_of
from tartarus.model.errors import InvalidRequest


def _respond(problem: Problem) -> Response[Problem]:
    # What is left of an oversized body is not worth reading: closing tells the sender to stop.
    headers = {"connection": "close"} if problem.status == http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE else {}
    return Response(problem, status_code=problem.status, media_type=MEDIA_TYPE, headers=headers)


def on_error(_: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    """Answer our own errors, and everything unexpected."""
    return _respond(problem_of(as_tartarus_error(error)))


def on_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    """Answer what the framework refused before a handler ran: paths, methods, parameters, sizes."""
    status = error.status_code
    if status >= 500:
        return on_error(request, error)
    asked = f"{request.scope['method']} {request.scope['path']}"
    if status == 404:
        refused = InvalidRequest(f"there is nothing at {asked}", fix="the API is described at GET /v1/schema")
    elif status == 405:
        refused = InvalidRequest(f"{asked}: the method is not one of this resource", fix="see GET /v1/schema")
    elif status == 413:
        refused = InvalidRequest("the request's body is too large", fix="send less; files go to PUT …/files")
    elif isinstance(error, ValidationException):
        refused = InvalidRequest(_parameters(error), fix="see GET /v1/schema")
    else:
        refused = InvalidRequest(error.detail or http.HTTPStatus(status).phrase)
    return _respond(problem_of(refused, status))


def _parameters(error: ValidationException) -> str:
    parts = [
        "the request has no body"
        if item.get("key") == "data"
        else f"{item.get('key', 'the request')}: {item.get('message', 'not valid')}"
        for item in (error.extra if isinstance(error.extra, list) else [])
        if isinstance(item, dict)
    ]
    return "; ".join(parts) or error.detail
