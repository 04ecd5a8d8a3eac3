"""The fixtures of the client's tests."""

from __future__ import annotations

from tests.sdk.service import home, levels, sandbox

__all__ = ["home", "levels", "sandbox"]
