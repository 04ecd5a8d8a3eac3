"""How soon a module's first instruction runs. The module itself reads the clock, before anything else it does."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import Row, Timed, alternate
from benchmarks.node_benches import running_node
from tartarus.model.sandbox import ExecSpec, SandboxSpec, Wasm
from tartarus.node.commands import Process
from tartarus.node.service import Node

# (module (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
#         (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
#         (memory (export "memory") 1) (data (i32.const 0) "\20\00\00\00\08\00\00\00")
#         (func (export "_start") (drop (call $clock (i32.const 0) (i64.const 1) (i32.const 32)))
#                                 (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))
CLOCK = bytes.fromhex(
    "0061736d0100000001130360037f7e7f017f60047f7f7f7f017f600000024b0216776173695f736e617073686f745f70726576696577"
    "310e636c6f636b5f74696d655f676574000016776173695f736e617073686f745f70726576696577310866645f777269746500010302"
    "01020503010001071302066d656d6f72790200065f737461727400020a1801160041004201412010001a410141004101411010011a0b"
    "0b0e010041000b0820000000080000000016046e616d65010f020005636c6f636b01057772697465"
)
_PAUSE_S = 0.12
_PLAIN = """
import sys, wasmtime
engine = wasmtime.Engine()
module = wasmtime.Module.deserialize_file(engine, sys.argv[1])
linker = wasmtime.Linker(engine)
linker.define_wasi()
store = wasmtime.Store(engine)
wasi = wasmtime.WasiConfig()
wasi.inherit_stdout()
store.set_wasi(wasi)
linker.instantiate(store, module).exports(store)["_start"](store)
"""


async def _until_first_instruction(process: Process, began_ns: int) -> float:
    said = b""
    while (piece := await process.read()) is not None:
        said += piece[1]
    if len(said) != 8:
        raise RuntimeError(f"wrong answer: {said!r}")
    return float(struct.unpack("<Q", said)[0] - began_ns) / 1e6


async def _digest(node: Node) -> str:
    return (await node.modules.compile("uid-0", CLOCK)).digest


def _plain_python(home: Path) -> Timed:
    """The library in a process of its own, without a sandbox, its code compiled before."""
    import wasmtime

    code = home / "clock.cwasm"
    code.write_bytes(wasmtime.Module(wasmtime.Engine(), CLOCK).serialize())

    async def timed() -> float:
        began_ns = time.time_ns()
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", _PLAIN, str(code)], capture_output=True, check=True
        )
        return float(struct.unpack("<Q", done.stdout)[0] - began_ns) / 1e6

    return timed


def _wasmtime_command(home: Path) -> dict[str, Timed]:
    program = shutil.which("wasmtime")
    if program is None:
        return {}
    module, code = home / "clock.wasm", home / "clock.command.cwasm"
    module.write_bytes(CLOCK)
    subprocess.run([program, "compile", str(module), "-o", str(code)], check=True, capture_output=True)
    argv = [program, "run", "--allow-precompiled", str(code)]

    async def timed() -> float:
        began_ns = time.time_ns()
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, check=True)
        return float(struct.unpack("<Q", done.stdout)[0] - began_ns) / 1e6

    return {"wasmtime run": timed}


async def first_instruction(home: Path) -> list[Row]:
    """A module whose code is in the cache: from the request to its first instruction, and until its sandbox is gone."""
    async with running_node() as node:
        wasm = Wasm(module=await _digest(node))
        spec = SandboxSpec(wasm=wasm, command=ExecSpec(argv=("clock",)))
        live = await node.create("uid-0", SandboxSpec(wasm=wasm))

        async def ahead() -> float:
            await asyncio.sleep(_PAUSE_S)  # until the sandboxes made ahead stand again: what a quiet host has
            began_ns = time.time_ns()
            sandbox = await node.create("uid-0", spec)
            assert sandbox.main is not None
            took = await _until_first_instruction(sandbox.main, began_ns)
            await sandbox.wait()
            return took

        async def gone() -> float:
            await asyncio.sleep(_PAUSE_S)
            began = time.perf_counter()
            await (await node.create("uid-0", spec)).wait()
            return (time.perf_counter() - began) * 1e3

        async def no_spare() -> float:
            sandboxes = []
            for _ in range(3):  # two are made ahead
                began_ns = time.time_ns()
                sandboxes.append(await node.create("uid-0", spec))
            last = sandboxes[-1]
            assert last.main is not None
            took = await _until_first_instruction(last.main, began_ns)
            for sandbox in sandboxes:
                await sandbox.wait()
            return took

        async def inside() -> float:
            began_ns = time.time_ns()
            return await _until_first_instruction(await live.exec(ExecSpec(argv=("clock",))), began_ns)

        contenders: dict[str, Timed] = {
            "tartarus": ahead, "tartarus, none made ahead": no_spare, "tartarus, exec in a live sandbox": inside,
            "tartarus, gone": gone, "wasmtime in plain python3": _plain_python(home), **_wasmtime_command(home),
        }  # fmt: skip
        rows = await alternate("wasm, first instruction", contenders, 60)
        await live.kill()
        return rows


def absent() -> list[str]:
    """What can't be measured here."""
    return [] if shutil.which("wasmtime") else ["wasmtime (command)"]


def available() -> bool:
    """Whether the library is there."""
    return importlib.util.find_spec("wasmtime") is not None and os.geteuid() == 0


BENCHES = {"wasm": first_instruction} if available() else {}
