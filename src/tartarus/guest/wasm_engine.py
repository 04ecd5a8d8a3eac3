"""What the WASM level's runner has wasmtime do: compile, load, link and start modules and components.

Runs inside the sandbox, on the host's Python (3.9 or later); nothing of Tartarus is imported here but this file.
"""

from __future__ import annotations

import os
from typing import Any

import wasmtime
import wasmtime.component as components

MODULE_FORM, COMPONENT_FORM = b"\0asm\1\0\0\0", b"\0asm\r\0\1\0"
MOST_MODULE_BYTES = 64 * 1024 * 1024
_READ_BYTES = 1024 * 1024

# (module (import "wasi_snapshot_preview1" "fd_write" (func $w (param i32 i32 i32 i32) (result i32)))
#         (import "wasi_snapshot_preview1" "proc_exit" (func $x (param i32))) (memory (export "memory") 1)
#         (func (export "_start") (drop (call $w (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 8)))
#                                 (call $x (i32.const 0))))
REHEARSAL = bytes.fromhex(
    "0061736d0100000001100360047f7f7f7f017f60017f0060000002460216776173695f736e617073686f745f70726576696577310866"
    "645f7772697465000016776173695f736e617073686f745f70726576696577310970726f635f65786974000103020102050301000107"
    "1302066d656d6f72790200065f737461727400020a13011100410141004100410810001a410010010b000e046e616d65010702000177"
    "010178"
)


class NotRun(Exception):
    """A file that is no program; the argument says why."""


class Trapped(Exception):
    """It did what it may not; the argument says what, and where."""


class Failed(Exception):
    """The component's run said that it failed."""


def new_engine(*, metered: bool, parallel: bool) -> wasmtime.Engine:
    """An engine. `metered`: its code counts fuel and can be interrupted. `parallel`: compiles on all CPUs.

    Compiled code depends on these settings: whoever changes them raises FORMAT in node/modules.py.
    """
    config = wasmtime.Config()
    config.parallel_compilation = parallel
    config.consume_fuel = metered
    config.epoch_interruption = metered
    return wasmtime.Engine(config)


def is_component(data: bytes) -> bool:
    """Whether these bytes are a component's. Raises NotRun unless they are that or a module's: text is not compiled."""
    if data[:8] == MODULE_FORM:
        return False
    if data[:8] == COMPONENT_FORM:
        return True
    raise NotRun("it is no WebAssembly module or component" + (", but text" if data[:1] == b"(" else ""))


def compiled(engine: wasmtime.Engine, data: bytes) -> wasmtime.Module | components.Component:
    """Compile a module or component. Raises NotRun, WasmtimeError."""
    return components.Component(engine, data) if is_component(data) else wasmtime.Module(engine, data)


def read_module(file: int) -> bytes:
    """All of an open file. Raises NotRun for one that is no module, as soon as that can be told."""
    parts: list[bytes] = []
    size = 0
    while True:
        data = os.read(file, _READ_BYTES)
        if not data:
            break
        parts.append(data)
        size += len(data)
        if size > MOST_MODULE_BYTES:
            raise NotRun(f"it is larger than {MOST_MODULE_BYTES >> 20} MiB")
        if size - len(data) < len(MODULE_FORM) <= size:
            is_component(b"".join(parts))
    whole = b"".join(parts)
    is_component(whole)
    return whole


class Loaded:
    """A compiled module or component with what it takes to start it."""

    def __init__(self, engine: wasmtime.Engine, code: Any, *, inert: bool = False) -> None:
        """`inert`: instantiating it runs none of its code."""
        self.engine = engine
        self.inert = inert
        self._code = code
        self._linker: Any
        if isinstance(code, components.Component):
            self._linker = components.Linker(engine)
            self._linker.add_wasip2()
        else:
            self._linker = wasmtime.Linker(engine)
            self._linker.define_wasi()

    def enter(self, store: wasmtime.Store) -> Any:
        """Instantiate it; returns its entry point. Raises NotRun and WasmtimeError for what can't be started, Trap."""
        is_module = isinstance(self._code, wasmtime.Module)
        return self._module_entry(store) if is_module else self._component_entry(store)

    def start(self, store: wasmtime.Store, entry: Any = None) -> None:
        """Call its entry point, instantiating it if it is not; returns if that returns.

        Raises ExitTrap, Trap, Trapped, Failed, and what `enter` raises.
        """
        if entry is None:
            entry = self.enter(store)
        try:
            result = entry(store)
        except wasmtime.ExitTrap:
            raise
        except wasmtime.WasmtimeError as failure:  # how a component's traps are told
            raise Trapped(str(failure)) from None
        if getattr(result, "tag", None) == "err":
            raise Failed

    def _module_entry(self, store: wasmtime.Store) -> Any:
        entry = self._linker.instantiate(store, self._code).exports(store).get("_start")
        if not isinstance(entry, wasmtime.Func):
            raise NotRun("it exports no _start: it is a library, not a command")
        return entry

    def _component_entry(self, store: wasmtime.Store) -> Any:
        instance = self._linker.instantiate(store, self._code)
        names = [name for name in self._code.type.exports(self.engine) if name.startswith("wasi:cli/run@0.2")]
        place = instance.get_export_index(store, names[0]) if names else None
        function = place and instance.get_export_index(store, "run", place)
        entry = function and instance.get_func(store, function)
        if not entry:
            raise NotRun("it exports no wasi:cli/run: it is a library, not a command")
        return entry


def load(home: str, engine: wasmtime.Engine) -> Loaded | None:
    """The sandbox's own module, which the host had compiled before; None where it has none."""
    kinds: Any = (("module", wasmtime.Module), ("component", components.Component))
    for name, kind in kinds:
        for suffix, metered in ((".metered.cwasm", True), (".cwasm", False)):
            path = f"{home}/{name}{suffix}"
            if os.path.exists(path):
                own = new_engine(metered=True, parallel=False) if metered else engine
                inert = kind is wasmtime.Module and not metered and not has_start(f"{home}/source.wasm")
                return Loaded(own, kind.deserialize_file(own, path), inert=inert)
    return None


def has_start(path: str) -> bool:
    """Whether a module's file, which was compiled, has a start section: code that is run when it is instantiated."""
    with open(path, "rb") as file:
        file.seek(len(MODULE_FORM))
        while True:
            section = file.read(1)
            if section in {b"", b"\x08"}:
                return section != b""
            size = shift = 0
            while True:
                byte = file.read(1)[0]
                size |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            file.seek(size, os.SEEK_CUR)
