"""The WASM level's `Runtime`: a container that can start nothing, with wasmtime warm in it.

A module is held by wasmtime first: its own memory, no system calls, the directories it was handed. Whoever finds a
hole there stands in a container-level sandbox, in which moreover no file may be executed. The guest's root file
system brings the runner (guest/wasm_runner.py) in the Python runner's place; the rest is the container level's own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec

from tartarus.model.errors import IsolationUnavailable
from tartarus.model.sandbox import Isolation
from tartarus.runtimes.base import Capabilities
from tartarus.runtimes.cgroups import Hierarchy
from tartarus.runtimes.confine import landlock
from tartarus.runtimes.container import layout
from tartarus.runtimes.container.runtime import ContainerRuntime
from tartarus.runtimes.idmap import IdMap

NOT_NATIVE = "runs WebAssembly modules only: no native program, shell or code context"


class WasmRuntime(ContainerRuntime):
    """Makes guests that run modules. Raises IsolationUnavailable where wasmtime is missing."""

    isolation = Isolation.WASM
    best = msgspec.structs.replace(
        ContainerRuntime.best, contexts=False, runs="WebAssembly modules and components", missing=(NOT_NATIVE,)
    )
    # The agent is executed from a sealed memory file, which is no path.
    rules = tuple(
        landlock.PathRule(rule.path, rule.access & ~landlock.Access.EXECUTE, rule.file)
        for rule in layout.LANDLOCK_RULES
    )

    def __init__(self, state_dir: Path, hierarchy: Hierarchy | None, id_map: IdMap) -> None:
        engine_package()
        super().__init__(state_dir, hierarchy, id_map)

    def capabilities(self) -> Capabilities:
        """The container level's, for modules."""
        held = super().capabilities()
        return msgspec.structs.replace(held, missing=(*held.missing, NOT_NATIVE))


def engine_package() -> Path:
    """Where the wasmtime package lies on this host, found without loading it. Raises IsolationUnavailable."""
    found = importlib.util.find_spec("wasmtime")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    place = next((Path(path) for path in places if any(Path(path).glob("linux-*/_libwasmtime.so"))), None)
    if place is None:
        raise IsolationUnavailable(
            "the WASM level needs wasmtime",
            why="it is not installed" if not places else "its package has no library for this machine",
            fix="pip install wasmtime (there are wheels for x86_64 and aarch64 with glibc)",
        )
    return place
