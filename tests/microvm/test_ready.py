"""A machine that stands ready becomes the next clone, once, and is nobody's until then."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from tartarus.runtimes.microvm.ready import Begun
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.microvm.snapshot import MachineSnapshot

from .conftest import RESOURCES, sh, start

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "microvm")]

IDENTITY = "hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid; head -c 24 /dev/urandom | od -An -tx1"


async def standing(runtime: MicrovmRuntime) -> Begun:
    """The one that stands ready, once there is one."""
    await until(lambda: bool(runtime._ready._ready))
    (begun,) = runtime._ready._ready.values()
    return begun


async def until(holds: Callable[[], bool]) -> None:
    """Wait for it; a busy host may take long to start a monitor."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


async def test_it_becomes_the_next_clone_and_another_one_its_successor(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot
) -> None:
    """One monitor for one guest; what they say of themselves differs in every line; the group holds the limit."""
    first = await start(runtime, snapshot, "machine-first")
    ready = await standing(runtime)
    second = await start(runtime, snapshot, "machine-second")
    assert second.pid == ready.machine.pid != first.pid
    mine, others = [(await sh(guest, IDENTITY)).splitlines() for guest in (first, second)]
    assert mine[0] == "machine-first"
    assert others[0] == "machine-second"
    assert not set(mine) & set(others)
    assert (await sh(second, "cat /sys/fs/cgroup/sandbox/memory.max")).strip() == str(RESOURCES.memory_bytes)
    assert (await standing(runtime)).machine.pid not in {first.pid, second.pid}
    await first.destroy()
    await second.destroy()


async def test_one_that_was_killed_is_nobodys(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """The clone gets a machine of its own."""
    await (await start(runtime, snapshot, "machine-before")).destroy()
    ready = await standing(runtime)
    os.kill(ready.machine.pid, signal.SIGKILL)
    await asyncio.shield(ready.machine.ended)
    guest = await start(runtime, snapshot, "machine-after")
    assert guest.pid != ready.machine.pid
    assert await sh(guest, "hostname") == "machine-after\n"
    await guest.destroy()


async def test_nobody_needs_it(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """After a while it ends, and its group with it."""
    await (await start(runtime, snapshot, "machine-last")).destroy()
    ready = await standing(runtime)
    runtime._ready._expire(next(iter(runtime._ready._ready)))
    await asyncio.shield(ready.machine.ended)
    assert ready.machine.pidfd == -1
    hierarchy = runtime._hierarchy
    if hierarchy is not None:
        await until(lambda: not any(name.startswith("ready-") for name in hierarchy.existing()))
