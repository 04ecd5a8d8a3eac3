"""One sandbox that is a virtual machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from pathlib import Path

import msgspec

from tartarus.guest.channel import BootFailed, GuestChannel
from tartarus.guest.protocol import FixedUp, fixup_payload, join_payload
from tartarus.guest.session import SessionState
from tartarus.model.errors import GuestFailed
from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.base import Saved, Wire
from tartarus.runtimes.cgroups import Cgroup, remove_soon
from tartarus.runtimes.microvm import saving
from tartarus.runtimes.microvm.driver import Hardware, Machine

MONITOR_BYTES = 160 * 1024 * 1024
"""Memory that a monitor may need beside its machine's: QEMU's own (26 MB measured) and 64 MB of translated code."""
MONITOR_TASKS = 64
HEARTBEAT_S = 20.0
"""How often a machine's agent is asked whether it is there, and how long its answer may take."""
_MOST_MISSED = 3
_ENTROPY = 64


class Origin(msgspec.Struct, frozen=True):
    """What a guest was made from, which it needs to be saved. `memory`: a descriptor that becomes the guest's."""

    memory: int
    hardware: Hardware
    warm: bool
    needs: dict[str, str]


class MachineGuest:
    """Holds a machine, its channel, its cgroup and its scratch disk; gives all back when it ends."""

    def __init__(
        self,
        machine: Machine,
        cgroup: Cgroup | None,
        resources: Resources,
        scratch: int,
        hostname: str,
        origin: Origin,
        wire: Wire | None = None,
    ) -> None:
        self.pid = machine.pid
        self.warm = origin.warm
        self.channel = GuestChannel(machine.channel)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._machine = machine
        self._cgroup = cgroup
        self._resources = resources
        self._scratch = scratch
        self._hostname = hostname
        self._origin = origin
        self._wire = wire
        self._paused = self._frozen = False
        self._final: Stats | None = None
        self._renewed: asyncio.Task[None] | None = None
        self._limiting: asyncio.Task[FixedUp] | None = None
        self._why = ""
        # A host end that gave up on what the guest said would else leave a machine that nobody can reach.
        self.channel.closed.add_done_callback(self._channel_lost)
        self._cleanup = asyncio.create_task(self._clean_up())
        self._heartbeat = asyncio.create_task(self._watch_agent())

    @property
    def pidfd(self) -> int:
        """Its monitor; -1 when that is gone."""
        return self._machine.pidfd

    async def open(self, session: SessionState | None) -> None:
        """Greet its agent, and make it another machine than the one it was cloned from before it does anything."""
        await self.channel.open(session)
        self._renewed = asyncio.create_task(self._renew())

    async def ready(self) -> None:
        """Wait until its agent serves, with a clock, randomness and names of its own."""
        try:
            await self.channel.ready()
        except BootFailed as error:
            raise GuestFailed("the machine can't be started", why=error.why) from None
        if self._renewed is not None:
            await asyncio.shield(self._renewed)

    async def _renew(self) -> None:
        # Sent with the greeting: the agent takes frames in order, so no command runs before this.
        done = await self.channel.renew(renewal(self._hostname, self._resources, self._wire))
        if not (done & FixedUp.CLOCK and done & FixedUp.RESEEDED):
            raise GuestFailed("a cloned machine can't be told apart from others", why="its kernel was not reseeded")
        if self._wire is not None and not done & FixedUp.JOINED:
            raise GuestFailed("a machine can't be joined to the network", why="its kernel did not take its address")
        if not done & FixedUp.LIMITED:
            raise GuestFailed(
                "a machine can't hold its limits",
                why="its kernel counts neither tasks nor memory of a group",
                fix="use a kernel with CONFIG_CGROUP_PIDS and CONFIG_MEMCG",
            )

    @property
    def why_ended(self) -> str:
        """Why it ended by itself, as far as that is known."""
        return self._why or getattr(self._machine, "why_ended", "")

    def _channel_lost(self, closed: asyncio.Future[GuestFailed | None]) -> None:
        error = closed.result()
        if error is not None and self._machine.pidfd >= 0 and "broke" in error.what:
            self._why = f"{error.what}: {error.why}"
        self._machine.kill()

    async def _watch_agent(self) -> None:
        """End a machine whose agent does not answer: one that was halted does nothing any more, and says nothing."""
        missed = 0
        while missed < _MOST_MISSED:
            await asyncio.sleep(HEARTBEAT_S)
            if self._paused or self._frozen or self.channel.is_quiet:
                missed = 0
                continue
            try:
                await asyncio.wait_for(self.channel.ping(b"alive"), HEARTBEAT_S)
                missed = 0
            except TimeoutError:
                missed += 1
            except GuestFailed:
                return
        self._why = "its machine stopped answering: it halted or hangs"
        self._machine.kill()

    async def pause(self) -> None:
        """Stop its processors."""
        await self._machine.pause()
        self._paused = True

    async def resume(self) -> None:
        """Let them run."""
        if self._paused:
            await self._machine.resume()
        if self._frozen:
            await self.channel.freeze(False)
        self._paused = self._frozen = False

    @property
    def group(self) -> Cgroup | None:
        """Its monitor's cgroup: what its programs reach inside is the machine's own."""
        return self._cgroup

    def limit(self, resources: Resources) -> None:
        """Change its cgroup's limits and those of its programs; its machine's memory and processors stay."""
        if self._cgroup is not None:
            self._cgroup.limit(with_monitor(resources, self._origin.hardware.memory_bytes))
        self._resources = resources
        self._limiting = asyncio.create_task(self.channel.renew(limits(resources)))

    def stats(self) -> Stats:
        """Use now, the monitor's included; tasks are the monitor's."""
        if self._final is not None:
            return self._final
        limit = self._resources.memory_bytes
        used = Stats(memory_limit_bytes=limit) if self._cgroup is None else self._cgroup.stats(limit)
        kills = used.oom_kills + self.channel.memory_kills
        return msgspec.structs.replace(used, disk_bytes=os.fstat(self._scratch).st_blocks * 512, oom_kills=kills)

    def changes(self) -> Path | None:
        """None: what it wrote lies in a file system that the host does not mount."""
        return None

    async def save(self, directory: Path, *, go_on: bool) -> Saved:
        """Write its memory, its devices' state and its scratch disk into `directory`."""
        await self.resume()  # its agent has a part in this
        facts = saving.Facts(self._origin.hardware, os.fstat(self._scratch).st_size, self.warm)
        paused_ms = await saving.save(
            self._machine, self._origin.memory, self._scratch, facts, directory, self.channel.freeze, go_on=go_on
        )
        self._paused = self._frozen = not go_on
        return Saved(self._origin.needs, paused_ms)

    async def console(self) -> str:
        """The end of what its kernel said."""
        return await self._machine.console()

    async def destroy(self) -> None:
        """End its monitor."""
        self._machine.kill()
        await asyncio.shield(self.ended)

    def end_soon(self) -> None:
        """End its monitor without waiting."""
        self._machine.kill()

    async def _clean_up(self) -> None:
        await self._machine.ended
        try:
            for task in (self._renewed, self._limiting, self._heartbeat):
                if task is not None:
                    task.cancel()
            self._final = msgspec.structs.replace(self.stats(), memory_bytes=0, pids=0)
            if self._cgroup is not None:
                await remove_soon(self._cgroup)
        finally:
            os.close(self._scratch)
            os.close(self._origin.memory)
            self.channel.close()
            if not self.ended.done():
                self.ended.set_result(None)


def renewal(hostname: str, resources: Resources, wire: Wire | None = None) -> bytes:
    """What makes a machine another one than those it shares its memory with: time, randomness, names, limits, address.

    The addresses of its network card go before the new ones come, and with them every connection.
    """
    payload = fixup_payload(
        time.time_ns(), secrets.token_bytes(_ENTROPY), hostname, secrets.token_hex(16),
        (resources.pids, resources.memory_bytes),
    )  # fmt: skip
    if wire is None:
        return payload
    address, gateway = wire.address.packed, wire.gateway.packed
    if wire.address_6 is not None and wire.gateway_6 is not None:
        address, gateway = address + wire.address_6.packed, gateway + wire.gateway_6.packed
    return payload + join_payload(address, gateway, wire.mtu)


def limits(resources: Resources) -> bytes:
    """New limits for a machine's programs, and nothing else."""
    return fixup_payload(0, b"", limits=(resources.pids, resources.memory_bytes))


def with_monitor(resources: Resources, memory_bytes: int) -> Resources:
    """A machine's limits as its cgroup's: the monitor's own memory and threads come on top."""
    return msgspec.structs.replace(resources, memory_bytes=memory_bytes + MONITOR_BYTES, pids=MONITOR_TASKS)
