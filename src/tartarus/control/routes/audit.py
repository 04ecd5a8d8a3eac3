"""The audit log: look, verify, prove. The daemon's owner sees all of it, others what is of their tenant."""

from __future__ import annotations

import os

import msgspec
from litestar import get
from litestar.params import FromPath, FromQuery

from tartarus.control.api import ApiRequest
from tartarus.model.audit import AuditPage, AuditProof, AuditQuery, AuditVerification
from tartarus.model.errors import PermissionRefused


@get("/v1/audit", audit_refused="audit.list")
async def listing(
    request: ApiRequest,
    before: FromQuery[int | None] = None,
    limit: FromQuery[int] = 100,
    action: FromQuery[str] = "",
    target: FromQuery[str] = "",
    sandbox: FromQuery[str] = "",
    tenant: FromQuery[str] = "",
    decision: FromQuery[str] = "",
    since_ms: FromQuery[int] = 0,
) -> AuditPage:
    """Entries, the newest first."""
    query = AuditQuery(before, limit, action, target, sandbox, tenant, decision, since_ms)
    if not _is_owner(request):
        query = msgspec.structs.replace(query, tenant=request.peer.tenant)
    return await request.api.audit.find(query)


@get("/v1/audit/verification", audit="audit.verify")
async def verification(request: ApiRequest) -> AuditVerification:
    """What holds and what does not: every hash, the chain, the tree, every checkpoint, the policies in force."""
    _require_owner(request)
    found = await request.api.audit.verify()
    return msgspec.structs.replace(found, findings=(*found.findings, *await request.api.policies.findings(found)))


@get("/v1/audit/{sequence:int}/proof", audit="audit.prove")
async def proof(request: ApiRequest, sequence: FromPath[int]) -> AuditProof:
    """All that a stranger needs to check that an entry is in the log."""
    _require_owner(request)
    return await request.api.audit.prove(sequence)


def _is_owner(request: ApiRequest) -> bool:
    return request.peer.uid in {0, os.geteuid()}


def _require_owner(request: ApiRequest) -> None:
    if not _is_owner(request):
        raise PermissionRefused("only the daemon's owner may look at all of the audit log")


ROUTES = [listing, verification, proof]
