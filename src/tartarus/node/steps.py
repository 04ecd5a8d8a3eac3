"""Build steps: a command over a stack of layers, in a container sandbox of its own, whose changes are kept.

A step's code is as foreign as any: it runs behind the same walls as every sandbox, with the few powers over its own
files and users that installing packages takes, and without the network unless the build was given it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tartarus.guest.channel import GuestExec
from tartarus.model.errors import NoSpace, TimeLimit
from tartarus.model.ids import new_id
from tartarus.model.sandbox import ExitStatus, Mount, Resources
from tartarus.runtimes.base import Guest, GuestRequest, RootFs, Runtime
from tartarus.runtimes.container.storage import UPPER
from tartarus.runtimes.trees import remove_tree

STEP_TIMEOUT_S = 3600.0
_START_LIMIT_S = 60.0
_LOOK_EVERY_S = 0.5
_KEEP_FREE_BYTES = 512 * 1024**2
_KEEP_FREE_FRACTION = 0.03
_KEEP_FREE_FILES = 50_000

Output = Callable[[int, bytes], None]
Connect = Callable[[Guest], Awaitable[Callable[[], Awaitable[None]]]]


class Step(msgspec.Struct, frozen=True):
    """One command. `env` is complete; `mounts` are the build's own (name resolution, certificates)."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    workdir: str = "/"
    mounts: tuple[Mount, ...] = ()
    timeout_s: float = STEP_TIMEOUT_S


def step_resources(memory_total_bytes: int) -> Resources:
    """A build step's limits: all CPUs, half of the host's memory. Its storage is as large as the disk, and watched."""
    return Resources(
        memory_bytes=max(memory_total_bytes // 2, 256 * 1024**2),
        cpu_milli=1000 * (os.cpu_count() or 1),
        pids=4096,
        disk_bytes=64 * 1024**3,
    )


async def run_step(
    runtime: Runtime,
    rootfs: RootFs,
    step: Step,
    tree: Path,
    resources: Resources,
    output: Output,
    *,
    owner: int | None = None,
    connect: Connect | None = None,
    remove: Callable[[Path], object] = remove_tree,
) -> ExitStatus:
    """Run the step; with status 0, the empty directory `tree` then is the layer of what it changed.

    `owner`: the host id that is the sandbox's root, when ids are mapped; `remove` removes what its ids own. `connect`
    gives the guest its network before its command starts, and returns what takes it away. Raises as starting a sandbox
    does, NoSpace when the disk runs full, TimeLimit.
    """
    storage = tree.parent / "storage"
    storage.mkdir(mode=0o755)
    if owner is not None:
        os.chown(storage, owner, owner)
    try:
        status = await _watched(runtime, rootfs, step, storage, resources, output, connect)
        if status.shell_status == 0:
            tree.rmdir()
            (storage / UPPER).rename(tree)
        return status
    finally:
        await asyncio.to_thread(remove, storage)


async def _watched(
    runtime: Runtime,
    rootfs: RootFs,
    step: Step,
    storage: Path,
    resources: Resources,
    output: Output,
    connect: Connect | None,
) -> ExitStatus:
    name = new_id("bld")
    request = GuestRequest(id=name, hostname=name, resources=resources, mounts=step.mounts, storage=storage, build=True)
    snapshot = await runtime.snapshot(rootfs)
    try:
        guest = await runtime.clone(snapshot, request, warm=False)
        disconnect: Callable[[], Awaitable[None]] | None = None
        tasks: list[asyncio.Task[Any]] = []
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                await guest.ready()
            if connect is not None:
                disconnect = await connect(guest)
            work = asyncio.create_task(_command(guest, step, output))
            guard = asyncio.create_task(_guard_disk(storage))
            tasks = [work, guard]
            try:
                async with asyncio.timeout(step.timeout_s):
                    await asyncio.wait([work, guard], return_when=asyncio.FIRST_COMPLETED)
            except TimeoutError:
                raise TimeLimit(f"the step ran longer than {step.timeout_s:g} s") from None
            if guard.done():
                guard.result()
            return await work
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.shield(guest.destroy())
            if disconnect is not None:
                await asyncio.shield(disconnect())
    finally:
        await asyncio.shield(snapshot.close())


async def _command(guest: Guest, step: Step, output: Output) -> ExitStatus:
    process = guest.channel.exec(GuestExec(argv=step.argv, env=dict(step.env), cwd=step.workdir))
    await process.started()
    while (piece := await process.read()) is not None:
        output(*piece)
    return await process.wait()


async def _guard_disk(place: Path) -> None:
    """Raises NoSpace while there is still room to clean up: nothing else bounds what a step writes."""
    while True:
        disk = await asyncio.to_thread(os.statvfs, place)
        free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if free < min(_KEEP_FREE_BYTES, total * _KEEP_FREE_FRACTION):
            raise NoSpace(
                "the disk is nearly full", why=f"{free // 1024**2} MiB are left",
                fix="free some disk, or move TARTARUS_HOME",
            )  # fmt: skip
        # File systems that make inodes as they are needed say that they have none at all.
        if disk.f_files and disk.f_favail < min(_KEEP_FREE_FILES, disk.f_files * _KEEP_FREE_FRACTION):
            raise NoSpace(
                "the disk takes nearly no more files", why=f"{disk.f_favail} inodes are left",
                fix="remove files, or move TARTARUS_HOME",
            )  # fmt: skip
        await asyncio.sleep(_LOOK_EVERY_S)
