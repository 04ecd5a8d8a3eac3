"""Stateful code contexts: cells run in an interpreter that lives as long as its context."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from litestar import delete, post
from litestar.params import FromPath, JSONBody
from litestar.response import Stream

from tartarus.control.api import Api, ApiRequest
from tartarus.control.decode import Strict
from tartarus.control.ports import Sandbox
from tartarus.control.streaming import close_iterator, ndjson, primed
from tartarus.model.checks import no_nul
from tartarus.model.errors import GuestFailed, InvalidRequest, TartarusError

MAX_CODE_BYTES = 8 * 1024 * 1024


class Context(msgspec.Struct, frozen=True):
    """A code context."""

    id: str


class CodeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One cell. Without `context`, the sandbox's shared default one; `timeout_s` interrupts the cell."""

    code: str
    context: str | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        no_nul(self.code, "the code")
        if self.timeout_s is not None and not 0 < self.timeout_s <= 366 * 86400:
            raise InvalidRequest("timeout_s is out of range", fix="use more than 0 and at most 366 days")


@post("/v1/sandboxes/{sandbox_id:str}/contexts", audit="sandbox.context.open")
async def open_context(request: ApiRequest, sandbox_id: FromPath[str]) -> Context:
    """Start a fresh interpreter."""
    return Context(id=await (await request.live(sandbox_id)).open_context())


@delete("/v1/sandboxes/{sandbox_id:str}/contexts/{context_id:str}", audit="sandbox.context.close")
async def close_context(request: ApiRequest, sandbox_id: FromPath[str], context_id: FromPath[str]) -> None:
    """End an interpreter and forget its state."""
    sandbox = await request.live(sandbox_id)
    await sandbox.close_context(context_id)
    request.api.forget_default_context(sandbox, context_id)


@post(
    "/v1/sandboxes/{sandbox_id:str}/contexts/{context_id:str}/interrupt",
    status_code=204,
    audit="sandbox.context.interrupt",
)
async def interrupt(request: ApiRequest, sandbox_id: FromPath[str], context_id: FromPath[str]) -> None:
    """Stop the context's running cell, as Ctrl-C would."""
    await (await request.live(sandbox_id)).context(context_id).interrupt()


@post(
    "/v1/sandboxes/{sandbox_id:str}/code",
    dto=Strict[CodeRequest],
    return_dto=None,
    status_code=200,
    request_max_body_size=MAX_CODE_BYTES,
    audit="sandbox.code",
)
async def run_code(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[CodeRequest]) -> Stream:
    """Run a cell; its output, results and errors come as JSON lines while it runs."""
    sandbox = await request.live(sandbox_id)
    if data.context is not None:
        events: AsyncIterator[Any] = sandbox.context(data.context).run(data.code, data.timeout_s)
    else:
        events = _in_default(request.api, sandbox, data)
    return ndjson(await primed(events))


async def _in_default(api: Api, sandbox: Sandbox, cell: CodeRequest) -> AsyncIterator[Any]:
    """Run a cell in the shared context. When that context died, the next cell gets a new one."""
    context_id = await api.default_context(sandbox)
    events = sandbox.context(context_id).run(cell.code, cell.timeout_s)
    try:
        async for event in events:
            yield event
    except GuestFailed:
        api.forget_default_context(sandbox, context_id)
        with contextlib.suppress(TartarusError):
            await sandbox.close_context(context_id)
        raise
    finally:
        await close_iterator(events)


ROUTES = [open_context, close_context, interrupt, run_code]
