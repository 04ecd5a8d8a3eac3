"""Where attacks are made: a real node, its sandboxes, the bait around them, and the looks before and after."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from tests.escape import kit, neighbour, together
from tests.escape.attack import OWN_KERNELS, Answers, Attack, load, shipped
from tests.escape.bait import DAEMONS_GROUP, Bait, Twin
from tests.escape.host import Host, changes, processes_of
from tests.node.images import guest_images

from tartarus.guest.syscalls import table
from tartarus.images import catalogue
from tartarus.model.errors import GuestFailed, TartarusError
from tartarus.model.sandbox import ExecSpec, ExitStatus, Isolation, Reason, ResourceRequest, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.model.states import TERMINAL
from tartarus.node.commands import Process
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.store.sandboxes import SandboxStore

TENANT = f"uid-{os.getuid()}"
LIMITS = ResourceRequest(memory_bytes=192 * 1024**2, pids=64, disk_bytes=32 * 1024**2)
WARM = "escape-warm"
"""A template whose interpreter holds, before it is cloned, every module that draws random numbers."""
_DRAWING = ("random", "uuid", "secrets", "tempfile", "ssl", "hashlib", "multiprocessing.process", "json")
_ATTACK_TIMEOUT_S = 60.0
_DOOR_TIMEOUT_S = 180.0
HURRY_S = {Isolation.GVISOR: 3.0, Isolation.MICROVM: 8.0}
"""What sandboxes that are to outlive a short time limit need to start at all, where that takes longer."""
SHARED = frozenset(OWN_KERNELS)
"""Levels whose sandboxes are dear: most attacks share one."""
_SPENDING = "resources"
_NOT_TOGETHER = frozenset({"guest", "processes", _SPENDING})
"""Doors where attacks would meet what makes them together, instead of what they are after."""


class Said(msgspec.Struct):
    """What a command wrote, and how it ended."""

    out: bytes
    err: bytes
    status: ExitStatus

    def verdict(self) -> dict[str, str]:
        """The answers in its verdict line. AssertionError when there is none: the attack itself failed."""
        answers = verdict_in(self.out.decode("utf-8", "replace"))
        if answers is None:
            raise AssertionError(f"no verdict; {self.status}\n{self.out!r}\n{self.err.decode('utf-8', 'replace')}")
        return answers


def verdict_in(said: str) -> dict[str, str] | None:
    """The answers of a verdict line, if there is one."""
    for line in said.splitlines():
        if line.startswith(kit.VERDICT):
            answers: dict[str, str] = json.loads(line.removeprefix(kit.VERDICT))
            return answers
    return None


async def finish(process: Process, *, limit: int = 1 << 20, timeout_s: float = _ATTACK_TIMEOUT_S) -> Said:
    """Read a command to its end; of its output the first `limit` bytes are kept."""
    streams = {1: b"", 2: b""}
    async with asyncio.timeout(timeout_s):
        while (piece := await process.read()) is not None:
            streams[piece[0]] += piece[1][: max(0, limit - len(streams[piece[0]]))]
        return Said(streams[1], streams[2], await process.wait())


class Neighbour:
    """Another tenant's live sandbox at a level."""

    def __init__(self, sandbox: Sandbox, process: Process, where: dict[str, Any]) -> None:
        self.sandbox = sandbox
        self._process = process
        self.where = where

    async def disturbed(self) -> list[str]:
        """What happened to it that should not have."""
        await self._process.write_stdin(b"\n")
        said: list[str] = json.loads(await line_of(self._process))
        return said


async def line_of(process: Process) -> bytes:
    """One line of a command's output; what comes after it is lost."""
    said = b""
    async with asyncio.timeout(_ATTACK_TIMEOUT_S):
        while b"\n" not in said:
            piece = await process.read()
            if piece is None:
                raise AssertionError(f"it ended: {said!r} {await process.wait()}")
            said += piece[1]
    return said.split(b"\n")[0]


