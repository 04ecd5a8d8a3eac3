"""Node.js and R start warm in sandboxes that were made ahead; what a spare can't be starts cold; nothing stays."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest
from tests.node.conftest import TENANT, finish, leftovers
from tests.node.test_sessions import asleep, attached, restored

from tartarus.guest.contexts import CellResult
from tartarus.images import catalogue
from tartarus.model.errors import InvalidRequest, NameTaken
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, Reason, ResourceRequest, SandboxSpec
from tartarus.model.states import State
from tartarus.model.template import Template, WarmUp
from tartarus.node import offers
from tartarus.node.service import Node
from tartarus.node.spares import Spare
from tartarus.store.sandboxes import SandboxStore

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "node")]
MIB = 1024**2


def _template(name: str, **how: object) -> Template:
    host = catalogue()["host"]
    r = name.startswith("r-")
    warm_up = WarmUp(
        interpreter="/usr/bin/Rscript" if r else "/usr/bin/node", kind="r" if r else "node",
        argv0=("Rscript",) if r else ("node",),
    )  # fmt: skip
    return msgspec.structs.replace(host, id=name, warm_up=msgspec.structs.replace(warm_up, **how))


@pytest.fixture
async def node(node: Node, monkeypatch: pytest.MonkeyPatch) -> Node:
    """The node with templates whose interpreters wait in spares."""
    own = [
        _template("js"),
        _template("js-two", spares=2),
        _template("js-none", spares=0),
        _template("js-bad", imports=("no-such-module",)),
        _template("js-slow", script="while (true) {}"),
        _template("r-plain"),
    ]
    known = catalogue() | {template.id: template for template in own}
    monkeypatch.setattr(offers, "catalogue", lambda: known)
    return node


def ready(node: Node) -> list[Spare]:
    return [spare for shelf in node._spares._shelves.values() for spare in shelf.spares]


async def stocked(
    node: Node, template: str = "js", isolation: Isolation = Isolation.CONTAINER, count: int = 1
) -> Spare:
    """Ask once, which has a spare made, and wait for that."""
    await finish(await node.create(TENANT, _spec(template, isolation)))
    return await restocked(node, count)


async def restocked(node: Node, count: int = 1) -> Spare:
    async with asyncio.timeout(30):
        while len(ready(node)) < count:
            await asyncio.sleep(0.01)
    return ready(node)[0]


def _spec(template: str = "js", isolation: Isolation = Isolation.CONTAINER, *argv: str, **how: object) -> SandboxSpec:
    command = ("Rscript", "-e", "6*7") if template.startswith("r-") else ("node", "-p", "6*7")
    return SandboxSpec(template=template, isolation=isolation, command=ExecSpec(argv=argv or command), **how)  # type: ignore[arg-type]


LEVELS = [
    ("js", Isolation.CONTAINER),
    ("js", Isolation.PROCESS),
    # At process level R finds no directory for its temporary files, and does not start.
    pytest.param("r-plain", Isolation.CONTAINER, marks=pytest.mark.needs("r")),
    pytest.param("js", Isolation.GVISOR, marks=pytest.mark.needs("runsc")),
    pytest.param("r-plain", Isolation.GVISOR, marks=pytest.mark.needs("r", "runsc")),
    pytest.param("js", Isolation.MICROVM, marks=pytest.mark.needs("microvm")),
    pytest.param("r-plain", Isolation.MICROVM, marks=pytest.mark.needs("r", "microvm")),
]


@pytest.mark.parametrize(("template", "isolation"), LEVELS)
async def test_the_second_sandbox_starts_warm_in_a_spare(
    node: Node, store: SandboxStore, isolation: Isolation, template: str
) -> None:
    first = await finish(await node.create(TENANT, _spec(template, isolation)))
    spare = await restocked(node)
    second = await finish(await node.create(TENANT, _spec(template, isolation)))
    assert (first.out, first.err, first.record.warm) == (second.out, b"", False)
    assert (second.record.id, second.record.warm, second.record.state) == (spare.id, True, State.SUCCEEDED)
    assert (await store.get(TENANT, spare.id)).warm
    assert (await restocked(node)).id != spare.id


async def test_its_name_is_its_hosts(node: Node) -> None:
    spare = await stocked(node)
    ran = await finish(await node.create(TENANT, _spec("js", Isolation.CONTAINER, "node", "-p", "os.hostname()")))
    assert ran.out.decode().strip() == spare.id


async def test_environment_directory_input_and_exit_are_the_commands(node: Node) -> None:
    await stocked(node)
    code = "process.stdin.on('data', (d) => console.log(String(d), process.env.A, process.cwd())); process.exitCode = 3"
    command = ExecSpec(argv=("node", "-e", code), env={"A": "b"}, workdir="/usr", stdin=True)
    sandbox = await node.create(TENANT, SandboxSpec(template="js", isolation=Isolation.CONTAINER, command=command))
    assert sandbox.main is not None
    await sandbox.main.write_stdin(b"in")
    sandbox.main.close_stdin()
    ran = await finish(sandbox)
    assert (ran.out, ran.record.exit_code, ran.record.warm) == (b"in b /usr\n", 3, True)
    assert node.log(ran.record) is not None


async def test_a_sandbox_without_a_command_runs_its_first_program_warm(node: Node) -> None:
    spare = await stocked(node)
    sandbox = await node.create(TENANT, SandboxSpec(template="js", isolation=Isolation.CONTAINER))
    assert (sandbox.record.id, sandbox.record.warm) == (spare.id, True)
    await sandbox.files.write("/work/program.js", b"console.log(process.argv[2], require.main === module)")
    other = await sandbox.exec(ExecSpec(argv=("true",)))
    assert not (await other.started())[1]
    for warm in (True, False):
        process = await sandbox.exec(ExecSpec(argv=("node", "/work/program.js", "x")))
        assert (await process.started())[1] is warm
        assert await process.read() == (1, b"x true\n")
    await sandbox.kill()


@pytest.mark.parametrize(
    "spec",
    [
        _spec("js", Isolation.CONTAINER, "sh", "-c", "echo 42"),
        _spec("js", Isolation.CONTAINER, "node", "--no-warnings", "-p", "42"),
        _spec("js", Isolation.CONTAINER, "/usr/bin/node", "-p", "42"),
        _spec(env={"NODE_OPTIONS": "--no-warnings"}),
        _spec(resources=ResourceRequest(disk_bytes=64 * MIB)),
        _spec(resources=ResourceRequest(memory_bytes=256 * MIB)),
        _spec(mounts=(Mount("/usr/share", "/mnt", read_only=True),)),
        msgspec.structs.replace(_spec(), command=ExecSpec(argv=("node", "-p", "6*7"), tty=True)),
    ],
)
async def test_what_a_spare_can_not_be_starts_cold_and_leaves_it(node: Node, spec: SandboxSpec) -> None:
    spare = await stocked(node)
    ran = await finish(await node.create(TENANT, spec))
    assert (b"42" in ran.out, ran.record.warm, ran.record.state) == (True, False, State.SUCCEEDED)
    assert ready(node) == [spare]


async def test_higher_limits_are_given_with_it(node: Node) -> None:
    spare = await stocked(node)
    request = ResourceRequest(memory_bytes=1024 * MIB, cpu_milli=2000, pids=600)
    code = "let kept = []; for (let i = 0; i < 70; i++) kept.push(Buffer.alloc(10 << 20, 1)); console.log(kept.length)"
    ran = await finish(
        await node.create(TENANT, _spec("js", Isolation.CONTAINER, "node", "-e", code, resources=request))
    )
    assert (ran.record.id, ran.out) == (spare.id, b"70\n")


async def test_process_level_limits_are_fixed(node: Node) -> None:
    spare = await stocked(node, isolation=Isolation.PROCESS)
    higher = _spec("js", Isolation.PROCESS, resources=ResourceRequest(memory_bytes=1024 * MIB))
    assert not (await finish(await node.create(TENANT, higher))).record.warm
    assert ready(node) == [spare]


async def test_memory_limits_hold_in_a_spare(node: Node) -> None:
    await stocked(node)
    code = "let kept = []; while (true) kept.push(Buffer.alloc(10 << 20, 1))"
    record = (await finish(await node.create(TENANT, _spec("js", Isolation.CONTAINER, "node", "-e", code)))).record
    assert (record.warm, record.state, record.reason) == (True, State.FAILED, Reason.RESOURCE_LIMIT)


async def test_two_spares_where_two_are_asked_for(node: Node) -> None:
    await stocked(node, "js-two", count=2)
    ran = [await node.create(TENANT, _spec("js-two")) for _ in range(2)]
    assert all([(await finish(sandbox)).record.warm for sandbox in ran])
    assert not ready(node) or len(ready(node)) <= 2


async def test_none_where_none_are(node: Node) -> None:
    await finish(await node.create(TENANT, _spec("js-none")))
    await asyncio.sleep(0.2)
    assert node._spares._shelves == {}


async def test_a_warm_up_that_fails_leaves_cold_starts(node: Node) -> None:
    assert (await finish(await node.create(TENANT, _spec("js-bad")))).out == b"42\n"
    (shelf,) = node._spares._shelves.values()
    async with asyncio.timeout(30):
        while not shelf.failures:
            await asyncio.sleep(0.01)
    ran = await finish(await node.create(TENANT, _spec("js-bad")))
    assert (ran.out, ran.record.warm) == (b"42\n", False)
    assert shelf.filling is None  # not again at once
    assert node._spares.ids == set()


async def test_a_spare_whose_interpreter_dies_serves_nobody(node: Node) -> None:
    spare = await stocked(node)
    for pid in _tree(spare.guest.pid):
        if b"node" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
            os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while node._spares.ids:
            await asyncio.sleep(0.01)
    ran = await finish(await node.create(TENANT, _spec()))
    assert (ran.out, ran.record.warm) == (b"42\n", False)
    assert ran.record.id != spare.id


async def test_a_stopped_interpreter_is_ended_and_the_command_starts_cold(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tartarus.guest.parked.ANSWER_S", 0.3)
    spare = await stocked(node)
    for pid in _tree(spare.guest.pid):
        if b"node" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
            os.kill(pid, signal.SIGSTOP)
    ran = await finish(await node.create(TENANT, _spec()))
    assert (ran.out, ran.record.warm, ran.record.id) == (b"42\n", False, spare.id)


async def test_a_name_that_is_taken_costs_nothing_but_the_spare(node: Node) -> None:
    await stocked(node)
    held = await node.create(TENANT, SandboxSpec(template="js-none", isolation=Isolation.CONTAINER, name="held"))
    with pytest.raises(NameTaken):
        await node.create(TENANT, _spec(name="held"))
    await restocked(node)
    await held.kill()


async def test_a_missing_workdir_is_the_callers_error(node: Node) -> None:
    await stocked(node)
    with pytest.raises(InvalidRequest, match="working directory"):
        await node.create(TENANT, _spec(workdir="/no/such"))


async def test_spares_are_dropped_when_memory_is_short(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await stocked(node)
    monkeypatch.setattr(node._spares, "_meminfo", lambda: (5, 100))
    await node._reconcile_once()
    assert ready(node) == []
    async with asyncio.timeout(10):
        while node._spares.ids:
            await asyncio.sleep(0.01)
    await finish(await node.create(TENANT, _spec()))
    await asyncio.sleep(0.3)
    assert ready(node) == []


async def test_reconciling_leaves_spares_alone(node: Node) -> None:
    spare = await stocked(node)
    await node._reconcile_once()
    assert ready(node) == [spare]
    assert (await finish(await node.create(TENANT, _spec()))).record.id == spare.id


async def test_a_new_one_takes_the_place_of_those_that_stand(node: Node) -> None:
    spare = await stocked(node)
    (shelf,) = node._spares._shelves.values()
    await node._spares.renew(shelf.rootfs, Isolation.CONTAINER)
    (fresh,) = ready(node)
    assert fresh.id != spare.id


async def test_a_restarted_node_ends_spares_that_were_left(state_dir: Path, store: SandboxStore, node: Node) -> None:
    spare = await stocked(node)
    await node.audit.close()  # as a daemon that is gone has let go of it
    other = Node(node._settings, store)
    await other.start()
    try:
        assert spare.id not in leftovers(state_dir)
    finally:
        await other.stop(Reason.NODE_DRAIN)


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize(("template", "isolation"), LEVELS[:-1])
async def test_code_contexts(node: Node, template: str, isolation: Isolation) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(template=template, isolation=isolation))
    opened = [await sandbox.open_context() for _ in range(2)]
    for value, context_id in enumerate(opened):
        code = f"x = {value}" if template == "js" else f"x <- {value}"
        async for _ in sandbox.context(context_id).run(code):
            pass
    for value, context_id in enumerate(opened):
        events = [event async for event in sandbox.context(context_id).run("x")]
        assert events[0] == CellResult({"text/plain": str(value) if template == "js" else f"[1] {value}"}, is_main=True)
        await sandbox.close_context(context_id)
    if isolation is Isolation.CONTAINER:
        assert await sandbox.files.list("/dev/shm") == []
    await sandbox.kill()


async def test_the_first_context_takes_the_parked_interpreter(node: Node) -> None:
    await stocked(node)
    sandbox = await node.create(TENANT, SandboxSpec(template="js", isolation=Isolation.CONTAINER))
    context = sandbox.context(await sandbox.open_context())
    events = [event async for event in context.run("process.uptime() >= 0 && process.pid")]
    assert isinstance(events[0], CellResult)
    assert sandbox._parked is not None
    assert not sandbox._parked.waits
    await sandbox.kill()


async def test_a_hostile_neighbour_of_the_parked_interpreter_fools_only_itself(node: Node) -> None:
    await stocked(node)
    sandbox = await node.create(TENANT, SandboxSpec(template="js", isolation=Isolation.CONTAINER))
    answer = (
        "for p in /proc/[0-9]*; do grep -q '[r]unner' $p/cmdline && printf '\\006fooled' > $p/fd/1; done; echo done"
    )
    attack = await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", answer)))
    assert await attack.read() == (1, b"done\n")
    assert sandbox._parked is not None
    async with asyncio.timeout(5):
        await sandbox._parked.broken()
    process = await sandbox.exec(ExecSpec(argv=("node", "-p", "6*7")))
    assert not (await process.started())[1]
    assert await process.read() == (1, b"42\n")
    await sandbox.kill()


async def test_templates_with_the_same_files_have_spares_of_their_own(node: Node) -> None:
    await stocked(node, "js")
    await stocked(node, "js-two", count=3)
    assert sorted(spare.rootfs.template.id for spare in ready(node)) == ["js", "js-two", "js-two"]


async def test_a_slow_warm_up_keeps_no_other_template_waiting(node: Node) -> None:
    await finish(await node.create(TENANT, _spec("js-slow")))
    async with asyncio.timeout(30):
        while not any(shelf.filling for shelf in node._spares._shelves.values()):
            await asyncio.sleep(0.01)
    spare = await stocked(node)
    assert spare.rootfs.template.id == "js"
    assert not ready(node)[1:]


async def test_a_program_in_a_spare_goes_on_with_another_daemon(
    node: Node, store: SandboxStore, tmp_path: Path
) -> None:
    """What it said before anybody read it, too."""
    await stocked(node)
    code = (
        "console.log(1); console.error(2); process.stdin.on('data', (d) => { console.log(String(d)); process.exit(5) })"
    )
    command = ExecSpec(argv=("node", "-e", code), stdin=True)
    sandbox = await node.create(TENANT, SandboxSpec(template="js", isolation=Isolation.CONTAINER, command=command))
    assert sandbox.main is not None
    assert sandbox.record.warm
    await asyncio.sleep(0.3)
    session, guest, channel = await asleep(sandbox)
    await sandbox.kill()
    again = await attached(sandbox, store, await restored(guest, channel, session.channel), session, tmp_path / "log")
    again.supervise()
    assert again.main is not None
    assert (await again.main.started())[1]
    await again.main.write_stdin(b"in")
    ran = await finish(again)
    assert (ran.out, ran.err, ran.record.exit_code) == (b"1\nin\n", b"2\n", 5)


async def test_an_interpreter_that_still_waits_serves_after_a_restore(
    node: Node, store: SandboxStore, tmp_path: Path
) -> None:
    await stocked(node)
    sandbox = await node.create(TENANT, SandboxSpec(template="js", isolation=Isolation.CONTAINER))
    session, guest, channel = await asleep(sandbox)
    assert session.parked is not None
    await sandbox.kill()
    again = await attached(sandbox, store, await restored(guest, channel, session.channel), session, tmp_path / "log")
    again.supervise()
    for warm in (True, False):
        process = await again.exec(ExecSpec(argv=("node", "-p", "6*7")))
        assert (await process.started())[1] is warm
        assert await process.read() == (1, b"42\n")
    await again.kill()
