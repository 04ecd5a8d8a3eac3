"""How the host words a WASM-level command: the runner that reads it is wasm_runner.py."""

from __future__ import annotations

import json
from collections.abc import Sequence

HOME = "/opt/tartarus/wasm"
ARGV0 = f"{HOME}/run"
MODULE_FORM, COMPONENT_FORM = b"\0asm\1\0\0\0", b"\0asm\r\0\1\0"
MOST_MODULE_BYTES = 64 * 1024**2
PROBE = MODULE_FORM + bytes.fromhex("01040160000003020100070a01065f737461727400000a040102000b")
"""The smallest command: (module (func (export "_start")))."""


def command_line(
    argv: Sequence[str],
    *,
    loaded: bool,
    directories: Sequence[str],
    memory_bytes: int,
    fuel: int | None = None,
    deadline_s: float | None = None,
) -> tuple[str, ...]:
    """What the runner is sent for a command: see its `Job`. `deadline_s` interrupts only what runs on fuel."""
    options = {
        "loaded": loaded, "dirs": list(directories), "memory_bytes": memory_bytes, "fuel": fuel,
        "deadline_s": deadline_s,
    }  # fmt: skip
    return (ARGV0, json.dumps(options, separators=(",", ":")), *argv)


def compile_line(*, metered: bool) -> tuple[str, ...]:
    """What has the runner compile its standard input to its standard output."""
    return (ARGV0, json.dumps({"compile": "metered" if metered else "plain"}), "the module")
