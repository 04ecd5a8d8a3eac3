"""The async client has the blocking one's names, arguments and defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tartarus import AsyncSandbox, Sandbox, sdk

PAIRS = [
    (sdk.Sandbox, sdk.AsyncSandbox),
    (sdk.Client, sdk.AsyncClient),
    (sdk.Process, sdk.AsyncProcess),
    (sdk.Files, sdk.AsyncFiles),
    (sdk.CodeContext, sdk.AsyncCodeContext),
    (sdk.Template, sdk.AsyncTemplate),
    (sdk.Snapshot, sdk.AsyncSnapshot),
    (sdk.Policies, sdk.AsyncPolicies),
    (sdk.Secrets, sdk.AsyncSecrets),
    (sdk.Audit, sdk.AsyncAudit),
]


def public(cls: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(cls)
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
    }


@pytest.mark.parametrize(("blocking", "twin"), PAIRS)
def test_the_same_names(blocking, twin):
    assert public(blocking).keys() == public(twin).keys()


@pytest.mark.parametrize(("blocking", "twin"), PAIRS)
def test_the_same_arguments(blocking, twin):
    for name, member in public(blocking).items():
        if name == "opened" or isinstance(member, property):
            continue
        ours = inspect.signature(member).parameters
        theirs = inspect.signature(public(twin)[name]).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ], name


@pytest.mark.parametrize("cls", [cls for pair in PAIRS for cls in pair])
def test_everything_public_is_documented(cls):
    assert inspect.getdoc(cls)
    for name, member in public(cls).items():
        assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_every_exported_name_is_there():
    for name in sdk.__all__:
        assert getattr(sdk, name).__name__ == name
    assert Sandbox is sdk.Sandbox
    assert AsyncSandbox is sdk.AsyncSandbox
