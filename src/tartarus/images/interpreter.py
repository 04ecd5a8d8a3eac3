"""Which Python a template runs: the one its command `python3` would find, if it is new enough.

A sandbox sees the host's /usr read-only, so that is where we look. Where it has none, the interpreter that
runs Tartarus serves: its installation is then shown read-only at its own path.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec

OLDEST = (3, 9)
_CANDIDATES = ("/usr/local/bin/python3", "/usr/bin/python3")
_PROBE_TIMEOUT_S = 30
_PROBE = """
import importlib.util, json, sys, sysconfig
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "prefix": sys.base_prefix,
    "abi": [sys.implementation.cache_tag, sysconfig.get_config_var("EXT_SUFFIX") or "",
            importlib.util.MAGIC_NUMBER.hex(), sysconfig.get_platform()],
}))
"""


class Interpreter(msgspec.Struct, frozen=True):
    """A Python that sandboxes can run.

    `path`: where it is, on the host and in the sandbox alike. `abi`: what compiled modules and compiled
    bytecode depend on. `bind`: a directory that must be shown in the sandbox for it to run, or nothing.
    """

    path: str
    version: tuple[int, int, int]
    abi: tuple[str, ...]
    bind: str = ""

    @property
    def lib_name(self) -> str:
        """The directory below `lib` where this version's modules are, such as ``python3.11``."""
        return f"python{self.version[0]}.{self.version[1]}"


def _visible(path: str) -> bool:
    """Whether the program at `path` is found in the sandbox too: it, and what it links to, is below /usr."""
    return os.path.realpath(path).startswith("/usr/")


def examine(path: str) -> Interpreter | None:
    """Ask the interpreter at `path` what it is; None when it does not run or is older than OLDEST."""
    try:
        # -I and -S: nothing of the user's runs, neither from the environment nor from a site directory.
        done = subprocess.run(
            [path, "-I", "-S", "-c", _PROBE], capture_output=True, timeout=_PROBE_TIMEOUT_S, check=True, cwd="/"
        )
        facts = json.loads(done.stdout)
        major, minor, micro = facts["version"]
        found = Interpreter(path=path, version=(major, minor, micro), abi=tuple(facts["abi"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None
    return found if found.version[:2] >= OLDEST else None


@functools.cache
def find_interpreter(candidates: tuple[str, ...] = _CANDIDATES) -> Interpreter:
    """The interpreter that sandboxes run; looked for once."""
    for path in candidates:
        found = examine(path) if _visible(path) else None
        if found is not None:
            return found
    return own_interpreter()


def own_interpreter() -> Interpreter:
    """The interpreter that runs Tartarus, outside any virtual environment."""
    prefix = Path(sys.base_prefix).resolve()
    path = prefix / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = examine(str(path))
    if found is None:
        found = examine(os.path.realpath(sys.executable))
    if found is None:
        raise RuntimeError(f"{sys.executable} can't run itself")
    outside = not str(prefix).startswith("/usr/") and str(prefix) != "/usr"
    return msgspec.structs.replace(found, bind=str(prefix) if outside else "")
