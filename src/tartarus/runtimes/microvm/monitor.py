"""A monitor that is told paths and driven over a socket: started, watched, and ended with all that was its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from tartarus.guest.channel import channel_pair
from tartarus.model.errors import GuestFailed
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.microvm import vsock
from tartarus.runtimes.microvm.driver import end
from tartarus.runtimes.microvm.home import Home
from tartarus.runtimes.microvm.launcher import Ends, Launcher, Own
from tartarus.runtimes.microvm.output import Output
from tartarus.runtimes.microvm.vmmapi import VmmApi
from tartarus.runtimes.nursery import Clone

API_SOCKET = "api.sock"
VSOCK = "vsock.sock"
GUEST_CID = 3
DISK_BYTES_PER_S = 1024**3
DISK_OPS_PER_S = 50_000
_START_TIMEOUT_S = 10.0
_LOOK_AGAIN_S = 0.005
T = TypeVar("T")


class Born(NamedTuple):
    """A started monitor. `told`: where it says why it could not be started."""

    clone: Clone
    told: socket.socket


class Start(Protocol):
    """How a monitor is started: `files` are the names that it finds in its home, and the descriptors behind them.

    `copies`: what it writes to such a file does not reach the descriptor: whoever wants it takes it from the home.
    """

    copies: bool

    def home(self) -> Home:
        """A new home, where its kind belongs."""
        ...

    async def __call__(
        self, home: Home, output: Output, argv: Sequence[str], files: Mapping[str, int], cgroup: Cgroup | None
    ) -> Born:
        """Start it."""
        ...


class Confined:
    """Starts monitors behind our own walls, where names in the home lead to inherited descriptors."""

    copies = False

    def __init__(self, launcher: Launcher, homes: Path) -> None:
        self._launcher = launcher
        self._homes = homes

    def home(self) -> Home:
        """A directory of its own."""
        return Home(self._homes)

    async def __call__(
        self, home: Home, output: Output, argv: Sequence[str], files: Mapping[str, int], cgroup: Cgroup | None
    ) -> Born:
        """Start one."""

        def arguments(numbers: list[int]) -> list[str]:
            for name, number in zip(files, numbers, strict=True):
                home.point(name, number)
            return list(argv)

        if "scratch" in files:
            # It has no name, and is opened again by a user of the monitor's own.
            os.fchmod(files["scratch"], 0o666)
        ends = Ends(*channel_pair())
        try:
            own = Own(home, output.write_end)
            return Born(await self._launcher.start(arguments, ends, list(files.values()), cgroup, own), ends.ours)
        except BaseException:
            ends.ours.close()
            raise
        finally:
            ends.theirs.close()


class Monitor:
    """One monitor process, its home and its output. When it is gone, `pidfd` is -1 and `ended` completes."""

    def __init__(self, home: Home, output: Output, born: Born) -> None:
        self.home = home
        self.output = output
        self.pid = born.clone.pid
        self.pidfd = born.clone.pidfd
        self._told = born.told
        self._why = ""
        self._told.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self.pidfd, self._gone)

    @classmethod
    async def start(cls, start: Start, argv: Sequence[str], files: Mapping[str, int], cgroup: Cgroup | None) -> Monitor:
        """Start one and wait until it listens. Raises GuestFailed with what it printed."""
        home = start.home()
        output = Output()
        try:
            monitor = cls(home, output, await start(home, output, argv, files, cgroup))
        except BaseException:
            output.close()
            home.remove()
            raise
        output.handed_on()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not home.has(API_SOCKET):
                    if monitor.ended.done():
                        raise GuestFailed("a virtual machine monitor ended at once", why=monitor.words())
                    await asyncio.sleep(_LOOK_AGAIN_S)
        except BaseException as error:
            await monitor.end()
            if isinstance(error, TimeoutError):
                raise GuestFailed("a virtual machine monitor does not start", why=monitor.words()) from None
            raise
        return monitor

    async def while_alive(self, doing: Awaitable[T]) -> T:
        """Wait for something that can't happen any more when the monitor is gone. Raises GuestFailed then."""
        task = asyncio.ensure_future(doing)
        try:
            await asyncio.wait((task, self.ended), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        raise GuestFailed("the virtual machine monitor ended", why=self.words())

    def words(self) -> str:
        """What it printed last, or why it could not be started."""
        return self._why or self.output.text().strip()[-1000:] or "it says nothing"

    def kill(self) -> None:
        """End it at once; safe to repeat."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def end(self) -> None:
        """End it and wait until it is gone."""
        self.kill()
        await asyncio.shield(self.ended)

    def _gone(self) -> None:
        self._loop.remove_reader(self.pidfd)
        os.close(self.pidfd)
        self.pidfd = -1
        self.output.close()
        with contextlib.suppress(OSError):
            # A BOOT_FAILED frame: the step, and the error's number.
            said = self._told.recv(64)
            if len(said) >= 8:
                step, number = int.from_bytes(said[-8:-4], "little"), int.from_bytes(said[-4:], "little")
                self._why = f"step {step} of its confinement: {os.strerror(number & 0xFFFF)}"
        self._told.close()
        self.home.remove()
        if not self.ended.done():
            self.ended.set_result(None)


class VsockMachine(ABC):
    """A machine whose channel is vsock. What its monitor's API calls things is for those who inherit from it."""

    def __init__(self, monitor: Monitor, api: VmmApi) -> None:
        self.monitor = monitor
        self.api = api
        self.pid = monitor.pid
        self.pidfd = monitor.pidfd
        self.channel, theirs = channel_pair()
        self._relay = vsock.Relay(theirs)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        monitor.ended.add_done_callback(self._gone)
        self._closing: asyncio.Task[None] | None = None

    @abstractmethod
    async def pause(self) -> None:
        """Stop its processors."""

    @abstractmethod
    async def let_run(self) -> None:
        """Let its processors run."""

    @abstractmethod
    async def save(self, device_state: int) -> None:
        """Stop it for good and write its memory and its devices' state."""

    @abstractmethod
    async def save_devices(self, device_state: int) -> None:
        """Write its devices' state; it is paused, and may go on."""

    async def resume(self) -> None:
        """Let it run; after it was restored or saved, connect to its agent anew."""
        await self.let_run()
        if not self._relay.attached:
            await self.reach(vsock.CONNECT_TIMEOUT_S)

    async def reach(self, timeout_s: float) -> None:
        """Connect the channel to its agent. Raises GuestFailed."""
        self.started()
        connecting = vsock.connect(self.monitor.home, VSOCK, vsock.PORT, timeout_s)
        self._relay.attach(await self.monitor.while_alive(connecting))
        if self.monitor.home.fd >= 0:
            self.monitor.home.close_to_monitor()

    def started(self) -> None:
        """Its monitor has made what it listens on, or has it yet to make."""
        if self.monitor.home.has(VSOCK):
            self.monitor.home.close_to_monitor()

    @contextlib.asynccontextmanager
    async def saving(self) -> AsyncIterator[Home]:
        """Its monitor breaks the connection meanwhile, and may write to its home."""
        await self._relay.detach()
        home = self.monitor.home
        home.open_to_monitor()
        try:
            yield home
        finally:
            if home.fd >= 0:
                home.close_to_monitor()

    async def console(self) -> str:
        """The end of what its kernel said."""
        return self.monitor.output.text()

    def kill(self) -> None:
        """End the monitor at once; safe to repeat."""
        self.monitor.kill()

    def _gone(self, _: object) -> None:
        self.pidfd = -1
        self._relay.close()
        self._closing = asyncio.ensure_future(self._let_go())

    async def _let_go(self) -> None:
        try:
            await self.api.close()
        finally:
            if not self.ended.done():
                self.ended.set_result(None)


async def failed_boot(machine: VsockMachine, error: GuestFailed) -> GuestFailed:
    """End a machine that did not boot; the error, with what its console said."""
    said = (await machine.console()).strip()[-1000:] or "its console is empty"
    await end(machine)
    return GuestFailed(error.what, why=f"{error.why}; {said}")
