"""The benches: at the node (in this process, no HTTP) unless the name says otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from unittest import mock

import msgspec

from benchmarks import peers
from benchmarks.measure import Row, Timed, alternate
from tartarus.images import catalogue
from tartarus.model.configuration import configured
from tartarus.model.sandbox import ExecSpec, Isolation, Reason, ResourceRequest, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.model.template import Template, WarmUp
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.store.sandboxes import SandboxStore

PANDAS = "import numpy, pandas; print(int(pandas.Series(range(10)).sum()))"
STATE = Path(os.environ.get("TARTARUS_BENCH_STATE", "/var/tmp/tartarus-bench"))
"""Templates are kept here between runs: building python-ds is not what is measured."""


@contextlib.asynccontextmanager
async def running_node(state: Path = STATE, config: str = "") -> AsyncIterator[Node]:
    """A node with its own state directory; `config`: what its config.yaml says."""
    settings = configured(Settings.at(state), config)
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    store = await SandboxStore.open(settings.database)
    node = Node(settings, store)
    await node.start()
    try:
        yield node
    finally:
        await node.stop(Reason.NODE_DRAIN)
        await store.close()


async def run_once(node: Node, spec: SandboxSpec, expected: bytes) -> tuple[float, float]:
    """Create, run, read, wait until gone. Returns (ms to the first output or exit, ms until gone)."""
    began = time.perf_counter()
    sandbox = await node.create("uid-0", spec)
    assert sandbox.main is not None
    first = 0.0
    output = b""
    while (piece := await sandbox.main.read()) is not None:
        first = first or (time.perf_counter() - began) * 1e3
        output += piece[1]
    record = await sandbox.wait()
    gone = (time.perf_counter() - began) * 1e3
    if output != expected or record.exit_code != 0:
        raise RuntimeError(f"wrong answer: {output!r}, {record}")
    return first or gone, gone


def _spec(template: str, *argv: str, isolation: Isolation = Isolation.CONTAINER) -> SandboxSpec:
    return SandboxSpec(template=template, isolation=isolation, command=ExecSpec(argv=argv))


def command(argv: list[str], cwd: Path | None = None) -> Timed:
    """A peer's command line, timed as a whole process."""

    async def timed() -> float:
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"{argv[0]} failed: {errors.decode()[-300:]}")
        return (time.perf_counter() - began) * 1e3

    return timed


def _peers_of_true(home: Path) -> dict[str, Timed]:
    found: dict[str, Timed] = {}
    if (argv := peers.bubblewrap(["/usr/bin/true"])) is not None:
        found["bubblewrap"] = command(argv)
    for runtime, label, options in (
        ("runc", "runc", []),
        ("runsc", "gVisor (systrap)", ["--platform=systrap", "--network=none", "--ignore-cgroups"]),
    ):
        directory = home / runtime
        directory.mkdir(exist_ok=True)
        if peers.bundle(directory, runtime, ["true"]) is not None:
            found[label] = command([runtime, *options, "run", f"tartarus-bench-{os.getpid()}"], directory)
    if peers.docker_image():
        found["docker run"] = command(["docker", "run", "--rm", "--network=none", "tartarus-bench", "true"])
    return found


async def first_result_static(home: Path) -> list[Row]:
    """`true` in a fresh container-level sandbox, until nothing of it is left."""
    async with running_node() as node:
        spec = _spec("host", "/usr/bin/true")

        async def ours() -> float:
            return (await run_once(node, spec, b""))[1]

        process = _spec("host", "/usr/bin/true", isolation=Isolation.PROCESS)

        async def ours_process() -> float:
            return (await run_once(node, process, b""))[1]

        contenders: dict[str, Timed] = {"tartarus container": ours, "tartarus process": ours_process}
        return await alternate("static command", contenders | _peers_of_true(home), 60)


async def first_result_warm(_home: Path) -> list[Row]:
    """`import numpy, pandas; print(…)` from a warm snapshot, against the same line in plain python3."""
    async with running_node() as node:
        spec = _spec("python-ds", "python3", "-c", PANDAS)
        rows = []

        async def until_output() -> float:
            return (await run_once(node, spec, b"45\n"))[0]

        async def until_gone() -> float:
            return (await run_once(node, spec, b"45\n"))[1]

        process = _spec("python-ds", "python3", "-c", PANDAS, isolation=Isolation.PROCESS)

        async def process_gone() -> float:
            return (await run_once(node, process, b"45\n"))[1]

        await until_gone()
        interpreter = next(STATE.rglob("opt/tartarus/venv/bin/python3"))
        rows = await alternate(
            "warm python-ds",
            {"tartarus, first output": until_output, "tartarus, gone": until_gone, "process level, gone": process_gone,
             "plain python3": command([str(interpreter), "-c", PANDAS])},
            60, slow_runs=10,
        )  # fmt: skip
        bare = _spec("host", "python3", "-c", "print(6*7)")

        async def bare_gone() -> float:
            return (await run_once(node, bare, b"42\n"))[1]

        rows += await alternate(
            "warm bare python",
            {"tartarus, gone": bare_gone, "plain python3": command(["/usr/bin/python3", "-c", "print(6*7)"])},
            60,
        )
        return rows


