"""A template's nursery at the gVisor level, with the image that its warm guests are restored from."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

import structlog

from tartarus.model.errors import TartarusError
from tartarus.runtimes.base import GuestRequest, RootFs
from tartarus.runtimes.cgroups import Cgroup, remove_soon
from tartarus.runtimes.gvisor import layout
from tartarus.runtimes.gvisor.ready import ReadyRunsc
from tartarus.runtimes.nursery import Held, Nursery

_NEXT_AFTER_S = 0.2
"""Until the next runsc is started when one was taken: that would take a processor from what it was taken for."""
_log = structlog.get_logger("tartarus.runtimes.gvisor")


class Maker(Protocol):
    """What makes the parts of a snapshot: the runtime."""

    async def make_image(self, snapshot: GvisorSnapshot) -> None:
        """Warm a guest up and save it. Raises TemplateFailed with what it printed."""
        ...

    async def make_ready(self, snapshot: GvisorSnapshot) -> ReadyRunsc | None:
        """Start a runsc for a guest to come; nothing where there is no cgroup to end it by."""
        ...


class GvisorSnapshot:
    """A template's nursery and, once warm, the image of a guest whose interpreter is parked."""

    def __init__(self, maker: Maker, rootfs: RootFs, nursery: Nursery, cgroup: Cgroup | None) -> None:
        self.rootfs = rootfs
        self.nursery = nursery
        self._maker = maker
        self._cgroup = cgroup
        self._guests: set[Held] = set()
        self._warm = False
        self._making = asyncio.Lock()
        self._ready: ReadyRunsc | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._next: asyncio.TimerHandle | None = None
        nursery.control.closed.add_done_callback(self._end_guests)

    def hold(self, guest: Held) -> None:
        """That guest was made here."""
        self._guests.add(guest)
        guest.ended.add_done_callback(lambda _: self._guests.discard(guest))

    def _end_guests(self, _closed: object) -> None:
        for guest in list(self._guests):
            guest.end_soon()

    @property
    def alive(self) -> bool:
        """Whether guests can still be made from it."""
        return not self.nursery.control.closed.done()

    @property
    def is_warm(self) -> bool:
        """Whether there is an image to restore."""
        return self._warm and self.alive

    @property
    def in_use(self) -> bool:
        """Whether a guest that was made here still lives."""
        return bool(self._guests)

    async def warm(self) -> None:
        """Run a guest until its interpreter is parked, and save it."""
        async with self._making:
            if not self.is_warm:
                await self._maker.make_image(self)
                self._warm = True
                self._prepare()

    def take_ready(self, request: GuestRequest) -> ReadyRunsc | None:
        """The runsc that waits to be restored into, if it fits; another is then started."""
        ready = self._ready
        if ready is None or not self.is_warm or not ready.fits(request):
            return None
        self._ready = None
        self._next = asyncio.get_running_loop().call_later(_NEXT_AFTER_S, self._prepare)
        if ready.alive:
            return ready
        self._discarding = asyncio.get_running_loop().create_task(ready.discard())
        return None

    def _prepare(self) -> None:
        self._next = None
        if self._ready is None and (self._preparing is None or self._preparing.done()):
            self._preparing = asyncio.get_running_loop().create_task(self._prepare_one())

    async def _prepare_one(self) -> None:
        try:
            ready = await self._maker.make_ready(self)
        except TartarusError as error:
            _log.warning("no_runsc_ahead", template=self.rootfs.template.id, error=str(error))
            return
        if self.is_warm:
            self._ready = ready
        elif ready is not None:
            await ready.discard()

    async def _end_ready(self) -> None:
        self._stay_cold()
        if self._preparing is not None:
            await asyncio.wait([self._preparing])
        ready, self._ready = self._ready, None
        if ready is not None:
            await ready.discard()

    def _stay_cold(self) -> None:
        self._warm = False
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def cool(self) -> None:
        """Give the image's memory back."""
        self._stay_cold()
        for path in self.image_files():
            path.unlink(missing_ok=True)
        if self._ready is not None or (self._preparing is not None and not self._preparing.done()):
            self._cooling = asyncio.get_running_loop().create_task(self._end_ready())

    @property
    def image_directory(self) -> str:
        """Where the image is, as this process finds it."""
        return f"/proc/{self.nursery.pid}/root{layout.IMAGES}"

    def image_files(self) -> list[Path]:
        """The image, as this process finds it."""
        try:
            return [Path(entry.path) for entry in os.scandir(self.image_directory)]
        except OSError:
            return []

    def memory_bytes(self) -> int:
        """Memory that the image holds."""
        return sum(path.stat().st_blocks * 512 for path in self.image_files())

    async def close(self) -> None:
        """End the nursery: the kernel ends everything in its pid namespace with it."""
        await self._end_ready()
        self.nursery.close()
        await self.nursery.gone()
        if self._cgroup is not None:
            await remove_soon(self._cgroup)
