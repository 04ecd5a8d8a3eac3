"""What all machines of a daemon share: the monitor that runs them, the kernel they boot, the nursery they live below.

Which accelerator a monitor uses is found out by booting a machine: where machines are nested, KVM may open, make a
machine, and then run no kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import structlog

from tartarus.guest.binary import agent_binary
from tartarus.guest.channel import GuestChannel
from tartarus.model.errors import GuestFailed, IsolationUnavailable, TartarusError, Unsupported
from tartarus.model.settings import MicrovmMonitor
from tartarus.network import taps
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.microvm import choice, disks, kernel, memory
from tartarus.runtimes.microvm.driver import BOOT_TIMEOUT_S, Boot, Driver, Hardware, Machine, Parts
from tartarus.runtimes.microvm.initramfs import archive, initramfs, more_modules
from tartarus.runtimes.microvm.kernelfile import vmlinux
from tartarus.runtimes.microvm.launcher import Launcher
from tartarus.runtimes.microvm.packing import packing_tool

KVM_PROBE_S = 15.0
"""The same where a processor is said to run it: half a second is usual, and a kernel that does not boot may hang."""
_PROBE_MEMORY = 192 * 1024 * 1024
_log = structlog.get_logger("tartarus.runtimes.microvm")


class Machinery:
    """The opened parts. `accelerator` is "kvm" or "tcg"; `why` says why nothing was taken that is tried before."""

    def __init__(self, place: Path, launcher: Launcher, chosen: kernel.Kernel, driver: Driver) -> None:
        self.place = place
        self.driver = driver
        self.accelerator = "tcg"
        self.why = ""
        self.version = ""
        self._launcher = launcher
        modules = chosen.load_order(driver.modules)
        self._base = initramfs(agent_binary().read_bytes(), modules)
        loaded = {name for name, _ in modules}
        # Not for all machines: who has no card does not load its driver.
        with_card = chosen.load_order(kernel.CARD)
        self._card = more_modules([module for module in with_card if module[0] not in loaded])
        image = chosen.image.read_bytes()
        if not driver.loads_packed_kernels:
            image = vmlinux(image)
        self.kernel_release = chosen.release
        self.processor = processor()
        told = (*self._card.values(), driver.command_line.encode())
        self.kernel_digest = hashlib.sha256(image + self._base + b"".join(told)).hexdigest()
        self._kernel = memory.sealed("kernel", image)
        self._count = 0

    @classmethod
    async def open(
        cls, place: Path, kernels: Path, wanted: MicrovmMonitor = MicrovmMonitor.AUTO, *, jailer: bool = False
    ) -> Machinery:
        """Start the nursery and find out how machines run here. Raises IsolationUnavailable."""
        chosen = await asyncio.to_thread(kernel.default, kernels)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        await asyncio.to_thread(choice.clear_homes, place)
        launcher = await Launcher.open()
        try:
            tried = choice.candidates(wanted, launcher, place, jailer=jailer)
            return await cls._first(tried, place, launcher, chosen)
        except BaseException:
            await asyncio.shield(launcher.close())
            raise

    @classmethod
    async def _first(
        cls, candidates: Sequence[choice.Candidate], place: Path, launcher: Launcher, chosen: kernel.Kernel
    ) -> Machinery:
        refused: list[str] = []
        for candidate in candidates:
            opened = None
            try:
                if candidate.no:
                    raise IsolationUnavailable(candidate.no)
                driver = candidate.make()
                version = await driver.version()
                opened = await asyncio.to_thread(cls, place, launcher, chosen, driver)
                opened.accelerator, opened.version = candidate.accelerator, version
                if candidate.probe:
                    await opened.try_one(KVM_PROBE_S)
            except TartarusError as error:
                if opened is not None:
                    os.close(opened._kernel)
                    _log.warning("monitor_unusable", monitor=candidate.label, error=str(error))
                    refused.append(f"{candidate.label} boots no machine here")
                elif not (refused and refused[-1] == str(error)):
                    refused.append(str(error))
            else:
                opened.why = "; ".join(refused)
                return opened
        raise IsolationUnavailable("no monitor runs a machine here", why="; ".join(refused), fix="tartarus doctor")

    @property
    def alive(self) -> bool:
        """Whether machines can be started."""
        return self._launcher.alive

    async def try_one(self, timeout_s: float = BOOT_TIMEOUT_S) -> float:
        """Boot a machine with nothing in it until its agent serves; milliseconds. Raises IsolationUnavailable."""
        began = time.perf_counter()
        root = await self._empty_root()
        try:
            async with self.booting(root, (), Hardware(_PROBE_MEMORY, 1), disks.MIN_SCRATCH, {}) as (machine, _):
                await reach_agent(machine, timeout_s)
        finally:
            os.close(root)
        return (time.perf_counter() - began) * 1e3

    @contextlib.asynccontextmanager
    async def booting(
        self,
        root: int,
        binds: tuple[int, ...],
        hardware: Hardware,
        disk_bytes: int,
        files: dict[str, bytes],
        cgroup: Cgroup | None = None,
        words: str = "",
    ) -> AsyncIterator[tuple[Machine, Parts]]:
        """A machine that boots, with `files` in its first file system; it is ended afterwards, its parts are closed.

        `words`: what its kernel is told besides.
        """
        async with contextlib.AsyncExitStack() as held:

            def keep(fd: int) -> int:
                held.callback(os.close, fd)
                return fd

            tap: int | None = None
            more = {f"sandbox/{name}": content for name, content in files.items()}
            if hardware.network:
                self.require_card()
                tap = keep(await asyncio.to_thread(taps.create_apart))
                more |= self._card
            extra = archive(more) if more else b""
            boot = Boot(self._kernel, keep(memory.sealed("initramfs", self._base + extra)), words)
            scratch = keep(await self._fresh_scratch(disk_bytes))
            pages = keep(memory.create(hardware.memory_bytes))
            parts = Parts(hardware, pages, root, scratch, binds, boot, share=True, tap=tap)
            machine = await self.driver.boot(parts, cgroup)
            try:
                yield machine, parts
            finally:
                machine.kill()
                await asyncio.shield(machine.ended)
                with contextlib.suppress(OSError):
                    machine.channel.close()

    def require_card(self) -> None:
        """Raise Unsupported where machines can have no network card."""
        if not self.driver.takes_tap:
            raise Unsupported(
                f"{self.driver.name}'s machines can't have a network here",
                why="only QEMU takes a link that is already under its contract, as an open file",
                fix="let microvm.monitor be qemu, or use --isolation container or gvisor",
            )
        if len(self._card) < 2:
            raise Unsupported(
                "machines can't have a network here",
                why=f"the guest kernel {self.kernel_release} has no virtio_net",
                fix="install one of Debian's cloud kernels: tartarus kernel install",
            )

    async def _empty_root(self) -> int:
        image = self.place / "empty.erofs"
        if not image.exists():
            with tempfile.TemporaryDirectory(prefix=".empty-", dir=self.place) as scratch:
                made = Path(scratch) / "image"
                (Path(scratch) / "root").mkdir()
                await disks.run(packing_tool(), "--quiet", str(made), f"{scratch}/root")
                made.chmod(0o444)
                made.rename(image)
        return os.open(image, os.O_RDONLY | os.O_CLOEXEC)

    async def _fresh_scratch(self, size: int) -> int:
        self._count += 1
        path = self.place / f".scratch-{os.getpid()}-{self._count}"
        try:
            await disks.make_scratch(path, size)
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        finally:
            path.unlink(missing_ok=True)

    async def close(self) -> None:
        """End every machine."""
        await self._launcher.close()
        os.close(self._kernel)


def processor() -> str:
    """What of this host's processor a machine's memory may depend on: its model, its features, its counter's speed."""
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags")
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    lines = [line.split(":", 1) for line in first.splitlines() if ":" in line]
    said = {name.strip(): value.strip() for name, value in lines}
    return hashlib.sha256("\n".join(said.get(name, "") for name in wanted).encode()).hexdigest()[:32]


async def reach_agent(machine: Machine, timeout_s: float) -> GuestChannel:
    """Wait until a machine's agent serves. Raises IsolationUnavailable with what its kernel said."""
    channel = GuestChannel(machine.channel)
    try:
        await channel.open()
        async with asyncio.timeout(timeout_s):
            await channel.ready()
    except (TimeoutError, GuestFailed) as error:
        said = await last_words(machine)
        channel.close()
        why = said or str(error) or f"its agent did not answer within {timeout_s:g} s"
        raise IsolationUnavailable("a machine does not boot here", why=why, fix="tartarus doctor says more") from error
    except BaseException:
        channel.close()
        raise
    return channel


async def last_words(machine: Machine) -> str:
    """The end of what a machine's console shows; nothing when its monitor is gone or hangs."""
    if machine.ended.done():
        return ""
    try:
        return (await asyncio.wait_for(machine.console(), 5.0)).strip()[-1000:]
    except (TartarusError, TimeoutError):
        return ""
