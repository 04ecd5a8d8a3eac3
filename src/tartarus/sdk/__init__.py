"""The Python client: `Sandbox` and its async twin `AsyncSandbox`.

Everything it does goes through the daemon's API, so what works here works over the network. Names are imported when
they are first used: the command line's hot path takes single modules and must not pay for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tartarus.sdk.async_audit import AsyncAudit
    from tartarus.sdk.async_client import AsyncClient
    from tartarus.sdk.async_contexts import AsyncCodeContext
    from tartarus.sdk.async_files import AsyncFiles
    from tartarus.sdk.async_lamentations import AsyncLamentations
    from tartarus.sdk.async_policies import AsyncPolicies
    from tartarus.sdk.async_process import AsyncProcess
    from tartarus.sdk.async_quarantine import AsyncQuarantine
    from tartarus.sdk.async_sandbox import AsyncSandbox
    from tartarus.sdk.async_seccomp import AsyncSeccomp
    from tartarus.sdk.async_secrets import AsyncSecrets
    from tartarus.sdk.async_snapshots import AsyncSnapshot
    from tartarus.sdk.async_templates import AsyncTemplate
    from tartarus.sdk.async_wasm_modules import AsyncModule
    from tartarus.sdk.audit import Audit
    from tartarus.sdk.client import Client
    from tartarus.sdk.contexts import CodeContext
    from tartarus.sdk.files import Files
    from tartarus.sdk.forks import Forks
    from tartarus.sdk.lamentations import Lamentations
    from tartarus.sdk.policies import Policies
    from tartarus.sdk.process import Process
    from tartarus.sdk.quarantine import Quarantine
    from tartarus.sdk.results import (
        CellError,
        CellResult,
        CodeFailed,
        CodeResult,
        CommandFailed,
        CommandResult,
        CommandTimedOut,
        LevelReport,
        LogEntry,
        OutputChunk,
        Version,
    )
    from tartarus.sdk.sandbox import Sandbox
    from tartarus.sdk.seccomp import Seccomp
    from tartarus.sdk.secrets import Secrets
    from tartarus.sdk.snapshots import Snapshot
    from tartarus.sdk.templates import Template
    from tartarus.sdk.wasm_modules import Module

__all__ = [
    "AsyncAudit",
    "AsyncClient",
    "AsyncCodeContext",
    "AsyncFiles",
    "AsyncLamentations",
    "AsyncModule",
    "AsyncPolicies",
    "AsyncProcess",
    "AsyncQuarantine",
    "AsyncSandbox",
    "AsyncSeccomp",
    "AsyncSecrets",
    "AsyncSnapshot",
    "AsyncTemplate",
    "Audit",
    "CellError",
    "CellResult",
    "Client",
    "CodeContext",
    "CodeFailed",
    "CodeResult",
    "CommandFailed",
    "CommandResult",
    "CommandTimedOut",
    "Files",
    "Forks",
    "Lamentations",
    "LevelReport",
    "LogEntry",
    "Module",
    "OutputChunk",
    "Policies",
    "Process",
    "Quarantine",
    "Sandbox",
    "Seccomp",
    "Secrets",
    "Snapshot",
    "Template",
    "Version",
]
_MODULES = {
    "AsyncAudit": "async_audit",
    "Audit": "audit",
    "AsyncClient": "async_client",
    "AsyncCodeContext": "async_contexts",
    "AsyncFiles": "async_files",
    "AsyncLamentations": "async_lamentations",
    "AsyncModule": "async_wasm_modules",
    "AsyncProcess": "async_process",
    "AsyncPolicies": "async_policies",
    "AsyncSeccomp": "async_seccomp",
    "AsyncSecrets": "async_secrets",
    "AsyncQuarantine": "async_quarantine",
    "AsyncSandbox": "async_sandbox",
    "AsyncSnapshot": "async_snapshots",
    "AsyncTemplate": "async_templates",
    "Client": "client",
    "CodeContext": "contexts",
    "Files": "files",
    "Lamentations": "lamentations",
    "Policies": "policies",
    "Seccomp": "seccomp",
    "Secrets": "secrets",
    "Forks": "forks",
    "Module": "wasm_modules",
    "Process": "process",
    "Quarantine": "quarantine",
    "Sandbox": "sandbox",
    "Snapshot": "snapshots",
    "Template": "templates",
}


def __getattr__(name: str) -> object:
    """Import what is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'tartarus.sdk' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"tartarus.sdk.{_MODULES.get(name, 'results')}"), name)
