"""A template at the microVM level: its images, and the saved machines that its guests are cloned from."""

from __future__ import annotations

import asyncio
import os
from typing import NamedTuple, Protocol

import msgspec

from tartarus.model.errors import TemplateFailed
from tartarus.model.sandbox import Resources
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.microvm import memory
from tartarus.runtimes.microvm.driver import Hardware, Parts
from tartarus.runtimes.microvm.images import Images

MIN_MEMORY = 128 * 1024 * 1024
"""What a distribution's kernel needs to boot."""
KERNEL_MEMORY = 64 * 1024 * 1024
"""What a machine has above its sandbox's memory limit, for its kernel and the agent: programs are held to the limit."""
_MIB = 1024 * 1024
_MOST_SIZES = 4


class Size(NamedTuple):
    """What tells a template's saved machines apart."""

    hardware: Hardware
    disk_bytes: int
    warm: bool


class Frozen(msgspec.Struct, frozen=True):
    """A machine that has booted, as it is cloned: sealed memory, device state and scratch disk, as descriptors."""

    parts: Parts
    device_state: int
    warm: bool

    def borrow(self) -> Frozen:
        """The same, with descriptors of its own: closing the original does not end a clone that is under way."""
        memory_file, scratch, state = (os.dup(fd) for fd in (self.parts.memory, self.parts.scratch, self.device_state))
        return Frozen(msgspec.structs.replace(self.parts, memory=memory_file, scratch=scratch), state, self.warm)

    def close(self) -> None:
        """Let go of it; clones keep what they have mapped."""
        close_all((self.parts.memory, self.parts.scratch, self.device_state))


class Held(Protocol):
    """A guest, as far as its snapshot needs to know it."""

    ended: asyncio.Future[None]

    async def destroy(self) -> None:
        """End it."""
        ...


class Maker(Protocol):
    """What boots and saves machines: the runtime."""

    async def freeze(self, snapshot: MachineSnapshot, size: Size) -> Frozen:
        """Boot a machine until its agent serves, its interpreter parked if it is to be warm, and save it there."""
        ...


class MachineSnapshot:
    """A template's images and its saved machines, one for each size that was asked for."""

    def __init__(self, maker: Maker, rootfs: RootFs, images: Images) -> None:
        self.rootfs = rootfs
        self.images = images
        self._maker = maker
        self._frozen: dict[Size, Frozen] = {}
        self._lock = asyncio.Lock()
        self._guests: set[Held] = set()
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether guests can still be made from it."""
        return not self._closed

    @property
    def is_warm(self) -> bool:
        """Whether there is a machine of the template's own size with a parked interpreter."""
        return size_for(self.rootfs.template.resources, warm=True) in self._frozen

    @property
    def in_use(self) -> bool:
        """Whether a guest that was made from it still lives."""
        return bool(self._guests)

    def hold(self, guest: Held) -> None:
        """That guest was made from it."""
        self._guests.add(guest)
        guest.ended.add_done_callback(lambda _: self._guests.discard(guest))

    async def frozen(self, resources: Resources, *, warm: bool, network: bool = False) -> Frozen:
        """A machine of the size to clone, with descriptors of its own; it is booted first if need be."""
        size = size_for(resources, warm=warm, network=network)
        async with self._lock:
            found = self._frozen.get(size)
            if found is None:
                found = await self._maker.freeze(self, size)
                self._keep(size, found)
            return found.borrow()

    def _keep(self, size: Size, frozen: Frozen) -> None:
        while len(self._frozen) >= _MOST_SIZES:
            self._frozen.pop(next(iter(self._frozen))).close()
        self._frozen[size] = frozen

    async def warm(self) -> None:
        """Save a machine whose interpreter is parked. Raises TemplateFailed with what it printed."""
        if self.rootfs.template.warm_up is None:
            raise TemplateFailed(f"template {self.rootfs.template.id} has no warm-up")
        (await self.frozen(self.rootfs.template.resources, warm=True)).close()

    def cool(self) -> None:
        """Let go of the machines with a parked interpreter; guests cloned from them go on."""
        for size in [size for size in self._frozen if size.warm]:
            self._frozen.pop(size).close()

    def memory_bytes(self) -> int:
        """Memory that its saved machines hold."""
        return sum(memory.allocated(frozen.parts.memory) for frozen in self._frozen.values())

    def saved_memory(self) -> list[int]:
        """The descriptors of its saved machines' memory and device state."""
        return [fd for frozen in self._frozen.values() for fd in (frozen.parts.memory, frozen.device_state)]

    async def close(self) -> None:
        """End its guests and let go of its machines."""
        if self._closed:
            return
        self._closed = True
        for guest in list(self._guests):
            await guest.destroy()
        async with self._lock:
            for frozen in self._frozen.values():
                frozen.close()
            self._frozen.clear()
        self.images.close()


def hardware_for(resources: Resources, *, network: bool = False) -> Hardware:
    """The machine that holds these limits: whole MiB and whole processors, rounded up."""
    memory_bytes = -(-max(resources.memory_bytes + KERNEL_MEMORY, MIN_MEMORY) // _MIB) * _MIB
    return Hardware(memory_bytes, max(1, -(-resources.cpu_milli // 1000)), network)


def size_for(resources: Resources, *, warm: bool, network: bool = False) -> Size:
    """The saved machine that a guest with these limits is cloned from."""
    return Size(hardware_for(resources, network=network), resources.disk_bytes, warm)
