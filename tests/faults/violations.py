"""Scripted violations of every kind against one node: how many happened, how many enforcement saw.

    python -m tests.faults.violations [--count 1000] [KIND …]

Every violation is a real one, of a real container-level sandbox, seen by the detector that sees it in a daemon. What
happened is told by somebody else than that detector: the program that did it, or the kernel's counters. Two things are
not as in a daemon, for a thousand of each to take minutes and not hours: disks are looked at every 40 ms, not every
2 s; and of policy's violations 19 of 20 are requests that a judge rejects, the others sandboxes that one wants
quarantined. Beside the violators quiet sandboxes run that go right up to each limit: of them nothing may be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from unittest import mock

import structlog
from benchmarks.node_benches import running_node
from tests.network.topology import PUBLIC, World, world

from tartarus.model.contract import Contract
from tartarus.model.enforcement import ViolationKind
from tartarus.model.errors import RequestRejected, TimeLimit
from tartarus.model.sandbox import ExecSpec, Isolation, Network, ResourceRequest, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.node.enforcement import erinyes
from tartarus.node.enforcement.watched import Watched
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.policy.documents import read_policy
from tartarus.policy.judges import Ruling, Verdict

VIOLATOR, QUIET = "violator", "quiet"
LIVE = 40
"""How many sandboxes violate at the same time."""
OFTEN_S = 0.02
PATIENCE_S = 60.0
MIB = 1024**2
FORKS = """
import os, sys
made, refused = 0, 0
while refused < int(sys.argv[1]):
    try:
        pid = os.fork()
    except BlockingIOError:
        refused += 1
        continue
    if pid == 0:
        os.read(0, 1)
        os._exit(0)
print(refused, flush=True)
os.read(0, 1)
"""
KILLS = """
import mmap, os, sys
killed = 0
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"1000")
        mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        os._exit(0)
    killed += os.waitpid(pid, 0)[1] == 9
