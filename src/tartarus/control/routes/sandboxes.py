"""Sandboxes: create, list, show, signal, pause, resume, stats, wait, end."""

from __future__ import annotations

import asyncio
import signal as signals
from typing import Annotated

import msgspec
from litestar import Response, delete, get, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict, nearest
from tartarus.control.mounting import with_links_followed
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Reason, SandboxRecord, SandboxSpec, Stats
from tartarus.model.states import State

MAX_PAGE = 1000


class Page(msgspec.Struct, frozen=True):
    """Part of a listing, newest first; `next` is the cursor of the following part, null at the end."""

    items: list[SandboxRecord]
    next: str | None


class SignalRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A signal for the main command, by number."""

    signal: int

    def __post_init__(self) -> None:
        if not 1 <= self.signal <= signals.SIGRTMAX:
            raise InvalidRequest(f"{self.signal} is not a signal", fix=f"use 1 to {int(signals.SIGRTMAX)}; 15 is TERM")


@post("/v1/sandboxes", dto=Strict[SandboxSpec], return_dto=None)
async def create(request: ApiRequest, data: JSONBody[SandboxSpec]) -> Response[SandboxRecord]:
    """Make a sandbox and start its command, if it has one."""
    spec = await with_links_followed(data, request.api.settings.state_dir)
    sandbox = await request.api.node.create(request.peer.tenant, spec)
    sandbox.detach()
    record = sandbox.record
    return Response(record, status_code=201, headers={"location": f"/v1/sandboxes/{record.id}"})


@get("/v1/sandboxes")
async def listing(
    request: ApiRequest,
    states: Annotated[list[str] | None, QueryParameter(name="state")] = None,
    label: FromQuery[list[str] | None] = None,
    name: FromQuery[str | None] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = 100,
    cursor: FromQuery[str | None] = None,
) -> Page:
    """The caller's sandboxes, newest first. `state` and `label` (``key=value``) may be given several times."""
    items, following = await request.api.store.list(
        request.peer.tenant,
        states=None if states is None else [_state(word) for word in states],
        labels=_labels(label or []),
        name=name,
        limit=limit,
        cursor=cursor,
    )
    return Page(items=items, next=following)


@get("/v1/sandboxes/{sandbox_id:str}")
async def show(request: ApiRequest, sandbox_id: FromPath[str]) -> SandboxRecord:
    """One sandbox, by id, name or unique id prefix."""
    return await request.api.store.get(request.peer.tenant, sandbox_id)


@delete("/v1/sandboxes/{sandbox_id:str}", audit="sandbox.kill")
async def end(request: ApiRequest, sandbox_id: FromPath[str]) -> None:
    """End the whole sandbox; answers once it is gone. One that has ended already is fine."""
    _, sandbox = await request.api.find(request.peer.tenant, sandbox_id)
    if sandbox is not None:
        await sandbox.kill(reason=Reason.USER_REQUEST)


@post(
    "/v1/sandboxes/{sandbox_id:str}/signal",
    dto=Strict[SignalRequest],
    return_dto=None,
    status_code=204,
    audit="sandbox.signal",
)
async def send_signal(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[SignalRequest]) -> None:
    """Deliver a signal to the main command."""
    await (await request.live(sandbox_id)).kill(signal=data.signal)


@post("/v1/sandboxes/{sandbox_id:str}/pause", status_code=200, audit="sandbox.pause")
async def pause(request: ApiRequest, sandbox_id: FromPath[str]) -> SandboxRecord:
    """Freeze every process of the sandbox."""
    sandbox = await request.live(sandbox_id, wake=False)
    await sandbox.pause()
    return sandbox.record


@post("/v1/sandboxes/{sandbox_id:str}/resume", status_code=200, audit="sandbox.resume")
async def resume(request: ApiRequest, sandbox_id: FromPath[str]) -> SandboxRecord:
    """Let a paused sandbox go on."""
    sandbox = await request.live(sandbox_id, wake=False)
    await sandbox.resume()
    return sandbox.record


@get("/v1/sandboxes/{sandbox_id:str}/stats")
async def stats(request: ApiRequest, sandbox_id: FromPath[str]) -> Stats:
    """What the sandbox uses now."""
    return await (await request.live(sandbox_id, wake=False)).stats()


@get("/v1/sandboxes/{sandbox_id:str}/wait")
async def wait(
    request: ApiRequest, sandbox_id: FromPath[str], timeout_s: Annotated[float | None, QueryParameter(ge=0)] = None
) -> SandboxRecord:
    """The record once the sandbox has ended, or as it is after `timeout_s` seconds."""
    record, sandbox = await request.api.find(request.peer.tenant, sandbox_id)
    if sandbox is None:
        return record
    try:
        return await request.unless_gone(asyncio.wait_for(sandbox.wait(), timeout_s))
    except TimeoutError:
        return sandbox.record


def _state(word: str) -> State:
    try:
        return State(word)
    except ValueError:
        raise InvalidRequest(
            f"there is no state {word!r}", fix=nearest(word, [state.value for state in State])
        ) from None


def _labels(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InvalidRequest(f"{pair!r} is not a label", fix="write label=key=value")
        found[key] = value
    return found


ROUTES = [create, listing, show, end, send_signal, pause, resume, stats, wait]
