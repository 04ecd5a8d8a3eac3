"""When a request is for the WASM level: what is asked for is a module, or a file that is named as one."""

from __future__ import annotations

from collections.abc import Mapping

from tartarus.model.errors import InvalidRequest, IsolationUnavailable, Unsupported
from tartarus.model.sandbox import Isolation, SandboxSpec

LEAST_PIDS = 12


def runs_module(spec: SandboxSpec) -> bool:
    """Whether this level was asked for, by name, with a module that was sent or, with `auto`, by a file's name."""
    named = spec.command is not None and spec.command.argv[0].endswith(".wasm")
    by_name = named and spec.isolation is Isolation.AUTO
    return spec.isolation is Isolation.WASM or spec.wasm is not None or by_name


def choose(
    spec: SandboxSpec, unavailable: Mapping[Isolation, str], floors: Mapping[str, Isolation]
) -> tuple[Isolation, str]:
    """The level and the reason; `floors` by whose they are: "host" or "template". Raises as `selection.choose`."""
    if spec.isolation not in {Isolation.AUTO, Isolation.WASM}:
        raise Unsupported(
            f"a WebAssembly module runs at the wasm level, not at {spec.isolation.value}",
            fix="leave --isolation out, or use --isolation wasm",
        )
    for whose, floor in floors.items():
        # Its guests stand inside the container level's walls, and inside no stronger ones.
        if floor in {Isolation.GVISOR, Isolation.MICROVM}:
            raise Unsupported(
                f"this {whose} takes the {floor.value} level or a stronger one, not wasm",
                why="its administrator set that floor" if whose == "host" else "its author set that floor",
            )
    if spec.resources.pids is not None and spec.resources.pids < LEAST_PIDS:
        raise InvalidRequest(
            f"pids is below {LEAST_PIDS}", why="at the wasm level our own processes and threads take up to 11",
            fix=f"give at least {LEAST_PIDS}",
        )  # fmt: skip
    why = unavailable.get(Isolation.WASM)
    if why is not None:
        raise IsolationUnavailable(
            "this host can't give isolation 'wasm'", why=why, fix="tartarus doctor shows how to get it"
        )
    asked = spec.isolation is Isolation.WASM
    return Isolation.WASM, "asked for" if asked else "the command is a WebAssembly module"
