"""WebAssembly modules that are kept compiled, as the API speaks of them."""

from __future__ import annotations

import msgspec


class AddModule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A WebAssembly module or component that was uploaded, to be compiled and kept for its sandboxes."""

    upload: str


class ModuleInfo(msgspec.Struct, frozen=True):
    """A module that sandboxes can be made of, by its sha256. `kind`: module or component.

    `disk_bytes`: what it takes with all its compiled code. `used_at`: when it was last used, in Unix seconds, to the
    hour. Not `ready`: it was compiled for another wasmtime or processor, and is to be sent again before its next use.
    """

    digest: str
    size_bytes: int
    kind: str
    compile_ms: float
    disk_bytes: int = 0
    used_at: float = 0.0
    ready: bool = True
