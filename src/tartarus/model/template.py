"""What a template promises: a root file system, defaults, and perhaps a warm runner."""

from __future__ import annotations

from typing import Literal

import msgspec

from tartarus.model.checks import require
from tartarus.model.sandbox import Resources
from tartarus.model.security import SecurityConfig

MAX_SPARES = 16


class WarmUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A warm runner: interpreter path inside the sandbox, and what it does before it parks.

    `imports`: modules. `script`: text of a program in the interpreter's language, run after them. A parked Python
    is cloned for each sandbox. Node.js and R can't be: `spares` of them, each in a sandbox made ahead, wait for one
    program each. They are started by the first name of `argv0`, from the template's PATH.
    """

    interpreter: str
    imports: tuple[str, ...] = ()
    script: str = ""
    argv0: tuple[str, ...] = ("python3", "python")
    kind: Literal["python", "node", "r"] = "python"
    spares: int = 1

    def __post_init__(self) -> None:
        require(bool(self.argv0) and all(self.argv0), "a warm-up names no command", "name one, as in argv0: [node]")
        require(0 <= self.spares <= MAX_SPARES, "spares is out of range", f"use 0 to {MAX_SPARES}")

    @property
    def is_cloned(self) -> bool:
        """Whether sandboxes get a clone of one parked interpreter, rather than one that was parked for them."""
        return self.kind == "python"


class RunAs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose processes a template's sandboxes run: ids as the sandbox sees them, 0 to 65535."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    name: str = "root"
    home: str = "/root"


class Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One template. `python_packages` are installed once into a cached virtual environment.

    `stop_signal`, `stop_grace_s` (seconds) and `security` are its sandboxes', as in SandboxSpec.
    """

    id: str
    name: str
    base: str = "host"
    python_packages: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = "/work"
    user: RunAs = RunAs()
    resources: Resources = Resources()
    warm_up: WarmUp | None = None
    description: str = ""
    stop_signal: str = ""
    stop_grace_s: float | None = None
    security: SecurityConfig | None = None
