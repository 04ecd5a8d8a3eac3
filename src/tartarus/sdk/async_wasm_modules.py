"""The async twin of `wasm_modules`."""

from __future__ import annotations

import builtins
import os

from tartarus.model.modules import ModuleInfo
from tartarus.sdk import library_calls as calls
from tartarus.sdk import modules
from tartarus.sdk.async_client import AsyncClient


class AsyncModule:
    """A module that is kept; see `Module`, whose names it has."""

    def __init__(self, info: ModuleInfo, client: AsyncClient) -> None:
        self._info = info
        self._client = client

    @classmethod
    async def add(cls, module: str | os.PathLike[str] | bytes, *, client: AsyncClient | None = None) -> AsyncModule:
        """Have a file's module, or one given as bytes, compiled, unless it is. Raises ModuleRefused, FileFailed."""
        client = client or AsyncClient()
        return cls(await modules.ensure_async(client.transport, modules.read(module)), client)

    @classmethod
    async def list(cls, *, client: AsyncClient | None = None) -> builtins.list[AsyncModule]:
        """Your modules, the one that was used last first."""
        client = client or AsyncClient()
        return [cls(info, client) for info in await client.transport.call(calls.modules())]

    @property
    def digest(self) -> str:
        """The sha256 of its bytes, in hex."""
        return self._info.digest

    @property
    def info(self) -> ModuleInfo:
        """What is known of it."""
        return self._info

    async def remove(self: AsyncModule | str, *, client: AsyncClient | None = None) -> None:
        """Forget it; sandboxes that were made of it go on. Also ``AsyncModule.remove("3f2a…")``.

        Raises ModuleNotFound.
        """
        if isinstance(self, str):
            await (client or AsyncClient()).transport.call(calls.remove_module(self))
        else:
            await (client or self._client).transport.call(calls.remove_module(self.digest))

    def __repr__(self) -> str:
        return f"<AsyncModule {self.digest[:12]}>"
