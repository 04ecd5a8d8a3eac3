"""The API's operations on policies, as data; see `calls`."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec

from tartarus.model.policies import DryRun, DryRunReport, PolicyVersion, PutPolicy, Rollback, check_policy_id
from tartarus.sdk.calls import encode
from tartarus.sdk.http import Call, target

T = TypeVar("T")


def _reads(kind: type[T]) -> Callable[[bytes], T]:
    return cast("Callable[[bytes], T]", msgspec.json.Decoder(cast("Any", kind)).decode)


def _one(policy: str, *more: str, **query: object) -> str:
    return target("policies", check_policy_id(policy), *more, **query)


def policies() -> Call[builtins.list[PolicyVersion]]:
    """Those in force."""
    return Call("GET", target("policies"), _reads(list[PolicyVersion]))


def policy(name: str, version: int | None) -> Call[PolicyVersion]:
    """One version."""
    return Call("GET", _one(name, version=version), _reads(PolicyVersion))


def history(name: str) -> Call[builtins.list[PolicyVersion]]:
    """Every version."""
    return Call("GET", _one(name, "history"), _reads(list[PolicyVersion]))


def diff(name: str, old: int, new: int | None) -> Call[str]:
    """What changed."""
    return Call("GET", _one(name, "diff", old=old, new=new), bytes.decode)


def put(name: str, request: PutPolicy) -> Call[PolicyVersion]:
    """A new version."""
    return Call("PUT", _one(name), _reads(PolicyVersion), encode(request))


def rollback(name: str, request: Rollback) -> Call[PolicyVersion]:
    """An earlier version once more."""
    return Call("POST", _one(name, "rollback"), _reads(PolicyVersion), encode(request))


def delete(name: str) -> Call[PolicyVersion]:
    """Not in force any more."""
    return Call("DELETE", _one(name), _reads(PolicyVersion))


def dry_run(request: DryRun) -> Call[DryRunReport]:
    """Try one."""
    return Call("POST", target("policy-dry-runs"), _reads(DryRunReport), encode(request))
