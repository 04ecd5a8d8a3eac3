"""Graceful ends on real sandboxes: those that heed the signal, those that don't, and everything that comes between."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tartarus.model.errors import InvalidRequest, InvalidState
from tartarus.model.lifecycle import DrainRequest, StopRequest
from tartarus.model.sandbox import ExecSpec, Isolation, Reason, SandboxSpec
from tartarus.model.states import State
from tartarus.model.template import Template
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.node.termination import StopOrder, own_grace_s, stop_order

from .conftest import TENANT, both_levels, finish

pytestmark = pytest.mark.needs("root", "cgroups")

LONG_S = 60.0
HEEDS = "trap 'echo bye; exit {}' TERM; echo up; while :; do sleep 0.01; done"
IGNORES = "trap '' TERM INT HUP; echo up; while :; do sleep 0.01; done"


async def started(node: Node, isolation: Isolation, script: str, **spec: object) -> Sandbox:
    """A sandbox whose shell has said that it is up."""
    command = ExecSpec(argv=("sh", "-c", script))
    sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation, command=command, **spec))  # type: ignore[arg-type]
    assert sandbox.main is not None
    assert await sandbox.main.read() == (1, b"up\n")
    return sandbox


@pytest.mark.anyio
@both_levels
@pytest.mark.parametrize(("code", "state"), [(0, State.SUCCEEDED), (3, State.FAILED)])
async def test_a_program_that_heeds_the_signal(node: Node, isolation: Isolation, code: int, state: State) -> None:
    sandbox = await started(node, isolation, HEEDS.format(code))
    stopping = asyncio.create_task(sandbox.stop(StopOrder(signal.SIGTERM, LONG_S)))
    ran = await finish(sandbox)
    assert ran.out == b"bye\n"
    record = await stopping
    assert (record.state, record.reason, record.exit_code) == (state, Reason.USER_REQUEST, code)
    assert record.message == ""


@pytest.mark.anyio
@both_levels
async def test_one_that_does_not_is_killed(node: Node, isolation: Isolation) -> None:
    sandbox = await started(node, isolation, IGNORES)
    record = await sandbox.stop(StopOrder(signal.SIGTERM, 0.1))
    assert (record.state, record.reason) == (State.KILLED, Reason.USER_REQUEST)
    assert "still running" in record.message


@pytest.mark.anyio
@both_levels
async def test_it_says_stopping_meanwhile_and_takes_no_commands(node: Node, isolation: Isolation) -> None:
    sandbox = await started(node, isolation, IGNORES)
    stopping = asyncio.create_task(sandbox.stop(StopOrder(signal.SIGTERM, LONG_S)))
    while sandbox.record.state is State.RUNNING:
        await asyncio.sleep(0)
    assert (await node._store.get(TENANT, sandbox.record.id)).state is State.STOPPING
    for doing in (sandbox.exec(ExecSpec(argv=("true",))), sandbox.pause(), sandbox.resume()):
        with pytest.raises(InvalidState):
            await doing
    await sandbox.kill()
    assert (await stopping).state is State.KILLED


@pytest.mark.anyio
@both_levels
async def test_its_children_have_their_time_too(node: Node, isolation: Isolation) -> None:
    child = "trap 'sleep 0.2; echo child; exit' TERM; echo up; while :; do sleep 0.01; done"
    sandbox = await started(node, isolation, f'sh -c "{child}" & trap "exit 0" TERM; while :; do sleep 0.01; done')
    stopping = asyncio.create_task(sandbox.stop(StopOrder(signal.SIGTERM, LONG_S)))
    assert (await finish(sandbox)).record.state is State.SUCCEEDED
    await stopping


@pytest.mark.anyio
@both_levels
async def test_without_a_command_it_ends_when_nobody_is_left(node: Node, isolation: Isolation) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation))
    process = await sandbox.exec(ExecSpec(argv=("sh", "-c", HEEDS.format(7))))
    assert await process.read() == (1, b"up\n")
    record = await sandbox.stop(StopOrder(signal.SIGTERM, LONG_S))
    assert (record.state, record.reason, record.message) == (State.KILLED, Reason.USER_REQUEST, "")
    assert (await process.wait()).code == 7
    empty = await node.create(TENANT, SandboxSpec(isolation=isolation))
    assert (await empty.stop(StopOrder(signal.SIGTERM, LONG_S))).state is State.KILLED


@pytest.mark.anyio
@both_levels
async def test_a_second_stop_hurries_the_first(node: Node, isolation: Isolation) -> None:
    sandbox = await started(node, isolation, "trap '' TERM; trap 'exit 5' INT; echo up; while :; do sleep 0.01; done")
    first = asyncio.create_task(sandbox.stop(StopOrder(signal.SIGTERM, LONG_S)))
    await asyncio.sleep(0.05)
    record = await sandbox.stop(StopOrder(signal.SIGINT, LONG_S * 10), reason=Reason.NODE_DRAIN)
    assert (record.state, record.reason, record.exit_code) == (State.FAILED, Reason.USER_REQUEST, 5)
    assert await first == record
    stubborn = await started(node, isolation, IGNORES)
    first = asyncio.create_task(stubborn.stop(StopOrder(signal.SIGTERM, LONG_S)))
    await asyncio.sleep(0)
    assert (await stubborn.stop(StopOrder(signal.SIGTERM, 0))).state is State.KILLED
    await first
    assert await stubborn.stop() == stubborn.record


@pytest.mark.anyio
@both_levels
async def test_a_stop_outlives_whoever_asked_for_it(node: Node, isolation: Isolation) -> None:
    sandbox = await started(node, isolation, HEEDS.format(0))
    asking = asyncio.create_task(sandbox.stop(StopOrder(signal.SIGTERM, LONG_S)))
    await asyncio.sleep(0)
    asking.cancel()
    assert (await finish(sandbox)).record.state is State.SUCCEEDED


@pytest.mark.anyio
@pytest.mark.parametrize("isolation", [Isolation.CONTAINER])
async def test_a_paused_one_goes_on_to_end(node: Node, isolation: Isolation) -> None:
    sandbox = await started(node, isolation, HEEDS.format(0))
    await sandbox.pause()
    stopping = asyncio.create_task(sandbox.stop(StopOrder(signal.SIGTERM, LONG_S)))
    assert (await finish(sandbox)).out == b"bye\n"
    assert (await stopping).state is State.SUCCEEDED


@pytest.mark.anyio
@both_levels
async def test_a_guest_that_stopped_its_agent_has_no_more_time_than_others(node: Node, isolation: Isolation) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation))
    await sandbox.exec(ExecSpec(argv=("sh", "-c", "trap '' TERM; kill -STOP $PPID; sleep 600")))
    await asyncio.sleep(0.3)
    assert (await sandbox.stop(StopOrder(signal.SIGTERM, 0.2))).state is State.KILLED


@pytest.mark.anyio
@both_levels
async def test_a_time_limit_leaves_the_grace_that_was_set(node: Node, isolation: Isolation) -> None:
    sandbox = await started(node, isolation, HEEDS.format(0), timeout_s=3.0, stop_grace_s=2.5)
    ran = await finish(sandbox)
    assert ran.out == b"bye\n"
    record = ran.record
    assert (record.state, record.reason, record.exit_code) == (State.TIMED_OUT, Reason.TIMEOUT, 0)


@pytest.mark.anyio
@both_levels
async def test_a_time_limit_holds_whatever_the_grace(node: Node, isolation: Isolation) -> None:
    sandbox = await started(node, isolation, IGNORES, timeout_s=1.0, stop_grace_s=0.5)
    asked = asyncio.create_task(sandbox.stop(StopOrder(signal.SIGTERM, LONG_S)))
    record = (await finish(sandbox)).record
    await asked
    assert record.state is State.KILLED  # its owner was first; the limit only cut the grace short
    other = await started(node, isolation, IGNORES, timeout_s=1.0, stop_grace_s=0.5)
    assert (await finish(other)).record.state is State.TIMED_OUT


@pytest.mark.anyio
async def test_the_signal_of_the_sandbox(node: Node) -> None:
    script = "trap 'echo quit; exit 0' QUIT; echo up; while :; do sleep 0.01; done"
    sandbox = await started(node, Isolation.PROCESS, script, stop_signal="SIGQUIT", stop_grace_s=LONG_S)
    stopping = asyncio.create_task(sandbox.stop())
    assert (await finish(sandbox)).out == b"quit\n"
    await stopping


@pytest.mark.anyio
async def test_a_drain_ends_all_and_takes_no_new_ones(node: Node) -> None:
    heeds = await started(node, Isolation.PROCESS, HEEDS.format(0))
    heeds.detach()
    ignores = await started(node, Isolation.PROCESS, IGNORES, stop_grace_s=0.1)
    ignores.detach()
    empty = await node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS))
    starting = asyncio.create_task(node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS)))
    await asyncio.sleep(0)
    report = await node.terminator.drain(DrainRequest(grace_s=None))
    assert report.draining
    assert report.left == ()
    assert {ended.id: ended.state for ended in report.ended} == {
        heeds.record.id: State.SUCCEEDED, ignores.record.id: State.KILLED, empty.record.id: State.KILLED,
    }  # fmt: skip
    assert {ended.reason for ended in report.ended} == {Reason.NODE_DRAIN}
    for refused in (starting, node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS))):
        with pytest.raises(InvalidState, match="drained"):
            await refused
    node.terminator.undo()
    await (await node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS))).kill()


@pytest.mark.anyio
async def test_the_daemons_stop_has_its_own_grace(node: Node) -> None:
    sandbox = await started(node, Isolation.PROCESS, HEEDS.format(0), stop_grace_s=3600.0)
    sandbox.detach()
    began = time.monotonic()
    await node.stop(Reason.NODE_DRAIN)
    assert time.monotonic() - began < 3600
    assert (sandbox.record.state, sandbox.record.reason) == (State.SUCCEEDED, Reason.NODE_DRAIN)


def test_whose_word_counts() -> None:
    template = Template(id="t", name="t", stop_signal="INT", stop_grace_s=30.0)
    plain = Template(id="t", name="t")
    assert stop_order(SandboxSpec(), plain) == StopOrder(signal.SIGTERM, 10.0)
    assert stop_order(SandboxSpec(), template) == StopOrder(signal.SIGINT, 30.0)
    own = SandboxSpec(stop_signal="RTMIN+3", stop_grace_s=5.0)
    assert stop_order(own, template) == StopOrder(signal.SIGRTMIN + 3, 5.0)
    assert stop_order(own, template, signal=1, grace_s=0.0) == StopOrder(1, 0.0)
    assert stop_order(SandboxSpec(), template, most_s=7.0).grace_s == 7.0
    assert own_grace_s(SandboxSpec(timeout_s=20.0), template) == 10.0
    assert own_grace_s(SandboxSpec(timeout_s=20.0), plain) is None


@pytest.mark.parametrize(
    "words",
    [
        {"signal": "NOPE"},
        {"signal": "65"},
        {"signal": "0"},
        {"grace_s": -1.0},
        {"grace_s": 1e9},
        {"grace_s": float("nan")},
    ],
)
def test_what_is_no_stop_is_refused(words: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        StopRequest(**words)  # type: ignore[arg-type]


def test_a_grace_that_leaves_no_time_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="leaves nothing"):
        SandboxSpec(timeout_s=5.0, stop_grace_s=5.0)
