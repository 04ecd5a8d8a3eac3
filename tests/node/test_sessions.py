"""A sandbox whose guest is saved goes on: in this daemon with all who wait for it, in another one, and as a copy.

At the container level nothing can be saved. Here a container's guest stands for the one that was restored: it stood
still, and the host's end of it is all that was replaced, which is all that this part of the node does.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.node.conftest import TENANT, finish

from tartarus.guest.channel import GuestChannel
from tartarus.guest.contexts import CellEvent, CellResult
from tartarus.guest.session import SessionState
from tartarus.model.errors import GuestFailed, InvalidState, TartarusError
from tartarus.model.ids import new_id
from tartarus.model.sandbox import ExecSpec, Isolation, Reason, SandboxSpec
from tartarus.model.states import State
from tartarus.node.outputlog import OutputLog
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.node.sessions import SandboxSession
from tartarus.runtimes.base import Guest
from tartarus.store.sandboxes import SandboxStore

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]
LINES = 'i=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i+1)); done; read last; echo "$last" >&2; exit 9'
ALL_LINES = b"".join(b"line %d\n" % number for number in range(30_000))


class Replaced:
    """A guest seen from the host that saved it: ending it leaves the one that was restored, which is the same here."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.channel = guest.channel
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guest, name)

    async def destroy(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def asleep(sandbox: Sandbox) -> tuple[SandboxSession, Guest, GuestChannel]:
    """Save it, as far as the node goes: what was written down, its guest, and that guest's unused channel."""
    session = await sandbox.quiesce()
    text = json.dumps(msgspec.to_builtins(session))
    guest = sandbox.guest
    sandbox.guest = Replaced(guest)
    await sandbox.fall_asleep()
    return msgspec.convert(json.loads(text), SandboxSession), guest, sandbox.guest.channel


async def restored(guest: Guest, channel: GuestChannel, state: SessionState) -> Guest:
    """What `Runtime.restore` gives."""
    await channel.open(state)
    guest.channel = channel
    return guest


async def create(node: Node, *argv: str, stdin: bool = False, **spec: Any) -> Sandbox:
    command = ExecSpec(argv=argv, stdin=stdin) if argv else None
    return await node.create(TENANT, SandboxSpec(isolation=Isolation.CONTAINER, command=command, **spec))


async def test_clients_of_this_daemon_go_on(node: Node) -> None:
    sandbox = await create(node, "/bin/sh", "-c", LINES, stdin=True)
    reading = asyncio.create_task(finish(sandbox))
    other = await sandbox.exec(ExecSpec(argv=("cat",), stdin=True))
    await other.started()
    context = sandbox.context(await sandbox.open_context())
    assert [event async for event in context.run("x = 41")]
    session, guest, channel = await asleep(sandbox)
    assert sandbox.asleep
    assert session.main is not None
    cell = asyncio.create_task(_cell(context, "x + 1"))
    writing = asyncio.create_task(other.write_stdin(b"to the other"))
    looking = asyncio.create_task(sandbox.files.stat("/etc/passwd"))
    await asyncio.sleep(0.1)
    assert sandbox.calls_waiting
    assert {cell, writing, looking} <= asyncio.all_tasks()
    await sandbox.wake_up(await restored(guest, channel, session.channel))
    await asyncio.gather(writing, looking)
    assert any(isinstance(event, CellResult) and "42" in str(event.data) for event in await cell)
    other.close_stdin()
    assert await other.read() == (1, b"to the other")
    assert sandbox.main is not None
    await sandbox.main.write_stdin(b"the last\n")
    ran = await reading
    assert (ran.out, ran.err, ran.record.exit_code) == (ALL_LINES, b"the last\n", 9)


async def _cell(context: Any, code: str) -> list[CellEvent]:
    return [event async for event in context.run(code)]


async def attached(
    sandbox: Sandbox, store: SandboxStore, guest: Guest, session: SandboxSession, log: Path, others: Any = "kill"
) -> Sandbox:
    """The same sandbox as another daemon would have it, which knows only what was written down."""
    record = msgspec.structs.replace(sandbox.record, id=new_id("sbx"), name="", state=State.PENDING)
    await store.insert(record, State.SCHEDULED, State.STARTING)
    record = await store.transition(record.id, {State.STARTING}, State.RUNNING, started_at=time.time())
    return await Sandbox.attached(
        record, sandbox.template, guest, store, OutputLog(log), sandbox._places, lambda _: None, session, others=others
    )


async def test_another_daemon_takes_it_over(node: Node, store: SandboxStore, tmp_path: Path) -> None:
    """Its log goes on at the very byte; its code contexts keep their variables; commands of clients end."""
    sandbox = await create(node, "/bin/sh", "-c", LINES, stdin=True)
    assert sandbox.main is not None
    other = await sandbox.exec(ExecSpec(argv=("sleep", "1000")))
    await other.started()
    context_id = await sandbox.open_context()
    await _cell(sandbox.context(context_id), "x = 41")
    running = asyncio.create_task(_cell(sandbox.context(context_id), "import time; time.sleep(1000)"))
    before = b""
    while len(before) < 100_000:
        piece = await sandbox.main.read()
        assert piece is not None
        before += piece[1]
    session, guest, channel = await asleep(sandbox)
    await sandbox.kill()
    with pytest.raises(TartarusError):
        await running
    log = sandbox.log._path
    again = await attached(sandbox, store, await restored(guest, channel, session.channel), session, log)
    again.supervise()
    again.detach()
    assert again.main is not None
    await again.main.write_stdin(b"the last\n")
    events = await _cell(again.context(context_id), "x + 1")
    assert any(isinstance(event, CellResult) and "42" in str(event.data) for event in events)
    record = await asyncio.wait_for(again.wait(), 20)
    assert (record.exit_code, record.reason) == (9, Reason.COMPLETED)
    assert await _logged(again.log) == ALL_LINES + b"the last\n"


async def _logged(log: OutputLog) -> bytes:
    return b"".join([entry.data async for entry in log.read(follow=True)])


async def test_it_can_be_ended_while_it_is_asleep(node: Node, store: SandboxStore) -> None:
    sandbox = await create(node)
    session, guest, channel = await asleep(sandbox)
    waiting = asyncio.create_task(sandbox.files.stat("/"))
    await asyncio.sleep(0)
    records = await asyncio.gather(sandbox.kill(), sandbox.kill(), sandbox.wait())
    assert records[2].state is State.KILLED
    with pytest.raises(GuestFailed):
        await waiting
    with pytest.raises(InvalidState):
        await sandbox.wake_up(guest)
    assert session.main is None
    channel.close()
    await guest.destroy()
    assert await store.alive() == []


async def test_its_time_limit_counts_while_it_is_asleep(node: Node) -> None:
    sandbox = await create(node, timeout_s=0.6)
    _, guest, channel = await asleep(sandbox)
    record = await asyncio.wait_for(sandbox.wait(), 20)
    assert record.state is State.TIMED_OUT
    channel.close()
    await guest.destroy()


async def test_a_paused_one_stays_paused(node: Node) -> None:
    sandbox = await create(node)
    await sandbox.pause()
    await sandbox.quiesce()
    sandbox.unquiesce()
    await asyncio.sleep(0.05)
    with pytest.raises(InvalidState):
        await sandbox.exec(ExecSpec(argv=("true",)))
    await sandbox.resume()
    process = await sandbox.exec(ExecSpec(argv=("true",)))
    assert (await process.wait()).code == 0


async def test_one_that_has_just_ended_is_not_saved(node: Node) -> None:
    sandbox = await create(node, "true")
    await finish(sandbox)
    with pytest.raises(InvalidState):
        await sandbox.quiesce()


async def test_a_session_that_is_not_its_guests_own(node: Node, store: SandboxStore, tmp_path: Path) -> None:
    sandbox = await create(node, "sleep", "1000")
    session, guest, channel = await asleep(sandbox)
    state = msgspec.structs.replace(session.channel, streams=())
    again = await restored(guest, channel, state)
    with pytest.raises(GuestFailed, match="broke its protocol"):
        await attached(sandbox, store, again, session, tmp_path / "log")
    for record in await store.alive():
        await store.transition(record.id, {State.RUNNING}, State.LOST, reason=Reason.LOST)
    await sandbox.kill()
    await guest.destroy()


@pytest.mark.parametrize("isolation", [Isolation.CONTAINER, Isolation.PROCESS])
async def test_one_that_has_just_ended_is_not_paused(node: Node, isolation: Isolation) -> None:
    """Its group may be gone when the request comes through: a clear error, not the kernel's."""
    sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation))
    await sandbox.kill()
    for work in (sandbox.guest.pause, sandbox.guest.resume):
        with pytest.raises(GuestFailed, match="ended"):
            await work()
