"""WebAssembly modules for the WASM level: sent once, compiled by the daemon, named by their sha256 from then on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Iterator

from tartarus.model.errors import FileFailed, ModuleNotFound
from tartarus.model.modules import ModuleInfo
from tartarus.sdk import library_calls
from tartarus.sdk.async_transport import AsyncTransport
from tartarus.sdk.transport import Transport

_PART_BYTES = 256 * 1024


def read(module: str | os.PathLike[str] | bytes) -> bytes:
    """A module's bytes: of a file, or as they are. Raises FileFailed."""
    if isinstance(module, bytes):
        return module
    try:
        with open(module, "rb") as file:
            return file.read()
    except OSError as error:
        raise FileFailed(f"can't read {os.fspath(module)}", why=error.strerror or str(error)) from error


def digest_of(data: bytes) -> str:
    """What a module is called."""
    return hashlib.sha256(data).hexdigest()


def _parts(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), _PART_BYTES):
        yield data[start : start + _PART_BYTES]


def ensure(transport: Transport, data: bytes) -> ModuleInfo:
    """Have the daemon compile a module, unless it has. Raises ModuleRefused, IsolationUnavailable."""
    try:
        return transport.call(library_calls.module(digest_of(data)))
    except ModuleNotFound:
        upload = transport.call(library_calls.upload(), _parts(data))
        return transport.call(library_calls.add_module(upload.id))


async def ensure_async(transport: AsyncTransport, data: bytes) -> ModuleInfo:
    """The async twin of `ensure`."""

    async def parts() -> AsyncIterator[bytes]:
        for part in _parts(data):
            yield part

    try:
        return await transport.call(library_calls.module(digest_of(data)))
    except ModuleNotFound:
        upload = await transport.call(library_calls.upload(), parts())
        return await transport.call(library_calls.add_module(upload.id))