class Arena:
    """One node with its bait. Made by `open_arena`."""

    def __init__(self, node: Node, settings: Settings, bait: Bait) -> None:
        self.node = node
        self.settings = settings
        self.bait = bait
        self.host = Host(settings.state_dir)
        self._neighbours: dict[Isolation, Neighbour] = {}
        self._shared: dict[Isolation, Sandbox] = {}
        self._told: dict[tuple[Isolation, str], dict[str, str] | BaseException] = {}

    async def sandbox(self, level: Isolation, *, tenant: str = TENANT, **spec: Any) -> Sandbox:
        """A new sandbox that lives until it is killed, with small limits unless others are given."""
        spec = {"resources": LIMITS, **spec}
        return await self.node.create(tenant, SandboxSpec(isolation=level, **spec))

    async def start(self, sandbox: Sandbox, program: str, *, world: dict[str, Any] | None = None) -> Process:
        """Start a Python program in a sandbox and give it what it has to know."""
        process = await sandbox.exec(ExecSpec(argv=("python3", "-c", program), stdin=True))
        await process.started()
        if world is not None:
            await process.write_stdin(json.dumps(world).encode() + b"\n")
        return process

    async def attack(self, sandbox: Sandbox, program: str, **world: Any) -> dict[str, str]:
        """Run an attacker's program in a sandbox and return its answers."""
        process = await self.start(sandbox, program, world=await self.world(sandbox) | world)
        return (await finish(process)).verdict()

    async def world(self, sandbox: Sandbox) -> dict[str, Any]:
        """What attackers are told."""
        level = sandbox.record.isolation
        neighbour_ = await self.neighbour(level)
        layers = [rootfs.layers[0] for rootfs in self.node._offers.in_use()]
        return self.bait.world() | {
            "agent": sandbox.guest.pid if level is Isolation.PROCESS else 1,
            "layer": str(layers[0]) if layers else "",
            "level": level.value,
            "numbers": table(),
            "state_dir": str(self.settings.state_dir),
            "daemon_pid": os.getpid(),
            "daemon_uid": os.getuid(),
            "neighbour": neighbour_.where | {"host_pid": neighbour_.sandbox.guest.pid},
            "devices": sorted(os.listdir("/dev")),
            "root_names": _listing("/root") + _listing("/home"),
        }

    async def neighbour(self, level: Isolation) -> Neighbour:
        """The other tenant's sandbox at this level, started when first asked for."""
        if level not in self._neighbours:
            sandbox = await self.sandbox(level, tenant="uid-4242")
            process = await self.start(sandbox, shipped(neighbour.live) + "\nlive()\n")
            self._neighbours[level] = Neighbour(sandbox, process, json.loads(await line_of(process)))
        return self._neighbours[level]

    async def shared(self, level: Isolation) -> Sandbox:
        """The sandbox for all attacks at a level whose sandboxes are dear; a new one when the last one has ended."""
        sandbox = self._shared.get(level)
        if sandbox is None or sandbox.record.state in TERMINAL or sandbox.guest.ended.done():
            sandbox = self._shared[level] = await self.sandbox(level)
        return sandbox

    async def told(self, level: Isolation, attacks: list[Attack]) -> dict[str, str] | BaseException:
        """What each of one door's attacks said when they were made one after another in the shared sandbox, once."""
        key = (level, attacks[0].door)
        if key not in self._told:
            try:
                self._told[key] = await self._make(level, attacks)
            except (TartarusError, AssertionError, TimeoutError) as error:
                self._told[key] = error
        return self._told[key]

    async def _make(self, level: Isolation, attacks: list[Attack]) -> dict[str, str]:
        sandbox = await self.shared(level)
        twin = self.twin(sandbox)
        try:
            before = twin.state()
            world = await self.world(sandbox) | {"twin": twin.pid}
            todo = {"world": world, "programs": {attack.id: attack.program for attack in attacks}}
            process = await self.start(sandbox, shipped(together.every_one) + "\nevery_one()\n", world=todo)
            said = await finish(process, limit=1 << 24, timeout_s=_DOOR_TIMEOUT_S)
            await _still_serves(sandbox)
            assert not (changed := changes(before, twin.state())), "\n".join(changed)
        finally:
            twin.close()
        lines = said.out.decode("utf-8", "replace").splitlines()
        return dict(json.loads(line.removeprefix(together.TOLD)) for line in lines if line.startswith(together.TOLD))

    def twin(self, sandbox: Sandbox) -> Twin:
        """A process of the same host user as a sandbox's, outside it."""
        return Twin(os.stat(f"/proc/{sandbox.guest.pid}").st_uid, self.bait.secret)

    @contextlib.asynccontextmanager
    async def untouched(self, level: Isolation) -> AsyncIterator[None]:
        """AssertionError when the host, the bait or the neighbour is not afterwards what it was."""
        other = await self.neighbour(level)
        before, left = self.host.state() | self.bait.state(), self.leftovers()
        try:
            yield
        finally:
            await self._end_all()
        after = self.host.state() | self.bait.state()
        found = changes(before, after) + self.bait.touched() + await other.disturbed()
        found += [thing for thing in self.leftovers() if thing not in left]
        assert not found, "\n".join(found)

    async def _end_all(self) -> None:
        """End what an attack that failed half-way did not."""
        mine = self._staying()
        for sandbox in [item for name, item in self.node._live.items() if name not in mine]:
            await sandbox.kill()

    def _staying(self) -> set[str]:
        return {
            item.record.id for item in [*self._shared.values(), *(item.sandbox for item in self._neighbours.values())]
        }

    def leftovers(self) -> list[str]:
        """Groups, processes and directories of sandboxes that have ended."""
        known = self._staying()
        hierarchy = self.node._levels.hierarchy
        found = []
        if hierarchy is not None:
            found += [
                name
                for name in hierarchy.existing()
                if not name.startswith(("nursery-", "ready-")) and name not in known
            ]
            found += [line for name in found for line in processes_of(name)]
        homes = self.settings.state_dir / "process"
        found += [path.name for path in homes.glob("sbx-*") if path.name not in known]
        return [f"left over: {thing}" for thing in found]


