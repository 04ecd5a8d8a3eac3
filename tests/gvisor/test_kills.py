"""The host kills a process of a gVisor guest: whoever waits for the guest hears of it at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from tests.node.conftest import TENANT, finish

from tartarus.model.errors import GuestFailed, TartarusError, TemplateFailed
from tartarus.model.sandbox import ExecSpec, Isolation, Reason, SandboxSpec
from tartarus.node.service import Node
from tartarus.runtimes.gvisor.guest import RunscGuest
from tartarus.runtimes.gvisor.runtime import GvisorRuntime
from tartarus.runtimes.gvisor.snapshot import GvisorSnapshot
from tartarus.runtimes.gvisor.stubs import has_kernel, is_stub, open_kernel

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "runsc")]
NOTICED_S = 15.0
"""Far below the limits of what is waited for, which are a minute and more."""


@pytest.fixture
async def snapshot(node: Node) -> GvisorSnapshot:
    """A template's, without a runsc that was started ahead."""
    await finish(await node.create(TENANT, SandboxSpec(isolation=Isolation.GVISOR, command=ExecSpec(argv=("true",)))))
    runtime = node._levels.runtimes[Isolation.GVISOR]
    assert isinstance(runtime, GvisorRuntime)
    (snapshot,) = runtime._snapshots
    snapshot.cool()
    await snapshot._end_ready()
    return snapshot


async def _seen(guest: RunscGuest) -> list[int]:
    """The processes that run a guest's programs, once its watch knows of one."""
    watch = guest._parts.watch
    assert watch is not None
    while not watch.seen:
        await asyncio.sleep(0.005)
    return sorted(watch.seen)


@pytest.mark.parametrize("which", [0, -1])
async def test_a_warm_up_that_lost_a_process_fails_at_once(snapshot: GvisorSnapshot, which: int) -> None:
    warming = asyncio.ensure_future(snapshot.warm())
    while not snapshot._guests:
        await asyncio.sleep(0.005)
    (guest,) = snapshot._guests
    assert isinstance(guest, RunscGuest)
    os.kill((await _seen(guest))[which], signal.SIGKILL)
    with pytest.raises(TemplateFailed):
        await asyncio.wait_for(warming, NOTICED_S)
    assert guest.ended.done()
    await snapshot.warm()  # another time it works


async def test_a_sandbox_that_lost_a_process_ends(node: Node) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=Isolation.GVISOR))
    guest = sandbox.guest
    assert isinstance(guest, RunscGuest)
    process = await sandbox.exec(ExecSpec(argv=("sleep", "600")))
    os.kill((await _seen(guest))[-1], signal.SIGKILL)
    with contextlib.suppress(TartarusError):
        await asyncio.wait_for(process.wait(), NOTICED_S)
    record = await asyncio.wait_for(sandbox.wait(), NOTICED_S)
    assert record.reason is Reason.LOST


async def test_a_process_that_dies_while_its_sandbox_is_saved_is_noticed(node: Node, tmp_path: Path) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=Isolation.GVISOR))
    guest = sandbox.guest
    assert isinstance(guest, RunscGuest)
    await guest.channel.quiesce()
    victim = (await _seen(guest))[-1]
    saving = asyncio.ensure_future(guest.save(tmp_path, go_on=True))
    while not (tmp_path / "checkpoint.img").exists():
        await asyncio.sleep(0.001)
    os.kill(victim, signal.SIGKILL)
    with contextlib.suppress(GuestFailed):  # it may have been written by then
        await asyncio.wait_for(saving, NOTICED_S)
    await asyncio.wait_for(asyncio.shield(guest.ended), NOTICED_S)
    await sandbox.kill()


def test_other_processes_are_not_taken_for_those_of_guests() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    try:
        while Path(f"/proc/{child}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
            pass
        assert not is_stub(child)  # a dead one has no words, either
        assert not is_stub(os.getpid())
        assert not has_kernel([child, os.getpid()])
        assert open_kernel([child, os.getpid()]) is None
    finally:
        os.waitpid(child, 0)
    assert not is_stub(child)


def test_a_program_that_just_begins_is_not_taken_for_one() -> None:
    # A large one has no words for a while.
    runsc = shutil.which("runsc")
    assert runsc is not None
    silent = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    for _ in range(20):
        child = os.posix_spawn(runsc, ["runsc", "--version"], {}, file_actions=silent)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            assert not is_stub(child)
