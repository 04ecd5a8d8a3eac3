"""Compiling WebAssembly, in a sandbox of its own each time: a compiler's bug must not become the daemon's.

What comes out is machine code. It is believed to be the compiled form of just the bytes that went in, since nothing
else was ever in that sandbox; and it is only ever run for the tenant who sent them, inside the same walls. So a module
that takes over the compiler gains what it would have gained by being run.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

from tartarus.guest.channel import GuestExec, GuestProcess
from tartarus.guest.wasm import compile_line
from tartarus.model.errors import GuestFailed, ModuleRefused, TimeLimit
from tartarus.model.ids import new_id
from tartarus.model.sandbox import Resources
from tartarus.node.pool import SnapshotPool
from tartarus.runtimes.base import GuestRequest, RootFs, Runtime

LIMITS = Resources(memory_bytes=1024**3, cpu_milli=2000, pids=64, disk_bytes=16 * 1024**2)
LIMIT_S = 60.0
MOST_CODE_BYTES = 512 * 1024**2
_START_S = 30.0
_WRITE_BYTES = 1024**2
_LAST_WORDS = 2000


async def compile_to(
    runtime: Runtime, pool: SnapshotPool, rootfs: RootFs, data: bytes, place: Path, *, metered: bool
) -> str:
    """Compile a module or component into the new file `place`; returns the code's sha256.

    Raises ModuleRefused with what the compiler says, TimeLimit, GuestFailed, NoSpace, OSError.
    """
    snapshot, _ = await pool.get(rootfs, runtime.isolation, warm=True)
    name = new_id("cmp")
    guest = await runtime.clone(snapshot, GuestRequest(id=name, hostname=name, resources=LIMITS), warm=True)
    try:
        try:
            async with asyncio.timeout(_START_S):
                await guest.ready()
            async with asyncio.timeout(LIMIT_S):
                line = compile_line(metered=metered)
                process = guest.channel.exec(GuestExec(argv=line, stdin=True, warm=True, once=True))
                return await _carry(process, data, place)
        except TimeoutError:
            raise TimeLimit(f"compiling the module took over {LIMIT_S:g} s", fix="make it smaller") from None
    finally:
        await asyncio.shield(guest.destroy())


async def _carry(process: GuestProcess, data: bytes, place: Path) -> str:
    await process.started()
    writing = asyncio.create_task(_write(process, data))
    digest = hashlib.sha256()
    said = b""
    size = 0
    try:
        with place.open("xb", buffering=_WRITE_BYTES) as file:
            while (piece := await process.read()) is not None:
                if piece[0] == 2:
                    said = (said + piece[1])[-_LAST_WORDS:]
                    continue
                size += len(piece[1])
                if size > MOST_CODE_BYTES:
                    raise ModuleRefused(f"the module's code is larger than {MOST_CODE_BYTES >> 20} MiB")
                digest.update(piece[1])
                await asyncio.to_thread(file.write, piece[1])
            os.chmod(file.fileno(), 0o644)
        status = await process.wait()
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    if status.signal:
        raise ModuleRefused(
            "the module can't be compiled",
            why=f"the compiler was ended by signal {status.signal}; it may use {LIMITS.memory_bytes >> 20} MiB",
        )
    if status.code or not size:
        why = said.decode("utf-8", "replace").strip().removeprefix("tartarus: the module: ")
        raise ModuleRefused("the module can't be compiled", why=why or "the compiler gave nothing")
    return digest.hexdigest()


async def _write(process: GuestProcess, data: bytes) -> None:
    try:
        for start in range(0, len(data), _WRITE_BYTES):
            await process.write_stdin(data[start : start + _WRITE_BYTES])
        process.close_stdin()
    except GuestFailed:
        return  # how it ended is seen where its output is read
