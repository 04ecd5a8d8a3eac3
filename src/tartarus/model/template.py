"""What a template promises: a root file system, defaults, and perhaps a warm runner."""

from __future__ import annotations

import msgspec

from tartarus.model.sandbox import Resources


class WarmUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A warm runner: interpreter path inside the sandbox, and what it does before it parks.

    `imports`: modules. `script`: text of a program in the interpreter's language, run after them.
    """

    interpreter: str
    imports: tuple[str, ...] = ()
    script: str = ""
    argv0: tuple[str, ...] = ("python3", "python")


class RunAs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose processes a template's sandboxes run: ids as the sandbox sees them, 0 to 65535."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    name: str = "root"
    home: str = "/root"


class Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One template. `python_packages` are installed once into a cached virtual environment."""

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
