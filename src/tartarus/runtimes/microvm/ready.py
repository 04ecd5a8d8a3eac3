"""A machine that was restored ahead of the clone it is to become, and stands still until then.

To start a monitor takes about as long as its machine's way to a first reply. What clones are made of is known before
anybody asks for one: so one stands ready for each saved machine that was cloned lately, for a while.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
import structlog

from tartarus.model.errors import TartarusError
from tartarus.runtimes.cgroups import Cgroup, remove_soon
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.microvm.driver import Machine
from tartarus.runtimes.microvm.snapshot import Frozen

KEPT_S = 120.0
"""How long one waits for its clone. It takes some 25 MiB meanwhile."""
MOST = 2
_BEGIN_AFTER_S = 0.1
"""The clone that was just made answers first."""
_log = structlog.get_logger("tartarus.runtimes.microvm")


class Begun(NamedTuple):
    """A restored machine that stands still, its scratch disk, its cgroup. Whoever has it owns all three."""

    machine: Machine
    scratch: int
    cgroup: Cgroup | None

    async def discard(self) -> None:
        """End it."""
        self.machine.kill()
        await asyncio.shield(self.machine.ended)
        self.machine.channel.close()
        os.close(self.scratch)
        if self.cgroup is not None:
            await remove_soon(self.cgroup)


class ReadyMachines:
    """Those of one runtime. `begin`: makes one. It gets descriptors that are closed afterwards."""

    def __init__(self, begin: Callable[[Frozen], Awaitable[Begun]]) -> None:
        self._begin = begin
        self._ready: dict[tuple[int, int], Begun] = {}
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._timers: dict[tuple[int, int], asyncio.TimerHandle] = {}
        self._ends: set[asyncio.Task[None]] = set()
        self._closed = False

    def take(self, frozen: Frozen) -> Begun | None:
        """The one that stands ready to become a clone of that saved machine, if it lives."""
        begun = self._remove(_key(frozen))
        if begun is not None and begun.machine.ended.done():
            self._discard(begun)
            return None
        return begun

    def prepare(self, frozen: Frozen) -> None:
        """Have one soon, unless there is one; it keeps what it needs of `frozen` itself."""
        key = _key(frozen)
        if not self._closed and key not in self._ready and key not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._prepare(key, _whole(frozen)))
            self._tasks[key] = task
            task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def close(self) -> None:
        """End all of them, and prepare none any more."""
        self._closed = True
        if self._tasks:
            await asyncio.wait([*self._tasks.values()])
        for key in list(self._ready):
            self._expire(key)
        if self._ends:
            await asyncio.wait([*self._ends])

    async def _prepare(self, key: tuple[int, int], frozen: Frozen) -> None:
        try:
            await asyncio.sleep(_BEGIN_AFTER_S)
            if self._closed:
                return
            begun = await self._begin(frozen)
        except (TartarusError, OSError) as error:
            _log.warning("no_machine_ahead", error=str(error))
            return
        finally:
            frozen.close()
            close_all((frozen.parts.root, *frozen.parts.binds))
        while len(self._ready) >= MOST:
            self._expire(next(iter(self._ready)))
        self._ready[key] = begun
        self._timers[key] = asyncio.get_running_loop().call_later(KEPT_S, self._expire, key)

    def _remove(self, key: tuple[int, int]) -> Begun | None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        return self._ready.pop(key, None)

    def _expire(self, key: tuple[int, int]) -> None:
        begun = self._remove(key)
        if begun is not None:
            self._discard(begun)

    def _discard(self, begun: Begun) -> None:
        task = asyncio.get_running_loop().create_task(begun.discard())
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)


def _whole(frozen: Frozen) -> Frozen:
    """The same with descriptors of its own, the images' too: their template may be closed meanwhile."""
    own = frozen.borrow()
    root, *binds = (os.dup(fd) for fd in (own.parts.root, *own.parts.binds))
    return Frozen(msgspec.structs.replace(own.parts, root=root, binds=tuple(binds)), own.device_state, own.warm)


def _key(frozen: Frozen) -> tuple[int, int]:
    """Which saved machine it is: its memory is its own."""
    status = os.fstat(frozen.parts.memory)
    return status.st_dev, status.st_ino
