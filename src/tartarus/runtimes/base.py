"""What every isolation kind offers the node: `Runtime` makes guests, `Guest` is one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Protocol

import msgspec

from tartarus.guest.channel import GuestChannel, SessionState
from tartarus.model.sandbox import Isolation, Mount, Resources, Stats
from tartarus.model.template import Template
from tartarus.runtimes.cgroups.ports import Cgroup
from tartarus.runtimes.hardening import USUAL, Hardening

GUEST_PREFIX = "/opt/tartarus"
"""Where a template keeps its runner and virtual environment, in its own root file system."""


class Capabilities(msgspec.Struct, frozen=True):
    """What a level can do on this host. `missing` explains, in words, each thing it can't.

    `runs`: what its commands are. `contexts`: whether code contexts can be had; `terminals`: whether commands can have
    one; `keeps_files`: whether snapshots of what a sandbox wrote can be made; `saves_memory`: of its memory too, and
    forks and hibernation; `how`: which of several ways it takes here, and why. docs/capabilities.md is written from
    these.
    """

    warm_start: bool
    pause: bool
    own_network: bool
    own_pids: bool
    mounts: bool
    memory_limit: str
    cpu_limit: str
    pids_limit: str
    disk_limit: str
    saves_memory: bool = False
    keeps_files: bool = False
    contexts: bool = True
    terminals: bool = True
    runs: str = "programs"
    missing: tuple[str, ...] = ()
    how: str = ""


class RootFs(msgspec.Struct, frozen=True):
    """A template's prepared files: overlay lower directories (top first) and read-only binds.

    `hardening`: how its guests are held besides; two that differ in it are made from different snapshots.
    """

    template: Template
    layers: tuple[Path, ...]
    binds: tuple[tuple[str, str], ...]
    digest: str
    hardening: Hardening = USUAL


class Wire(msgspec.Struct, frozen=True):
    """A guest's way to its network slot. `file`: an open file, the caller's: the network namespace that has its link
    for gVisor, for a machine the tap that is its link. The rest is what a machine's kernel is told: `mtu` in bytes,
    IPv6 where there is any.
    """  # noqa: D205

    file: int
    address: IPv4Address
    gateway: IPv4Address
    mtu: int
    address_6: IPv6Address | None = None
    gateway_6: IPv6Address | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """The guest's own."""
        return tuple(str(one) for one in (self.address, self.address_6) if one is not None)


class GuestRequest(msgspec.Struct, frozen=True):
    """What the node asks a runtime to make. `hostname` is also the cgroup's and log's name.

    `session`: of a guest that is restored, where its session stood; its channel is opened with it, and stays quiet.
    `lend`: given where no other guest goes on from the same files: opens one of them so that processes of other users
    can open it again, also for writing.

    `network`: for levels whose guests must find their link there when they start.

    `storage`: an empty host directory for what the sandbox writes, instead of memory. `build`: its root may give
    files to other users and become them, as installing packages takes; never with a warm interpreter.
    `recorder`: a socket's end, to send the listener of a filter through that asks about each call (`CallRecorder`).
    `secrets`: it gets a directory /run/secrets of its user's that is memory and nothing else, before anything runs.
    `watch`: called with the name of each system call of an escape's that was refused, at the container level; it then
    starts cold, as a warm interpreter has its filter already.
    """

    id: str
    hostname: str
    resources: Resources
    mounts: tuple[Mount, ...] = ()
    storage: Path | None = None
    build: bool = False
    session: SessionState | None = None
    lend: Callable[[str], int] | None = None
    network: Wire | None = None
    secrets: bool = False
    watch: Callable[[str], None] | None = None
    recorder: int = -1


class Places(msgspec.Struct, frozen=True):
    """Where things lie as a guest sees them: HOME, where commands start, and the template's `/opt/tartarus`."""

    home: str
    workdir: str
    prefix: str

    def localize(self, text: str) -> str:
        """Rewrite `/opt/tartarus` to where it lies for this guest."""
        return text if self.prefix == GUEST_PREFIX else text.replace(GUEST_PREFIX, self.prefix)


def base_environment(home: str, user: str = "root") -> dict[str, str]:
    """What every command finds set. The warm interpreter is started with the same, so that its start-up fits."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": home, "USER": user, "LANG": "C.UTF-8"}


def command_environment(template: Template, places: Places) -> dict[str, str]:
    """What every command in a guest of this template finds set, before its sandbox's and its own variables."""
    env = base_environment(places.home, template.user.name or str(template.user.uid))
    return env | {name: places.localize(value) for name, value in template.env.items()}