def _spare_templates() -> dict[str, Template]:
    """The host's own Node.js and R, waiting in spares."""
    known = dict(catalogue())
    for kind, program in (("node", "node"), ("r", "Rscript")):
        if path := shutil.which(program):
            warm_up = WarmUp(interpreter=path, argv0=(program,), kind=kind)  # type: ignore[arg-type]
            known[f"bench-{kind}"] = msgspec.structs.replace(known["host"], id=f"bench-{kind}", warm_up=warm_up)
    return known


async def _after_restock(node: Node, spec: SandboxSpec, expected: bytes) -> float:
    """Milliseconds to the first output, with a spare at hand: one is taken each time, and made again meanwhile."""
    async with asyncio.timeout(60):
        while not node.spares_ready(spec.template):  # noqa: ASYNC110 - not measured
            await asyncio.sleep(0.01)
    return (await run_once(node, spec, expected))[0]


async def first_result_in_spares(_home: Path) -> list[Row]:
    """Node.js and R that wait in a spare sandbox, against the same command as a plain process."""
    rows = []
    known = _spare_templates()
    # Not in the catalogue under these names: it has its own Node.js and R, with packages that this host may lack.
    with mock.patch("tartarus.node.offers.catalogue", return_value=known):
        async with running_node() as node:
            for kind, argv in (("node", ["node", "-p", "6*7"]), ("r", ["Rscript", "-e", "cat(6*7)"])):
                if f"bench-{kind}" not in known:
                    continue
                expected = b"42\n" if kind == "node" else b"42"
                spec = _spec(f"bench-{kind}", *argv)
                await run_once(node, spec, expected)
                contenders: dict[str, Timed] = {
                    "tartarus, first output": functools.partial(_after_restock, node, spec, expected),
                    f"plain {argv[0]}": command(argv),
                }
                rows += await alternate(f"warm {kind}", contenders, 30, slow_runs=30)
    return rows


async def _rate(node: Node, spec: SandboxSpec, expected: bytes, in_flight: int, total: int) -> float:
    gate = asyncio.Semaphore(in_flight)

    async def one() -> None:
        async with gate:
            await run_once(node, spec, expected)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(total)))
    return total / (time.perf_counter() - began)


async def launches_per_second(_home: Path) -> list[Row]:
    """Closed loop: create, run, read, gone; errors end the bench."""
    async with running_node() as node:
        rows = []
        for label, spec, expected, total in (
            ("static", _spec("host", "/usr/bin/true"), b"", 1200),
            ("warm python", _spec("host", "python3", "-c", "print(6*7)"), b"42\n", 600),
            ("warm python-ds", _spec("python-ds", "python3", "-c", PANDAS), b"45\n", 600),
        ):
            await _rate(node, spec, expected, 4, 40)
            for in_flight in (1, 4, 16, 64):
                rate = await _rate(node, spec, expected, in_flight, total)
                rows.append(Row("launches per second", f"{label}, {in_flight} at once", "/s", [rate]))
        return rows


async def exec_in_live(_home: Path) -> list[Row]:
    """`true` in a sandbox that already runs."""
    async with running_node() as node:
        sandbox = await node.create("uid-0", SandboxSpec(template="host", isolation=Isolation.CONTAINER))

        async def ours() -> float:
            began = time.perf_counter()
            process = await sandbox.exec(ExecSpec(argv=("/usr/bin/true",)))
            while await process.read() is not None:
                pass
            status = await process.wait()
            if status.shell_status:
                raise RuntimeError(f"exec failed: {status}")
            return (time.perf_counter() - began) * 1e3

        contenders: dict[str, Timed] = {"tartarus": ours}
        container = ""
        if peers.docker_image():
            container = await _output("docker", "run", "-d", "--rm", "--network=none", "tartarus-bench", "sleep", "600")
            contenders["docker exec"] = command(["docker", "exec", container, "true"])
        try:
            return await alternate("exec in a live sandbox", contenders, 200, slow_runs=20)
        finally:
            if container:
                await _output("docker", "kill", container)
            await sandbox.kill()