def _add_template() -> None:
    host = catalogue()["host"]
    assert host.warm_up is not None
    warm_up = msgspec.structs.replace(host.warm_up, imports=_DRAWING)
    catalogue()[WARM] = msgspec.structs.replace(host, id=WARM, name=WARM, warm_up=warm_up)


def _listing(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


async def run(arena: Arena, attack: Attack, level: Isolation) -> Answers:
    """Make one attack and end its sandbox; those of a door that share one are made with the first of them."""
    if attack.stage is not None:
        answers: Answers = await attack.stage(arena, level)
        return answers
    if not _shares(attack, level):
        return await _alone(arena, attack, await arena.sandbox(level), end=True)
    if attack.door in _NOT_TOGETHER:
        return await _alone(arena, attack, await arena.shared(level), end=False)
    told = await arena.told(level, _door(attack, level))
    assert isinstance(told, dict), f"the attacks of this door came to an end: {told!r}"
    verdict = verdict_in(told.get(attack.id, ""))
    assert verdict is not None, f"no verdict\n{told.get(attack.id)}"
    return verdict


def _shares(attack: Attack, level: Isolation) -> bool:
    return level in SHARED and attack.door != _SPENDING and attack.id not in OWN_KERNELS[level].ends


def _door(attack: Attack, level: Isolation) -> list[Attack]:
    """All that are made with this one: first those that are held, for others may change what they find."""
    fellows = [
        other for other in load().values() if other.door == attack.door and other.program and _shares(other, level)
    ]
    return [other for other in fellows if level in other.expected] + [other for other in fellows if level in other.own]


async def _alone(arena: Arena, attack: Attack, sandbox: Sandbox, *, end: bool) -> Answers:
    assert attack.program is not None
    may_end = _may_end(attack, sandbox.record.isolation)
    twin = arena.twin(sandbox) if attack.twin else None
    try:
        before = twin.state() if twin is not None else {}
        try:
            answers = await arena.attack(sandbox, attack.program, **({"twin": twin.pid} if twin is not None else {}))
            await _still_serves(sandbox)
        except GuestFailed:
            if not may_end:
                raise
            answers = {"": "ended"}
        changed = changes(before, twin.state()) if twin is not None else []
        assert not changed, "\n".join(changed)
        return answers
    finally:
        if twin is not None:
            twin.close()
        if end:
            await sandbox.kill()


def _may_end(attack: Attack, level: Isolation) -> bool:
    """Whether an attack may end its own sandbox there."""
    return level in OWN_KERNELS and attack.id in OWN_KERNELS[level].ends


async def _still_serves(sandbox: Sandbox) -> None:
    """Whatever was done in it, its guest agent must."""
    await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", ":"))))


@contextlib.asynccontextmanager
async def open_arena() -> AsyncIterator[Arena]:
    """An arena in a state directory of its own, where any user may pass through."""
    # As root every process-level sandbox is another user, and must reach its files.
    state_dir = Path(tempfile.mkdtemp(prefix="tartarus-escape-", dir="/var/tmp"))
    state_dir.chmod(0o711)
    settings = Settings.at(state_dir)
    store = await SandboxStore.open(settings.database)
    bait = Bait(settings.socket)
    _add_template()
    node = Node(settings, store)
    # Nothing of this process's environment may be found in a sandbox.
    os.environ["TARTARUS_ESCAPE_TOKEN"] = bait.secret
    # Nor may one of its groups be used in one.
    groups = os.getgroups()
    if os.geteuid() == 0:
        os.setgroups([*groups, DAEMONS_GROUP])
    lent = contextlib.ExitStack()
    # Packing runs a loop of its own.
    await asyncio.to_thread(lent.enter_context, guest_images(state_dir))
    try:
        await node.start()
        yield Arena(node, settings, bait)
    finally:
        await node.stop(Reason.NODE_DRAIN)
        await store.close()
        lent.close()
        bait.close()
        del os.environ["TARTARUS_ESCAPE_TOKEN"]
        del catalogue()[WARM]
        if os.geteuid() == 0:
            os.setgroups(groups)
        # A tree of some thousand levels, which an attack may have left, is too deep for shutil.
        subprocess.run(["rm", "-rf", str(state_dir)], check=False)
