"""What `tartarus doctor` says of the engines on this host."""

from __future__ import annotations

from tartarus.compat.opening import found, reopen
from tartarus.model.errors import TartarusError
from tartarus.node.doctor import Check


def engine_checks() -> list[Check]:
    """One finding for each engine whose socket is in its usual place; none is needed for anything."""
    return [_check(kind, socket) for kind, socket in found()]


def _check(kind: str, socket: str) -> Check:
    try:
        facts = reopen(kind, socket).facts()
    except TartarusError as error:
        return Check(f"engine {kind}", None, f"{socket}: {error.what}: {error.why}", error.fix)
    return Check(f"engine {kind}", True, f"{facts.isolation} at {socket}; to leave it: tartarus migrate {kind}")
