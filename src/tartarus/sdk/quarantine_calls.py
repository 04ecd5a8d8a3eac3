"""The API's operations on quarantined sandboxes, as data; see `calls`."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec

from tartarus.model.quarantine import Case, QuarantineRequest, ReleaseRequest
from tartarus.model.sandbox import ExecSpec, SandboxRecord
from tartarus.sdk.calls import encode
from tartarus.sdk.http import Call, target

T = TypeVar("T")


def _reads(kind: type[T]) -> Callable[[bytes], T]:
    return cast("Callable[[bytes], T]", msgspec.json.Decoder(cast("Any", kind)).decode)


def take(sandbox: str, request: QuarantineRequest) -> Call[Case]:
    """Quarantine a live sandbox."""
    return Call("POST", target("sandboxes", sandbox, "quarantine"), _reads(Case), encode(request))


def cases() -> Call[builtins.list[Case]]:
    """Every case."""
    return Call("GET", target("quarantine"), _reads(list[Case]))


def case(name: str) -> Call[Case]:
    """One case."""
    return Call("GET", target("quarantine", name), _reads(Case))


def release(name: str, request: ReleaseRequest) -> Call[SandboxRecord]:
    """Let it go on."""
    return Call("POST", target("quarantine", name, "release"), _reads(SandboxRecord), encode(request))


def destroy(name: str, *, keep_evidence: bool) -> Call[None]:
    """End it."""
    where = target("quarantine", name, keep_evidence="true" if keep_evidence else None)
    return Call("DELETE", where, lambda _: None)


def examine(name: str, command: ExecSpec | None) -> Call[SandboxRecord]:
    """See its evidence."""
    return Call("POST", target("quarantine", name, "examine"), _reads(SandboxRecord), encode({"command": command}))
