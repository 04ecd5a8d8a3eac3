"""Tartarus runs code that nobody vouches for: sandboxes, a coding agent and signed plans over one runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["AsyncSandbox", "Sandbox", "TartarusError", "__version__"]

if TYPE_CHECKING:
    from tartarus.model.errors import TartarusError
    from tartarus.sdk import AsyncSandbox, Sandbox


def __getattr__(name: str) -> object:
    """Import the client only when it is asked for: the command line's hot path never needs it."""
    if name in {"Sandbox", "AsyncSandbox"}:
        from tartarus import sdk

        return getattr(sdk, name)
    if name == "TartarusError":
        from tartarus.model.errors import TartarusError

        return TartarusError
    raise AttributeError(f"module 'tartarus' has no attribute {name!r}")
