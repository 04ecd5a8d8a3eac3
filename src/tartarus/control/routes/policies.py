"""Policies of the host: list, show, change, roll back, compare, try. Everybody may look; the daemon's owner changes."""

from __future__ import annotations

import os

from litestar import Response, delete, get, post, put
from litestar.params import FromPath, FromQuery, JSONBody

from tartarus.control.api import ApiRequest
from tartarus.control.decode import Strict
from tartarus.model.errors import PermissionRefused
from tartarus.model.policies import DryRun, DryRunReport, PolicyVersion, PutPolicy, Rollback


@get("/v1/policies")
async def listing(request: ApiRequest) -> list[PolicyVersion]:
    """Those in force."""
    return await request.api.policies.list()


@get("/v1/policies/{policy_id:str}")
async def show(request: ApiRequest, policy_id: FromPath[str], version: FromQuery[int | None] = None) -> PolicyVersion:
    """One version, the newest if none is named."""
    return await request.api.policies.get(policy_id, version)


@get("/v1/policies/{policy_id:str}/history")
async def history(request: ApiRequest, policy_id: FromPath[str]) -> list[PolicyVersion]:
    """Every version, the newest first."""
    return await request.api.policies.history(policy_id)


@get("/v1/policies/{policy_id:str}/diff")
async def diff(
    request: ApiRequest, policy_id: FromPath[str], old: FromQuery[int], new: FromQuery[int | None] = None
) -> Response[str]:
    """What changed between two versions, as a unified diff."""
    return Response(await request.api.policies.diff(policy_id, old, new), media_type="text/x-diff")


@put("/v1/policies/{policy_id:str}", dto=Strict[PutPolicy], return_dto=None, audit_refused="policy.put")
async def change(request: ApiRequest, policy_id: FromPath[str], data: JSONBody[PutPolicy]) -> PolicyVersion:
    """A new version, in force when this is answered."""
    return await request.api.policies.put(policy_id, _owner(request), data)


@post(
    "/v1/policies/{policy_id:str}/rollback",
    dto=Strict[Rollback],
    return_dto=None,
    status_code=200,
    audit_refused="policy.rollback",
)
async def rollback(request: ApiRequest, policy_id: FromPath[str], data: JSONBody[Rollback]) -> PolicyVersion:
    """An earlier version once more."""
    return await request.api.policies.rollback(policy_id, _owner(request), data)


@delete("/v1/policies/{policy_id:str}", status_code=200, audit_refused="policy.delete")
async def remove(request: ApiRequest, policy_id: FromPath[str]) -> PolicyVersion:
    """Not in force any more."""
    return await request.api.policies.delete(policy_id, _owner(request))


@post("/v1/policy-dry-runs", dto=Strict[DryRun], return_dto=None, status_code=200, audit="policy.dry_run")
async def dry_run(request: ApiRequest, data: JSONBody[DryRun]) -> DryRunReport:
    """How recent requests would be judged; everybody's, so that only the owner may ask."""
    _owner(request)
    return await request.api.policies.dry_run(data)


def _owner(request: ApiRequest) -> str:
    if request.peer.uid not in {0, os.geteuid()}:
        raise PermissionRefused("only the daemon's owner may change policies")
    return request.peer.tenant


ROUTES = [listing, show, history, diff, change, rollback, remove, dry_run]