print(killed, flush=True)
os.read(0, 1)
"""
FILLS = """
import os
while word := os.read(0, 1):
    if word == b"f":
        try:
            with open("/tmp/fill", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
    else:
        os.unlink("/tmp/fill")
    os.write(1, word)
"""
SENDS = """
import os, socket, sys
sent, sockets = 0, []
for _ in range(int(sys.argv[1])):
    sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sent += sockets[-1].sendto(b"x", (sys.argv[2], int(sys.argv[3])))
print(sent, flush=True)
os.read(0, 1)
"""
CALLS = """
import ctypes, os, sys
libc, refused = ctypes.CDLL(None, use_errno=True), 0
tries = [lambda: libc.unshare(0x10000000), lambda: libc.mount(b"a", b"/tmp", b"tmpfs", 0, None), lambda: libc.setns(0, 0)]
for number in range(int(sys.argv[1])):
    refused += tries[number % 3]() == -1 and ctypes.get_errno() == 1
print(refused, flush=True)
os.read(0, 1)
"""


class Stage:
    """A node with violators and quiet ones on it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.sandboxes = 0

    def policy(self, enforcement: str) -> None:
        """What holds for both tenants from now on."""
        self.node.admission.replace([read_policy(f"id: scripted\nenforcement: {{{enforcement}}}\n")])

    async def start(self, *argv: str, tenant: str = VIOLATOR, **spec: object) -> Sandbox:
        command = ExecSpec(argv=argv, stdin=True)
        self.sandboxes += 1
        return await self.node.create(
            tenant, SandboxSpec(isolation=Isolation.CONTAINER, command=command, **spec)  # type: ignore[arg-type]
        )  # fmt: skip

    async def each(self, count: int, one: Callable[[], Awaitable[int]]) -> int:
        """Do that so many times, LIVE at once; the sum of what they say."""
        gate = asyncio.Semaphore(LIVE)

        async def gated() -> int:
            async with gate:
                return await one()

        return sum(await asyncio.gather(*(gated() for _ in range(count))))

    async def share(self, count: int, one: Callable[[int], Awaitable[int]]) -> int:
        """Split so many violations among a few sandboxes."""
        parts = _parts(count, 10)
        return sum(await asyncio.gather(*(one(part) for part in parts)))

    def seen(self) -> dict[str, int]:
        """What the metric says of each kind, over all actions."""
        found: dict[str, int] = {}
        for metric in self.node._metrics.registry.collect():
            for sample in metric.samples:
                if sample.name == "tartarus_erinyes_violations_total":
                    kind = sample.labels["kind"]
                    found[kind] = found.get(kind, 0) + int(sample.value)
        return found


async def time_limits(stage: Stage, count: int) -> int:
    """Each sandbox has a limit, and is ended by it; a quiet one with an hour is not."""

    async def one() -> int:
        while True:
            with contextlib.suppress(TimeLimit):  # a busy machine did not start it in time: it never ran
                sandbox = await stage.start("sleep", "600", timeout_s=1.0)
                break
        return int((await sandbox.wait()).state is State.TIMED_OUT)

    async with _quiet(stage, "sleep", "600", timeout_s=3600.0):
        return await stage.each(count, one)


async def memory(stage: Stage, count: int) -> int:
    """Processes that the memory limit kills; quiet ones take half of theirs."""

    async def one(share: int) -> int:
        return await _told(await stage.start("python3", "-c", KILLS, str(share), resources=_memory(32)))

    async with _quiet(stage, "python3", "-c", f"x = bytes({16 * MIB}); print(1, flush=True); input()"):
        return await stage.share(count, one)


async def pids(stage: Stage, count: int) -> int:
    """Forks that the process limit refuses; a quiet one forks right up to it."""

    async def one(share: int) -> int:
        return await _told(await stage.start("python3", "-c", FORKS, str(share), resources=ResourceRequest(pids=16)))

    filling = "for i in 1 2 3 4 5 6 7 8; do sleep 600 & done; echo 8; read x"
    async with _quiet(stage, "sh", "-c", filling, resources=ResourceRequest(pids=16)):
        return await stage.share(count, one)


async def cpu(stage: Stage, count: int) -> int:
    """Each sandbox uses more CPU time than it may, and is ended for it; a quiet one sleeps."""
    stage.policy("max_cpu_time: 60ms, on_resource_violation: kill")

    async def one() -> int:
        sandbox = await stage.start("sh", "-c", "while :; do :; done")
        record = await _ended(sandbox)
        return int("CPU time" in record.message)

    async with _quiet(stage, "sleep", "600"):
        return await stage.each(count, one)


async def disk(stage: Stage, count: int) -> int:
    """Disks that are filled, seen, emptied, and filled again; a quiet one stays half full."""
    patched = mock.patch.multiple(erinyes, LOOK_EVERY_S=OFTEN_S, _DISK_EVERY=2)
    filled = 0

    async def one(share: int) -> int:
        sandbox = await stage.start("python3", "-c", FILLS, resources=ResourceRequest(disk_bytes=MIB))
        watched = stage.node.furies.erinyes._watched[sandbox.record.id]
        assert sandbox.main is not None
        for _ in range(share):
            for word, full in ((b"f", True), (b"e", False)):
                await sandbox.main.write_stdin(word)
                assert await sandbox.main.read() == (1, word)
                assert full == (sandbox.guest.stats().disk_bytes > MIB - 65536)
                await _until(functools.partial(_sees, watched, full))
        await sandbox.kill()
        return share

    half = "head -c 500000 /dev/zero >/tmp/half; echo 1; read x"
    with patched:
        async with _quiet(stage, "sh", "-c", half, resources=ResourceRequest(disk_bytes=MIB)):
            filled = await stage.share(count, one)
            await asyncio.sleep(10 * OFTEN_S)
    return filled


async def output(stage: Stage, count: int) -> int:
    """Each sandbox writes one byte more than it may, and goes on; quiet ones write just what they may."""
    stage.policy("max_output: 1KiB")

    async def one() -> int:
        return int((await _read(await stage.start("head", "-c", "1025", "/dev/zero"))) == 1025)

    for _ in range(10):
        await _read(await stage.start("head", "-c", "1024", "/dev/zero", tenant=QUIET))
    return await stage.each(count, one)


async def network(stage: Stage, count: int) -> int:
    """Datagrams to where no contract leads, some in a sandbox's last moment; a quiet one sends where it may."""
    contract = Contract(allowed_cidrs=("203.0.113.80/32",))
    return await _datagrams(stage, count, contract, "203.0.113.99", 7777)


async def connections(stage: Stage, count: int) -> int:
    """More flows at once than a contract lets be open."""
    contract = Contract(allowed_cidrs=("203.0.113.80/32",), max_connections=5)
    return await _datagrams(stage, count, contract, PUBLIC, 80, open_=5)


async def _datagrams(
    stage: Stage, count: int, contract: Contract, address: str, port: int, open_: int = 0
) -> int:  # fmt: skip
    async def one(share: int) -> int:
        argv = ("python3", "-c", SENDS, str(share + open_), address, str(port))
        return await _told(await stage.start(*argv, network=Network.CONTRACT, contract=contract)) - open_

    fine = ("python3", "-c", SENDS, "5", PUBLIC, "80")
    async with _quiet(stage, *fine, network=Network.CONTRACT, contract=contract):
        return await stage.share(count, one)


async def calls(stage: Stage, count: int) -> int:
    """System calls that escapes begin with; a quiet one is refused others, as it is everywhere."""
    stage.policy("on_syscall_violation: warn")

    async def one(share: int) -> int:
        return await _told(await stage.start("python3", "-c", CALLS, str(share)))

    fine = "import os, ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0); print(1, flush=True); os.read(0, 1)"
    async with _quiet(stage, "python3", "-c", fine):
        return await stage.share(count, one)


async def policies(stage: Stage, count: int) -> int:
    """Requests that a judge rejects, and sandboxes that one wants quarantined."""
    court = stage.node.admission._court
    before, court._judges = court._judges, (Minor(),)
    held = max(1, count // 20)
    try:

        async def rejected() -> int:
            with contextlib.suppress(RequestRejected):
                await stage.start("true", labels={"verdict": "reject"})
                return 0
            return 1

        async def quarantined() -> int:
            sandbox = await stage.start("sleep", "600", labels={"verdict": "quarantine"})
            was = sandbox.record.state is State.QUARANTINED
            await stage.node.furies.quarantine.destroy(sandbox.record.id, "scripted")
            return int(was)

        async with _quiet(stage, "sleep", "600"):
            return await stage.each(count - held, rejected) + sum([await quarantined() for _ in range(held)])
    finally:
        court._judges = before


class Minor:
    """A judge who does as the label says."""

    name = "minor"

    def pre_admit(self, request: object) -> Ruling:
        said = getattr(request, "spec").labels.get("verdict", "accept")  # noqa: B009
        return Ruling(Verdict(said), self.name, "as it was asked")

    def post_hoc(self, record: object) -> None:
        """Nothing."""


SCRIPTS: dict[str, tuple[ViolationKind, Callable[[Stage, int], Awaitable[int]]]] = {
    "time": (ViolationKind.TIME, time_limits),
    "memory": (ViolationKind.MEMORY, memory),
    "pids": (ViolationKind.PIDS, pids),
    "cpu": (ViolationKind.CPU, cpu),
    "disk": (ViolationKind.DISK, disk),
    "output": (ViolationKind.OUTPUT, output),
    "network": (ViolationKind.NETWORK, network),
    "connections": (ViolationKind.NETWORK, connections),
    "calls": (ViolationKind.SYSCALL, calls),
    "policy": (ViolationKind.POLICY, policies),
}


class Outcome:
    """One kind's."""

    def __init__(self, script: str, happened: int, seen: dict[str, int], sandboxes: int, took_s: float) -> None:
        kind = SCRIPTS[script][0].value
        self.script, self.happened, self.sandboxes, self.took_s = script, happened, sandboxes, took_s
        self.seen = seen.get(kind, 0)
        self.others = {name: number for name, number in seen.items() if name != kind and number}

    @property
    def missed(self) -> int:
        return max(0, self.happened - self.seen)

    @property
    def invented(self) -> int:
        return max(0, self.seen - self.happened) + sum(self.others.values())

    def __str__(self) -> str:
        return (
            f"{self.script:12} {self.happened:6} happened {self.seen:6} seen {self.missed:4} missed "
            f"{self.invented:4} invented {self.sandboxes:5} sandboxes {self.took_s:6.1f} s"
        )


async def scripted(state: Path, count: int, scripts: Iterable[str]) -> AsyncIterator[Outcome]:
    """So many violations of each kind, on one node. In a `World`, where networks lead."""
    async with running_node(state) as node:
        for script in scripts:
            stage = Stage(node)
            stage.policy("")
            before, began = stage.seen(), time.monotonic()
            happened = await SCRIPTS[script][1](stage, count)
            took_s = time.monotonic() - began
            for sandbox in list(node._live.values()):
                await sandbox.kill()
            await asyncio.sleep(0.1 + 2 * erinyes.LOOK_EVERY_S)  # networks close beside what goes on, and two looks
            seen = {kind: number - before.get(kind, 0) for kind, number in stage.seen().items()}
            yield Outcome(script, happened, seen, stage.sandboxes, took_s)


def outcomes(state: Path, count: int, scripts: Sequence[str] = tuple(SCRIPTS)) -> list[Outcome]:
    """All of them, in a small world of network namespaces; told as they come."""

    async def scenario() -> list[Outcome]:
        found = []
        async for outcome in scripted(state, count, scripts):
            sys.stdout.write(f"{outcome}\n")
            sys.stdout.flush()
            found.append(outcome)
        return found

    made: World
    with world(state) as made:
        return made.run(scenario)


@contextlib.asynccontextmanager
async def _quiet(stage: Stage, *argv: str, **spec: object) -> AsyncIterator[None]:
    """Two that break nothing run beside."""
    quiet = [await stage.start(*argv, tenant=QUIET, **spec) for _ in range(2)]
    yield
    for sandbox in quiet:
        assert not sandbox.is_ending
        await sandbox.kill()


async def _told(sandbox: Sandbox) -> int:
    """The number that its program says, and its end right after: what it did last counts, too."""
    assert sandbox.main is not None
    said = await sandbox.main.read()
    await sandbox.kill()
    assert said is not None
    return int(said[1])


async def _read(sandbox: Sandbox) -> int:
    """Bytes of output, to the end."""
    assert sandbox.main is not None
    size = 0
    while (piece := await sandbox.main.read()) is not None:
        size += len(piece[1])
    await sandbox.wait()
    return size


def _sees(watched: Watched, full: bool) -> bool:
    return watched._disk_full == full


async def _ended(sandbox: Sandbox) -> SandboxRecord:
    sandbox.detach()
    return await sandbox.wait()


async def _until(what: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def _parts(count: int, most: int) -> list[int]:
    each, rest = divmod(count, most)
    return [size for size in (each + (number < rest) for number in range(most)) if size]


def _memory(mib: int) -> ResourceRequest:
    return ResourceRequest(memory_bytes=mib * MIB)


def main() -> None:
    """Parse, run, say; 1 if anything was missed or invented."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.violations", description=__doc__)
    parser.add_argument("kind", nargs="*", help=f"of: {', '.join(SCRIPTS)} (default: all)")
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(prefix="tartarus-violations-", dir="/var/tmp") as state:
        found = outcomes(Path(state), arguments.count, arguments.kind or tuple(SCRIPTS))
    sys.exit(any(one.missed or one.invented for one in found))


if __name__ == "__main__":
    main()
