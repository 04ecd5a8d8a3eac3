"""Enforcement (Erinyes) on real sandboxes: each violation is seen as often as it happened, and answered as policies say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.faults.violations import KILLS

from tartarus.model.enforcement import ViolationKind
from tartarus.model.lamentations import Category, LamentationFilter
from tartarus.model.quarantine import QuarantineReason, ReleaseRequest
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, Reason, ResourceRequest, SandboxSpec
from tartarus.model.states import State
from tartarus.node.enforcement.bell import Bell
from tartarus.node.enforcement.windows import Windows
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.policy.documents import WindowRule, read_policy

from .conftest import TENANT

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]
CONTAINER = Isolation.CONTAINER
Start = Callable[..., Awaitable[Sandbox]]


def policy(node: Node, enforcement: str) -> None:
    lines = "".join(
        f"  {line.strip()}\n" if not line.startswith(" ") else f"  {line}\n" for line in enforcement.splitlines()
    )
    node.admission.replace([read_policy(f"id: test\nenforcement:\n{lines}")])


@pytest.fixture
async def start(node: Node) -> Start:
    async def begin(*argv: str, **spec: object) -> Sandbox:
        command = ExecSpec(argv=argv, stdin=True) if argv else None
        return await node.create(TENANT, SandboxSpec(isolation=CONTAINER, command=command, **spec))  # type: ignore[arg-type]

    return begin


def counted(node: Node, kind: ViolationKind) -> float:
    """What the metric says, over all actions."""
    total = 0.0
    for metric in node._metrics.registry.collect():
        total += sum(
            sample.value for sample in metric.samples
            if sample.name == "tartarus_erinyes_violations_total" and sample.labels["kind"] == kind.value
        )  # fmt: skip
    return total


async def until(what: Callable[[], object], patience_s: float = 15.0) -> None:
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def test_each_process_that_the_memory_limit_kills_is_counted_once(node: Node, start: Start) -> None:
    sandbox = await start("python3", "-c", KILLS, "8", resources=ResourceRequest(memory_bytes=32 << 20))
    assert sandbox.main is not None
    assert await sandbox.main.read() == (1, b"8\n")
    await until(lambda: counted(node, ViolationKind.MEMORY) >= 8)
    await sandbox.kill()
    assert counted(node, ViolationKind.MEMORY) == 8
    (one,) = await node.furies.lamentations.list(TENANT, LamentationFilter(sandbox_id=sandbox.record.id))
    assert (one.category, one.metadata["violation"]) == (Category.RESOURCE, "memory")


async def test_what_happened_right_before_the_end_is_counted(node: Node, start: Start) -> None:
    code = KILLS.replace("os.read(0, 1)", "os.kill(os.getpid(), 9)")
    sandbox = await start("python3", "-c", code, "1", resources=ResourceRequest(memory_bytes=32 << 20))
    sandbox.detach()
    await sandbox.wait()
    assert counted(node, ViolationKind.MEMORY) == 1


async def test_quiet_sandboxes_violate_nothing(node: Node, start: Start) -> None:
    policy(node, "on_resource_violation: kill\nmax_output: 1KiB\nmax_cpu_time: 1h")
    sandbox = await start("sh", "-c", "head -c 1024 /dev/zero; sleep 1")
    assert (await _ended(sandbox)).state is State.SUCCEEDED
    assert {kind: counted(node, kind) for kind in ViolationKind if counted(node, kind)} == {}


async def _ended(sandbox: Sandbox):
    sandbox.detach()
    return await sandbox.wait()


@pytest.mark.parametrize(
    ("said", "code", "kind"),
    [
        ("max_output: 64KiB", "yes", ViolationKind.OUTPUT),
        ("max_cpu_time: 200ms", "while :; do :; done", ViolationKind.CPU),
        ("", "cat /dev/zero >/tmp/fill; sleep 60", ViolationKind.DISK),
    ],
)
async def test_a_limit_of_the_policys_own_kills(
    node: Node, start: Start, said: str, code: str, kind: ViolationKind
) -> None:
    policy(node, f"on_resource_violation: kill\n{said}".rstrip())
    sandbox = await start("sh", "-c", code, resources=ResourceRequest(disk_bytes=4 << 20), timeout_s=60.0)
    record = await _ended(sandbox)
    assert (record.state, record.reason) == (State.KILLED, Reason.RESOURCE_LIMIT), record.message
    assert counted(node, kind) == 1


async def test_output_of_other_commands_and_of_code_counts_too(node: Node, start: Start) -> None:
    policy(node, "on_resource_violation: kill\nmax_output: 64KiB")
    sandbox = await start()
    process = await sandbox.exec(ExecSpec(argv=("head", "-c", "200000", "/dev/zero")))
    with contextlib.suppress(Exception):
        while await process.read() is not None:
            pass
    assert (await sandbox.wait()).reason is Reason.RESOURCE_LIMIT


async def test_throttled_it_has_a_tenth_of_its_cpu(node: Node, start: Start) -> None:
    policy(node, "on_resource_violation: throttle\nmax_output: 1KiB")
    sandbox = await start(
        "sh", "-c", "head -c 5000 /dev/zero; while :; do :; done", resources=ResourceRequest(cpu_milli=1000)
    )
    sandbox.detach()
    await until(lambda: counted(node, ViolationKind.OUTPUT) == 1)
    before, began = (await sandbox.stats()).cpu_usec, time.monotonic()
    await asyncio.sleep(1.5)
    used = ((await sandbox.stats()).cpu_usec - before) / 1e6 / (time.monotonic() - began)
    assert used < 0.2
    await sandbox.kill()


@pytest.mark.parametrize("action", ["warn", "kill", "quarantine"])
async def test_a_deadline_is_answered_as_the_policy_says(node: Node, start: Start, action: str) -> None:
    policy(node, f"on_timeout: {action}")
    sandbox = await start("sleep", "600", timeout_s=0.4)
    await until(lambda: counted(node, ViolationKind.TIME) == 1)
    if action == "kill":
        assert (await sandbox.wait()).state is State.TIMED_OUT
    elif action == "warn":
        await asyncio.sleep(0.3)
        assert sandbox.record.state is State.RUNNING
        await sandbox.kill()
    else:
        record = await sandbox.wait()
        assert (record.state, record.reason) == (State.QUARANTINED, Reason.POLICY_VIOLATION)
        await node.furies.quarantine.destroy(record.id, "test")
    assert counted(node, ViolationKind.TIME) == 1


async def test_packets_that_a_contract_refused(node: Node, start: Start) -> None:
    """The counters are given here by hand: what fills them are the contracts, and the resolver."""
    policy(node, "on_network_violation: warn\nquarantine_when: [{violation: network, count: 1000, within: 1m}]")
    sandbox = await start("sleep", "600")
    counts = {"refused_denied": 0, "opened": 7, "refused_unsworn": 9, "dns_allowed": 3}

    async def counters() -> dict[str, dict[str, int]]:
        return {sandbox.record.id: dict(counts), "sbx-nobody": {"refused_denied": 5}}

    node.furies.erinyes.counters = counters
    counts["refused_denied"] = 999
    await until(lambda: counted(node, ViolationKind.NETWORK) == 999)
    assert sandbox.record.state is State.RUNNING
    counts["dns_refused"] = 1
    record = await sandbox.wait()
    assert record.state is State.QUARANTINED
    assert counted(node, ViolationKind.NETWORK) == 1000
    await node.furies.quarantine.destroy(record.id, "test")


TRY = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
UNSHARE = TRY + "while True: assert (libc.unshare(0x10000000), ctypes.get_errno()) == (-1, 1)"
FOREIGN = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # getpid, as 32-bit programs ask for it
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


async def test_system_calls_that_escapes_begin_with_are_a_rule_of_their_own(
    node: Node, start: Start, tmp_path: Path
) -> None:
    policy(node, "quarantine_when: [{violation: syscall, count: 20, within: 10s}]")
    mount = Mount(str(tmp_path), "/mnt/here", read_only=True)
    quiet = await start("python3", "-c", "print(1)", mounts=(mount,))
    assert quiet.main is not None
    assert (await quiet.main.started())[1] is False  # its filter is its own, so it can't come of a warm interpreter
    assert await quiet.main.read() == (1, b"1\n")
    assert counted(node, ViolationKind.SYSCALL) == 0
    suspect = await start("sh", "-c", 'for i in 1 2 3 4; do python3 -c "$0" & done; wait', UNSHARE)
    record = await suspect.wait()
    assert record.state is State.QUARANTINED
    assert counted(node, ViolationKind.SYSCALL) >= 20
    quarantine = node.furies.quarantine
    case = await quarantine.take(suspect, QuarantineReason.MANUAL_FLAG, "twice is once")
    assert (await quarantine.settled(case.id)).complete
    assert "kind syscall" in case.detail
    # Its callers wait for answers in the meantime, and get them when it goes on; it can be ended all the same.
    before = counted(node, ViolationKind.SYSCALL)
    await quarantine.release(case.id, "test", ReleaseRequest())
    await until(lambda: counted(node, ViolationKind.SYSCALL) > before)
    again = await quarantine.take(suspect, QuarantineReason.MANUAL_FLAG, "the rule holds on")
    assert again.id != case.id
    for one in (case, again):
        await quarantine.destroy(one.id, "test")


async def test_a_flood_of_refused_calls_waits_and_the_daemon_does_not(node: Node, start: Start) -> None:
    policy(node, "on_syscall_violation: warn")
    began = time.monotonic()
    flood = await start("sh", "-c", 'for i in 1 2 3 4; do python3 -c "$0" & done; wait', UNSHARE)
    await until(lambda: counted(node, ViolationKind.SYSCALL) >= 600)
    await flood.kill()
    assert counted(node, ViolationKind.SYSCALL) <= 500 * (time.monotonic() - began + 2)


@pytest.mark.parametrize("said", ["on_syscall_violation: kill", ""])
async def test_calls_of_another_architecture_end_it_and_are_told_where_calls_are_watched(
    node: Node, start: Start, said: str
) -> None:
    if said:
        policy(node, said)
    record = await _ended(await start("python3", "-c", FOREIGN))
    assert record.exit_signal == signal.SIGSYS
    assert counted(node, ViolationKind.SYSCALL) == (1 if said else 0)


def test_a_window_forgets_what_is_older() -> None:
    windows = Windows([WindowRule(ViolationKind.NETWORK, 3, 10.0)])
    assert [windows.add(ViolationKind.NETWORK, 1, now) for now in (0.0, 1.0, 11.5, 12.0)] == [None] * 4
    assert windows.add(ViolationKind.PIDS, 100, 12.0) is None
    assert windows.add(ViolationKind.NETWORK, 1, 13.0) is not None


async def test_one_bell_for_events_of_both_versions_of_cgroups() -> None:
    """Version 2 wakes by priority events, as this file of the kernel's does; version 1 by an eventfd."""
    bell, rung = Bell(), []
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    mounts = os.open("/proc/self/mounts", os.O_RDONLY)

    def ring(fd: int) -> None:
        os.eventfd_read(fd)
        rung.append("eventfd")

    bell.hang_up(event, select.EPOLLIN, ring)
    bell.hang_up(mounts, select.EPOLLPRI, lambda _: rung.append("priority"))
    await asyncio.sleep(0.05)
    assert rung == []
    os.eventfd_write(event, 1)
    await until(lambda: rung == ["eventfd"])
    bell.take_down(event)
    os.eventfd_write(event, 1)
    await asyncio.sleep(0.05)
    assert rung == ["eventfd"]
    bell.close()
    os.close(event)
    os.close(mounts)
