"""The Python client: `Sandbox` and its async twin `AsyncSandbox`.

Everything it does goes through the daemon's API, so what works here works over the network. Names are imported when
they are first used: the command line's hot path takes single modules and must not pay for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tartarus.sdk.async_client import AsyncClient
    from tartarus.sdk.async_contexts import AsyncCodeContext
    from tartarus.sdk.async_files import AsyncFiles
    from tartarus.sdk.async_process import AsyncProcess
    from tartarus.sdk.async_sandbox import AsyncSandbox
    from tartarus.sdk.async_snapshots import AsyncSnapshot
    from tartarus.sdk.async_templates import AsyncTemplate
    from tartarus.sdk.async_wasm_modules import AsyncModule
    from tartarus.sdk.client import Client
    from tartarus.sdk.contexts import CodeContext
    from tartarus.sdk.files import Files
    from tartarus.sdk.forks import Forks
    from tartarus.sdk.process import Process
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
    from tartarus.sdk.snapshots import Snapshot
    from tartarus.sdk.templates import Template
    from tartarus.sdk.wasm_modules import Module

__all__ = [
    "AsyncClient",
    "AsyncCodeContext",
    "AsyncFiles",
    "AsyncModule",
    "AsyncProcess",
    "AsyncSandbox",
    "AsyncSnapshot",
    "AsyncTemplate",
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
    "LevelReport",
    "LogEntry",
    "Module",
    "OutputChunk",
    "Process",
    "Sandbox",
    "Snapshot",
    "Template",
    "Version",
]
_MODULES = {
    "AsyncClient": "async_client",
    "AsyncCodeContext": "async_contexts",
    "AsyncFiles": "async_files",
    "AsyncModule": "async_wasm_modules",
    "AsyncProcess": "async_process",
    "AsyncSandbox": "async_sandbox",
    "AsyncSnapshot": "async_snapshots",
    "AsyncTemplate": "async_templates",
    "Client": "client",
    "CodeContext": "contexts",
    "Files": "files",
    "Forks": "forks",
    "Module": "wasm_modules",
    "Process": "process",
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
