"""Quarantine: who is held, why, with what evidence; release, destroy, examine. For the daemon's owner.

Tenants see the cases of their own sandboxes, and may have one of these quarantined; what becomes of it is not theirs.
"""

from __future__ import annotations

import os

import msgspec
from litestar import delete, get, post
from litestar.params import FromPath, FromQuery, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.errors import CaseNotFound, PermissionRefused
from tartarus.model.quarantine import Case, QuarantineRequest, ReleaseRequest
from tartarus.model.sandbox import ExecSpec, SandboxRecord


class ExamineRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Look at the evidence, from a sandbox of its own; with `command`, that sandbox is for it alone."""

    command: ExecSpec | None = None


@post(
    "/v1/sandboxes/{sandbox_id:str}/quarantine",
    dto=Strict[QuarantineRequest],
    return_dto=None,
    status_code=201,
    audit_refused="quarantine.enter",
)
async def take(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[QuarantineRequest]) -> Case:
    """Freeze a live sandbox of the caller's, and keep it as evidence."""
    sandbox = await request.live(sandbox_id, wake=False)
    return await request.api.quarantine.take(sandbox, data.reason, data.detail, by=request.peer.tenant)


@get("/v1/quarantine")
async def listing(request: ApiRequest) -> list[Case]:
    """The cases, newest first."""
    cases = request.api.quarantine.list()
    return cases if _is_owner(request) else [case for case in cases if case.tenant == request.peer.tenant]


@get("/v1/quarantine/{case_id:str}")
async def show(request: ApiRequest, case_id: FromPath[str]) -> Case:
    """One case, by its id or its sandbox's."""
    case = request.api.quarantine.get(case_id)
    if not _is_owner(request) and case.tenant != request.peer.tenant:
        raise CaseNotFound(f"no quarantined sandbox {case_id!r}")
    return case


@post(
    "/v1/quarantine/{case_id:str}/release",
    dto=Strict[ReleaseRequest],
    return_dto=None,
    status_code=200,
    audit_refused="quarantine.release",
)
async def release(request: ApiRequest, case_id: FromPath[str], data: JSONBody[ReleaseRequest]) -> SandboxRecord:
    """Let it go on."""
    return await request.api.quarantine.release(case_id, _owner(request), data)


@delete("/v1/quarantine/{case_id:str}", audit_refused="quarantine.destroy")
async def destroy(request: ApiRequest, case_id: FromPath[str], keep_evidence: FromQuery[bool] = False) -> None:
    """End it, and remove its evidence."""
    await request.api.quarantine.destroy(case_id, _owner(request), keep_evidence=keep_evidence)


@post(
    "/v1/quarantine/{case_id:str}/examine",
    dto=Strict[ExamineRequest],
    return_dto=None,
    status_code=201,
    audit_refused="quarantine.examine",
)
async def examine(request: ApiRequest, case_id: FromPath[str], data: JSONBody[ExamineRequest]) -> SandboxRecord:
    """A fresh sandbox that sees the evidence at `/evidence`."""
    _owner(request)
    sandbox = await request.api.quarantine.examine(case_id, request.peer.tenant, data.command)
    sandbox.detach()
    return sandbox.record


def _is_owner(request: ApiRequest) -> bool:
    return request.peer.uid in {0, os.geteuid()}


def _owner(request: ApiRequest) -> str:
    if not _is_owner(request):
        raise PermissionRefused("only the daemon's owner decides what becomes of a quarantined sandbox")
    return request.peer.tenant


ROUTES = [take, listing, show, release, destroy, examine]
