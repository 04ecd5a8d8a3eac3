"""`Module`: a WebAssembly module that the daemon keeps compiled. `Sandbox.create(module=…)` sends what it lacks."""

from __future__ import annotations

import builtins
import os

from tartarus.model.modules import ModuleInfo
from tartarus.sdk import library_calls as calls
from tartarus.sdk import modules
from tartarus.sdk.client import Client


class Module:
    """A module or component that is kept for you."""

    def __init__(self, info: ModuleInfo, client: Client) -> None:
        self._info = info
        self._client = client

    @classmethod
    def add(cls, module: str | os.PathLike[str] | bytes, *, client: Client | None = None) -> Module:
        """Have a file's module, or one given as bytes, compiled, unless it is. Raises ModuleRefused, FileFailed."""
        client = client or Client()
        return cls(modules.ensure(client.transport, modules.read(module)), client)

    @classmethod
    def list(cls, *, client: Client | None = None) -> builtins.list[Module]:
        """Your modules, the one that was used last first."""
        client = client or Client()
        return [cls(info, client) for info in client.transport.call(calls.modules())]

    @property
    def digest(self) -> str:
        """The sha256 of its bytes, in hex."""
        return self._info.digest

    @property
    def info(self) -> ModuleInfo:
        """What is known of it."""
        return self._info

    def remove(self: Module | str, *, client: Client | None = None) -> None:
        """Forget it; sandboxes that were made of it go on. Also ``Module.remove("3f2a…")``, by the digest's beginning.

        Raises ModuleNotFound.
        """
        if isinstance(self, str):
            (client or Client()).transport.call(calls.remove_module(self))
        else:
            (client or self._client).transport.call(calls.remove_module(self.digest))

    def __repr__(self) -> str:
        return f"<Module {self.digest[:12]}>"