class Saved(msgspec.Struct, frozen=True):
    """What a runtime wrote of a live guest into a directory of its own.

    `needs`: facts that must be the same where it is restored (monitor and its version, processor, kernel, template);
    `paused_ms`: how long the guest stood still, in milliseconds. The files' names are the runtime's own.
    """

    needs: dict[str, str]
    paused_ms: float


class Guest(Protocol):
    """A running guest. `ended` completes when its last process is gone and nothing of it is left."""

    channel: GuestChannel
    pid: int
    warm: bool
    ended: asyncio.Future[None]

    @property
    def pidfd(self) -> int:
        """Its first process, as a descriptor that stays the guest's own; -1 when that process is gone."""
        ...

    @property
    def group(self) -> Cgroup | None:
        """The control group that it runs in; None where it has none, or none any more."""
        ...

    async def ready(self) -> None:
        """Wait until its agent serves. Raises GuestFailed or NoSpace naming what failed."""
        ...

    async def pause(self) -> None:
        """Stop all its processes until `resume`."""
        ...

    async def resume(self) -> None:
        """Let its processes run again."""
        ...

    def limit(self, resources: Resources) -> None:
        """Give it other limits of memory, CPU and tasks; its disk stays. Raises Unsupported without a cgroup."""
        ...

    def stats(self) -> Stats:
        """Its use of resources now."""
        ...

    def changes(self) -> Path | None:
        """Where the host finds what it wrote, as an overlay's upper directory; None where the host can't look.

        Good until the guest's end has been cleaned up; pause it first.
        """
        ...

    async def save(self, directory: Path, *, go_on: bool) -> Saved:
        """Write its memory, its devices' state and its files into an empty directory; `go_on`: it runs on afterwards.

        Without `go_on` it stays as it was saved until it is destroyed, or resumed because its files can't be kept.
        Nothing is compressed here and holes stay holes: who keeps the files decides that. The channel must be
        quiescent (`GuestChannel.quiesce`). Raises Unsupported where the level can't, GuestFailed or NoSpace when it
        failed: the guest then goes on as before.
        """
        ...

    async def destroy(self) -> None:
        """End it at once, whatever it is doing, and remove what it used; safe to repeat."""
        ...


class Snapshot(Protocol):
    """A warmed guest, ready to be cloned."""

    rootfs: RootFs

    @property
    def alive(self) -> bool:
        """Whether guests can still be made from it."""
        ...

    @property
    def is_warm(self) -> bool:
        """Whether its interpreter is parked and ready."""
        ...

    @property
    def in_use(self) -> bool:
        """Whether a guest that was made from it still lives."""
        ...

    async def warm(self) -> None:
        """Start and warm the interpreter unless it is. Raises TemplateFailed with what it printed."""
        ...

    def cool(self) -> None:
        """End the interpreter to give its memory back; guests cloned from it go on."""
        ...

    def memory_bytes(self) -> int:
        """Memory it holds while parked, in bytes."""
        ...

    async def close(self) -> None:
        """End it. Guests cloned from it end too."""
        ...


class Runtime(Protocol):
    """One isolation kind."""

    isolation: Isolation
    best: Capabilities
    """What it can do on a host that lacks nothing."""

    def capabilities(self) -> Capabilities:
        """What it can do on this host."""
        ...

    async def snapshot(self, rootfs: RootFs) -> Snapshot:
        """Prepare a template for cloning, cold. Raises IsolationUnavailable."""
        ...

    def places(self, rootfs: RootFs, guest_id: str) -> Places:
        """Where things lie for a guest of that id."""
        ...

    async def clone(self, snapshot: Snapshot, request: GuestRequest, *, warm: bool) -> Guest:
        """A new guest from a snapshot: `warm` ones carry the warmed interpreter, others only the agent.

        Raises GuestFailed (naming the step) or NoSpace; nothing is left behind then.
        """
        ...

    def needs(self, snapshot: Snapshot) -> dict[str, str]:
        """What `Saved.needs` would say of a guest that was made from this snapshot here and now."""
        ...

    async def restore(self, snapshot: Snapshot, saved: Path, request: GuestRequest) -> Guest:
        """A new guest that goes on where one was saved by `Guest.save`; several may be made of the same files.

        It gets another host name, machine id, clock and randomness before anything in it runs, and the limits of
        `request`, with whose session its channel is opened. The files may be removed once this returns. Raises
        Unsupported, GuestFailed or NoSpace.
        """
        ...

    async def close(self) -> None:
        """Release what the runtime holds, its snapshots included."""
        ...
