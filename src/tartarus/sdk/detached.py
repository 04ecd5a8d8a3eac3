"""Two calls for the command line's short way, with plain JSON in and out, made when they are needed."""

from __future__ import annotations

from typing import Any

import msgspec

from tartarus.model.sandbox import SandboxSpec
from tartarus.sdk import calls
from tartarus.sdk.client import Client


def create(spec: dict[str, Any]) -> dict[str, Any]:
    """Make a sandbox from a spec's JSON; returns its record's."""
    record = Client().transport.call(calls.create(msgspec.convert(spec, SandboxSpec)))
    shown: dict[str, Any] = msgspec.to_builtins(record)
    return shown


def send_signal(sandbox: str, number: int) -> None:
    """Signal a sandbox's main command."""
    Client().transport.call(calls.send_signal(sandbox, number))
