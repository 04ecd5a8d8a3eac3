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
from tests.escape import kit, neighbour
from tests.escape.attack import Answers, Attack, shipped
from tests.escape.bait import DAEMONS_GROUP, Bait, Twin
from tests.escape.host import Host, changes, processes_of

from tartarus.guest.syscalls import table
from tartarus.images import catalogue
from tartarus.model.sandbox import ExecSpec, ExitStatus, Isolation, Reason, ResourceRequest, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.node.commands import Process
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.store.sandboxes import SandboxStore

TENANT = f"uid-{os.getuid()}"
LIMITS = ResourceRequest(memory_bytes=192 * 1024**2, pids=64, disk_bytes=32 * 1024**2)
WARM = "escape-warm"
"""A template whose interpreter holds, before it is cloned, every module that draws random numbers."""
_DRAWING = ("random", "uuid", "secrets", "tempfile", "ssl", "hashlib", "multiprocessing.process", "json")
_ATTACK_TIMEOUT_S = 30.0


class Said(msgspec.Struct):
    """What a command wrote, and how it ended."""

    out: bytes
    err: bytes
    status: ExitStatus

    def verdict(self) -> dict[str, str]:
        """The answers in its verdict line. AssertionError when there is none: the attack itself failed."""
        for line in self.out.decode("utf-8", "replace").splitlines():
            if line.startswith(kit.VERDICT):
                answers: dict[str, str] = json.loads(line.removeprefix(kit.VERDICT))
                return answers
        raise AssertionError(f"no verdict; {self.status}\n{self.out!r}\n{self.err.decode('utf-8', 'replace')}")


async def finish(process: Process, *, limit: int = 1 << 20) -> Said:
    """Read a command to its end; of its output the first `limit` bytes are kept."""
    streams = {1: b"", 2: b""}
    async with asyncio.timeout(_ATTACK_TIMEOUT_S):
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
            "agent": 1 if level in {Isolation.CONTAINER, Isolation.GVISOR} else sandbox.guest.pid,
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
        mine = {item.sandbox.record.id for item in self._neighbours.values()}
        for sandbox in [item for name, item in self.node._live.items() if name not in mine]:
            await sandbox.kill()

    def leftovers(self) -> list[str]:
        """Groups, processes and directories of sandboxes that have ended."""
        known = {item.sandbox.record.id for item in self._neighbours.values()}
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
    """Make one attack in a sandbox of its own, and end that."""
    if attack.stage is not None:
        answers: Answers = await attack.stage(arena, level)
        return answers
    assert attack.program is not None
    sandbox = await arena.sandbox(level)
    twin = arena.twin(sandbox) if attack.twin else None
    try:
        before = twin.state() if twin is not None else {}
        answers = await arena.attack(sandbox, attack.program, **({"twin": twin.pid} if twin is not None else {}))
        # Whatever it did, its guest agent must still serve.
        await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", ":"))))
        changed = changes(before, twin.state()) if twin is not None else []
        assert not changed, "\n".join(changed)
        return answers
    finally:
        if twin is not None:
            twin.close()
        await sandbox.kill()


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
    try:
        await node.start()
        yield Arena(node, settings, bait)
    finally:
        await node.stop(Reason.NODE_DRAIN)
        await store.close()
        bait.close()
        del os.environ["TARTARUS_ESCAPE_TOKEN"]
        del catalogue()[WARM]
        if os.geteuid() == 0:
            os.setgroups(groups)
        # A tree of some thousand levels, which an attack may have left, is too deep for shutil.
        subprocess.run(["rm", "-rf", str(state_dir)], check=False)
