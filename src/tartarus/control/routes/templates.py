"""Templates: make, list, show, warm, scan, push, remove. Work that takes its time is a stream of progress.

A client that hangs up ends the work that it asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from litestar import Response, delete, get, post
from litestar.params import FromPath, JSONBody
from litestar.response import Stream

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.control.streaming import ndjson, primed
from tartarus.model.library import CreateTemplate, Progress, PushRequest, ScanRequest, TemplateInfo

_ONE = "/v1/templates/{template_id:str}"


async def _stream(request: ApiRequest, progress: AsyncIterator[Progress]) -> Stream:
    """JSON lines of progress; what is refused before the first is an ordinary problem."""
    return ndjson(await request.unless_gone(primed(progress)))


@get("/v1/templates")
async def listing(request: ApiRequest) -> list[TemplateInfo]:
    """The templates that the caller's sandboxes can be made from: built-in ones and the caller's own."""
    return await request.api.templates.list(request.peer.tenant)


@post("/v1/templates", dto=Strict[CreateTemplate], return_dto=None, status_code=200, audit="template.create")
async def create(request: ApiRequest, data: JSONBody[CreateTemplate]) -> Stream:
    """Make a template; its progress comes as JSON lines, the last of which is the template."""
    return await _stream(request, request.api.templates.create(request.peer.tenant, data))


@get(_ONE)
async def show(request: ApiRequest, template_id: FromPath[str]) -> TemplateInfo:
    """One template, by name, id or unique id prefix."""
    return await request.api.templates.get(request.peer.tenant, template_id)


@delete(_ONE, audit="template.delete")
async def remove(request: ApiRequest, template_id: FromPath[str]) -> None:
    """Forget one of the caller's templates; sandboxes that live go on."""
    await request.api.templates.remove(request.peer.tenant, template_id)


@post(_ONE + "/warm", status_code=200, audit="template.warm")
async def warm(request: ApiRequest, template_id: FromPath[str]) -> Stream:
    """Make its warm snapshot anew; progress as for a new template."""
    return await _stream(request, request.api.templates.warm(request.peer.tenant, template_id))


@post(_ONE + "/push", dto=Strict[PushRequest], return_dto=None, status_code=200, audit="template.push")
async def push(request: ApiRequest, template_id: FromPath[str], data: JSONBody[PushRequest]) -> Stream:
    """Push it to a registry as an image; progress as JSON lines, the last of which says where it is."""
    return await _stream(request, request.api.templates.push(request.peer.tenant, template_id, data))


@post(_ONE + "/scan", dto=Strict[ScanRequest], return_dto=None, status_code=200, audit="template.scan")
async def scan(request: ApiRequest, template_id: FromPath[str], data: JSONBody[ScanRequest]) -> Any:
    """Known vulnerabilities of its packages, and what the policy says of them."""
    return await request.unless_gone(request.api.templates.scan(request.peer.tenant, template_id, data))


@get(_ONE + "/sbom")
async def sbom(request: ApiRequest, template_id: FromPath[str]) -> Response[bytes]:
    """Its packages as a CycloneDX document."""
    document = await request.unless_gone(request.api.templates.sbom(request.peer.tenant, template_id))
    return Response(document, media_type="application/vnd.cyclonedx+json")


ROUTES = [listing, create, show, remove, warm, push, scan, sbom]
