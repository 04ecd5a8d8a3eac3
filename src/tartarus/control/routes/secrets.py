"""Secrets of live sandboxes: fetched anew, without a word of what they are."""

from __future__ import annotations

from litestar import post
from litestar.params import FromPath

from tartarus.control.api import ApiRequest
from tartarus.model.secrets import SecretsRefreshed


@post("/v1/sandboxes/{sandbox_id:str}/secrets/refresh", status_code=200, audit="secret.refresh")
async def refresh(request: ApiRequest, sandbox_id: FromPath[str]) -> SecretsRefreshed:
    """Replace the files of a sandbox's secrets by what their providers say now."""
    sandbox = await request.live(sandbox_id, wake=False)
    return SecretsRefreshed(await request.api.node.secrecy.refresh(sandbox))


ROUTES = [refresh]