async def _output(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0].decode().strip()


async def output_throughput(_home: Path) -> list[Row]:
    """1 GiB through stdout, read at the node; and the daemon's memory while a reader does not read."""
    async with running_node() as node:
        rates = []
        sandbox = await node.create("uid-0", SandboxSpec(template="host", isolation=Isolation.CONTAINER))
        for _ in range(5):
            began = time.perf_counter()
            process = await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "exec head -c 1073741824 /dev/zero")))
            size = 0
            while (piece := await process.read()) is not None:
                size += len(piece[1])
            if size != 1 << 30:
                raise RuntimeError(f"{size} bytes came")
            rates.append(1 / (time.perf_counter() - began))
        before = _rss_mib()
        stalled = await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "exec head -c 1073741824 /dev/zero")))
        await asyncio.sleep(1.0)
        grown = max(0.0, _rss_mib() - before)
        stalled.signal(9)
        await sandbox.kill()
        rows = [Row("stdout throughput", "tartarus", "GiB/s", rates)]
        if peers.docker_image():
            rows.append(Row("stdout throughput", "docker run", "GiB/s", [await _docker_throughput() for _ in range(2)]))
        rows.append(Row("memory with a stalled reader", "tartarus", "MiB", [grown], "growth of the daemon in 1 s"))
        return rows


async def _docker_throughput() -> float:
    size = 256 * 1024**2
    argv = [
        "docker",
        "run",
        "--rm",
        "--network=none",
        "--log-driver=none",
        "tartarus-bench",
        "dd",
        "if=/dev/zero",
        "bs=1M",
        f"count={size >> 20}",
    ]
    took = await command(argv)()
    return size / 2**30 / (took / 1e3)


def _rss_mib() -> float:
    match = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match.group(1)) / 1024 if match else 0.0


async def density(_home: Path) -> list[Row]:
    """Live warm sandboxes, each after a small pandas computation; memory by the fall of MemAvailable."""
    count = int(os.environ.get("TARTARUS_BENCH_DENSITY", "1000"))
    async with running_node() as node:
        live: list[Sandbox] = []
        await run_once(node, _spec("python-ds", "python3", "-c", PANDAS), b"45\n")
        before = _available_mib()
        code = PANDAS + "; import sys, time; sys.stdout.flush(); time.sleep(3600)"
        spec = SandboxSpec(
            template="python-ds", isolation=Isolation.CONTAINER, command=ExecSpec(argv=("python3", "-c", code)),
            resources=ResourceRequest(disk_bytes=16 * 1024**2),
        )  # fmt: skip

        async def one() -> None:
            sandbox = await node.create("uid-0", spec)
            assert sandbox.main is not None
            piece = await sandbox.main.read()
            if piece is None or piece[1] != b"45\n":
                raise RuntimeError(f"wrong answer {piece}")
            live.append(sandbox)

        for _ in range(count // 10):
            await asyncio.gather(*(one() for _ in range(10)))
        used = _available_mib() - before
        return [
            Row("density", "live warm sandboxes", "", [float(len(live))]),
            Row("density, memory each", "tartarus", "MiB", [-used / len(live)], "kernel structures included"),
        ]


def _available_mib() -> float:
    match = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(match.group(1)) / 1024 if match else 0.0


async def command_line(_home: Path) -> list[Row]:
    """The whole command, from the shell's point of view, with a running daemon."""
    tartarus = shutil.which("tartarus", path=str(Path(sys.executable).parent)) or shutil.which("tartarus")
    if tartarus is None:
        return []
    os.environ["TARTARUS_HOME"] = str(STATE / "cli")
    try:
        contenders: dict[str, Timed] = {"tartarus run -- true": command([tartarus, "run", "--", "true"])}
        contenders["python3 -c pass"] = command([sys.executable, "-c", "pass"])
        if peers.docker_image():
            contenders["docker run"] = command(["docker", "run", "--rm", "--network=none", "tartarus-bench", "true"])
        return await alternate("whole command", contenders, 40)
    finally:
        await command([tartarus, "down"])()
        del os.environ["TARTARUS_HOME"]


BENCHES: dict[str, Callable[[Path], Awaitable[list[Row]]]] = {
    "static": first_result_static,
    "warm": first_result_warm,
    "spares": first_result_in_spares,
    "rate": launches_per_second,
    "exec": exec_in_live,
    "throughput": output_throughput,
    "cli": command_line,
    "density": density,
}
