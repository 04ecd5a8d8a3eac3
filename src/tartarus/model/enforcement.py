"""Limits that were broken, as enforcement (Erinyes) sees them."""

from __future__ import annotations

from enum import Enum

import msgspec


class Fury(str, Enum):
    """Who saw it: Alecto keeps the time, Tisiphone resources, Megaera policies and contracts."""

    ALECTO = "alecto"
    TISIPHONE = "tisiphone"
    MEGAERA = "megaera"


class ViolationKind(str, Enum):
    """Which limit."""

    TIME = "time"
    MEMORY = "memory"
    PIDS = "pids"
    CPU = "cpu"
    DISK = "disk"
    OUTPUT = "output"
    NETWORK = "network"
    POLICY = "policy"
    SYSCALL = "syscall"


FURIES = {
    ViolationKind.TIME: Fury.ALECTO,
    ViolationKind.NETWORK: Fury.MEGAERA,
    ViolationKind.POLICY: Fury.MEGAERA,
    ViolationKind.SYSCALL: Fury.MEGAERA,
}
"""Whose each kind is; the others are Tisiphone's."""


class Violation(msgspec.Struct, frozen=True):
    """`count` times the same at once, by the kernel's own counter. `action`: what the policy has done about it."""

    sandbox_id: str
    kind: ViolationKind
    count: int
    action: str
    timestamp: float
    message: str = ""

    @property
    def fury(self) -> Fury:
        """Who saw it."""
        return FURIES.get(self.kind, Fury.TISIPHONE)
