"""A sandbox's life at both levels: what comes out, how it ends, what it may use, and that nothing stays."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests.node.conftest import TENANT, Run, both_levels, finish

from tartarus.model.errors import (
    CommandNotFound,
    InvalidRequest,
    InvalidState,
    NotExecutable,
    TemplateNotFound,
    Unsupported,
)
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, Reason, ResourceRequest, SandboxSpec
from tartarus.model.states import State
from tartarus.node.service import Node
from tartarus.store.sandboxes import SandboxStore

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]
MIB = 1024**2


@both_levels
async def test_output_and_exit_code_come_through(run: Run, isolation: Isolation) -> None:
    ran = await run(isolation, "/bin/sh", "-c", "printf out; printf err >&2; exit 7")
    assert (ran.out, ran.err) == (b"out", b"err")
    assert (ran.record.state, ran.record.exit_code, ran.record.reason) == (State.FAILED, 7, Reason.COMPLETED)
    assert ran.record.isolation is isolation
    assert ran.record.start_ms is not None


@both_levels
async def test_success_is_recorded(run: Run, isolation: Isolation) -> None:
    assert (await run(isolation, "true")).record.state is State.SUCCEEDED


@both_levels
async def test_input_is_binary_safe(run: Run, isolation: Isolation) -> None:
    data = bytes(range(256)) * 1000
    assert (await run(isolation, "cat", stdin=data)).out == data


@both_levels
async def test_death_by_signal_is_told_apart(run: Run, isolation: Isolation) -> None:
    record = (await run(isolation, "/bin/sh", "-c", "kill -SEGV $$")).record
    assert (record.exit_code, record.exit_signal, record.state) == (139, 11, State.FAILED)


@both_levels
async def test_python_starts_warm_the_second_time(node: Node, isolation: Isolation) -> None:
    spec = SandboxSpec(isolation=isolation, command=ExecSpec(argv=("python3", "-c", "print(6*7)")))
    await finish(await node.create(TENANT, spec))
    sandbox = await node.create(TENANT, spec)
    assert sandbox.main is not None
    assert (await sandbox.main.started())[1]
    ran = await finish(sandbox)
    assert ran.out == b"42\n"
    assert ran.record.warm


@both_levels
async def test_environment_and_workdir(run: Run, isolation: Isolation) -> None:
    ran = await run(isolation, "/bin/sh", "-c", 'echo "$A-$HOME"; pwd', env={"A": "b"}, workdir="/usr")
    first, second = ran.out.decode().splitlines()
    assert first.startswith("b-/")
    assert second == "/usr"


@both_levels
async def test_missing_command_is_an_error_and_leaves_only_a_record(
    node: Node, store: SandboxStore, isolation: Isolation
) -> None:
    with pytest.raises(CommandNotFound):
        await node.create(
            TENANT, SandboxSpec(isolation=isolation, name="missing", command=ExecSpec(argv=("/no/such",)))
        )
    record = await store.get(TENANT, "missing")
    assert (record.state, record.reason) == (State.FAILED, Reason.START_FAILED)


@both_levels
async def test_not_executable(node: Node, isolation: Isolation) -> None:
    with pytest.raises(NotExecutable):
        await node.create(TENANT, SandboxSpec(isolation=isolation, command=ExecSpec(argv=("/etc/passwd",))))


async def test_missing_workdir_is_refused(node: Node) -> None:
    with pytest.raises(InvalidRequest, match="working directory"):
        await node.create(TENANT, SandboxSpec(command=ExecSpec(argv=("true",), workdir="/no/such")))


async def test_unknown_template_is_refused_before_anything_happens(node: Node, store: SandboxStore) -> None:
    with pytest.raises(TemplateNotFound, match="python-ds"):
        await node.create(TENANT, SandboxSpec(template="nope", name="nope"))
    assert (await store.list(TENANT, name="nope"))[0] == []


@both_levels
async def test_deadline_ends_the_sandbox(run: Run, isolation: Isolation) -> None:
    # A guest with a kernel of its own takes longer than that to start.
    own_kernel = isolation in (Isolation.GVISOR, Isolation.MICROVM)
    record = (await run(isolation, "sleep", "60", timeout_s=3.0 if own_kernel else 0.2)).record
    assert (record.state, record.reason) == (State.TIMED_OUT, Reason.TIMEOUT)


@both_levels
async def test_kill_ends_everything_and_may_be_repeated(node: Node, isolation: Isolation) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation, command=ExecSpec(argv=("sleep", "60"))))
    await sandbox.kill()
    await sandbox.kill()
    record = await sandbox.wait()
    assert (record.state, record.reason) == (State.KILLED, Reason.USER_REQUEST)


@both_levels
async def test_escaped_children_end_with_the_sandbox(node: Node, isolation: Isolation) -> None:
    code = (
        "import os,time\nif os.fork()==0:\n os.setsid()\n if os.fork()==0:\n  time.sleep(600)\n os._exit(0)\n"
        "os.wait();print('up',flush=True);time.sleep(600)"
    )
    sandbox = await node.create(
        TENANT, SandboxSpec(isolation=isolation, command=ExecSpec(argv=("python3", "-c", code)))
    )
    assert sandbox.main is not None
    assert await sandbox.main.read() == (1, b"up\n")
    pids = _pids_in(sandbox.record.id)
    # Of a machine, the host sees the monitor.
    assert len(pids) >= (1 if isolation is Isolation.MICROVM else 3)
    await sandbox.kill()
    assert [pid for pid in pids if _runs(pid)] == []


def _runs(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def _pids_in(sandbox_id: str) -> list[int]:
    for procs in Path("/sys/fs/cgroup").glob(f"**/{sandbox_id}/cgroup.procs"):
        return [int(word) for word in procs.read_text().split()]
    return []


@both_levels
async def test_memory_limit_ends_the_command_with_a_reason(run: Run, isolation: Isolation) -> None:
    code = "b=[]\nwhile True: b.append(bytearray(1<<20))"
    record = (await run(isolation, "python3", "-c", code, resources=ResourceRequest(memory_bytes=64 * MIB))).record
    assert record.state is State.FAILED
    if isolation is Isolation.CONTAINER:
        assert (record.reason, record.exit_signal) == (Reason.RESOURCE_LIMIT, 9)


@both_levels
async def test_process_limit_holds(run: Run, isolation: Isolation) -> None:
    code = (
        "import os,time,signal\nn=0\n"
        "try:\n"
        " while n<200:\n"
        "  pid=os.fork()\n"
        "  if pid==0:\n   time.sleep(30); os._exit(0)\n"
        "  n+=1\n"
        "except OSError as e: print(n<=20, type(e).__name__)"
    )
    ran = await run(isolation, "python3", "-c", code, resources=ResourceRequest(pids=20))
    assert ran.out == b"True BlockingIOError\n"


async def test_disk_limit_holds(run: Run) -> None:
    ran = await run(
        Isolation.CONTAINER, "/bin/sh", "-c", "head -c 20000000 /dev/zero > /work/big || stat -c %s /work/big",
        resources=ResourceRequest(disk_bytes=8 * MIB),
    )  # fmt: skip
    assert b"No space left" in ran.err
    assert int(ran.out) <= 8 * MIB


@both_levels
async def test_use_of_disk_is_seen(node: Node, isolation: Isolation) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation))
    filling = await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "head -c 3000000 /dev/zero > $HOME/file")))
    assert (await filling.wait()).shell_status == 0
    async with asyncio.timeout(15):
        while not 3_000_000 <= (await sandbox.stats()).disk_bytes < 4_000_000:
            assert isolation is Isolation.MICROVM, "only a machine's kernel keeps it to itself for a while"
            await asyncio.sleep(0.1)
    await sandbox.kill()


async def test_template_limits_hold_unless_others_are_asked(node: Node) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(resources=ResourceRequest(pids=33)))
    limits = sandbox.record.spec.resources
    assert (limits.pids, limits.memory_bytes) == (33, 512 * MIB)
    assert (await sandbox.stats()).memory_limit_bytes == 512 * MIB
    await sandbox.kill()


@both_levels
async def test_pause_stops_time_for_the_command(node: Node, isolation: Isolation) -> None:
    loop = "while :; do echo x; sleep 0.02; done"
    sandbox = await node.create(
        TENANT, SandboxSpec(isolation=isolation, command=ExecSpec(argv=("/bin/sh", "-c", loop)))
    )
    assert sandbox.main is not None
    await sandbox.main.read()
    await sandbox.pause()
    assert sandbox.record.state is State.PAUSED
    with pytest.raises(InvalidState, match="paused"):
        await sandbox.exec(ExecSpec(argv=("true",)))
    while True:  # what was already on its way
        try:
            await asyncio.wait_for(sandbox.main.read(), 0.3)
        except TimeoutError:
            break
    await sandbox.resume()
    assert await sandbox.main.read() is not None
    await sandbox.pause()
    await sandbox.kill()
    assert (await sandbox.wait()).state is State.KILLED


@both_levels
async def test_commands_beside_the_main_one(node: Node, isolation: Isolation) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation))
    first = await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "echo one > note")))
    assert (await first.wait()).shell_status == 0
    second = await sandbox.exec(ExecSpec(argv=("cat", "note")))
    assert await second.read() == (1, b"one\n")
    await sandbox.kill()
    with pytest.raises(InvalidState):
        await sandbox.exec(ExecSpec(argv=("true",)))


async def test_mounts_show_host_files_with_the_callers_ids(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host")
    script = (
        "cat /data/in; echo new > /data/out; touch /fixed/x 2>/dev/null || echo read-only; "
        "chmod u+s /data/out 2>/dev/null || echo no-setuid"
    )
    ran = await run(
        Isolation.CONTAINER, "/bin/sh", "-c", script,
        mounts=(Mount(str(tmp_path), "/data"), Mount(str(tmp_path), "/fixed", read_only=True)),
    )  # fmt: skip
    assert ran.out == b"from the hostread-only\nno-setuid\n", ran
    assert (tmp_path / "out").read_text() == "new\n"
    assert (tmp_path / "out").stat().st_uid == os.getuid()
    assert not (tmp_path / "x").exists()


async def test_a_single_file_can_be_mounted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("yes")
    ran = await run(
        Isolation.CONTAINER,
        "cat",
        "/etc/my/config",
        mounts=(Mount(str(tmp_path / "config"), "/etc/my/config", read_only=True),),
    )
    assert ran.out == b"yes"


async def test_mounts_are_refused_where_they_cant_be(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="mount"):
        await run(Isolation.PROCESS, "true", mounts=(Mount(str(tmp_path), "/data"),))
    with pytest.raises(InvalidRequest, match="no-such"):
        await run(Isolation.CONTAINER, "true", mounts=(Mount("/no-such", "/data"),))


@both_levels
async def test_two_sandboxes_share_nothing(node: Node, isolation: Isolation) -> None:
    one = await node.create(TENANT, SandboxSpec(isolation=isolation))
    two = await node.create(TENANT, SandboxSpec(isolation=isolation))
    write = await one.exec(
        ExecSpec(argv=("/bin/sh", "-c", "echo secret > $HOME/secret; echo secret > /tmp/tartarus-probe"))
    )
    await write.wait()
    look = await two.exec(ExecSpec(argv=("/bin/sh", "-c", "cat $HOME/secret /tmp/tartarus-probe")))
    assert (await look.wait()).shell_status != 0
    assert not Path("/tmp/tartarus-probe").exists()
    await one.kill()
    await two.kill()


async def test_clones_of_one_interpreter_have_their_own_randomness(run: Run) -> None:
    code = "import random, os, uuid; print(random.random(), os.urandom(8).hex(), uuid.uuid4())"
    answers = {(await run(Isolation.CONTAINER, "python3", "-c", code)).out for _ in range(4)}
    assert len(answers) == 4


@both_levels
async def test_a_dead_interpreter_is_replaced(node: Node, run: Run, isolation: Isolation) -> None:
    await run(isolation, "python3", "-c", "1")
    for entry in node._pool._entries.values():
        zygote = getattr(entry.snapshot, "_zygote", None)
        if zygote is not None:
            os.kill(zygote.pid, 9)
    await asyncio.sleep(0.05)
    assert (await run(isolation, "python3", "-c", "print('again')")).out == b"again\n"


async def test_a_process_level_interpreter_warms_up_confined(node: Node, run: Run) -> None:
    await run(Isolation.PROCESS, "python3", "-c", "1")
    (zygote,) = [entry.snapshot._zygote for entry in node._pool._entries.values() if entry.snapshot is not None]  # type: ignore[attr-defined]
    status = dict(line.split(":\t") for line in Path(f"/proc/{zygote.pid}/status").read_text().splitlines())
    setuid_and_setgid = "00000000000000c0"
    assert "0" not in status["Uid"].split()
    assert (status["CapEff"], status["CapPrm"]) == (setuid_and_setgid, setuid_and_setgid)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


async def test_the_log_keeps_what_the_main_command_wrote(node: Node, run: Run) -> None:
    ran = await run(Isolation.CONTAINER, "/bin/sh", "-c", "echo a; sleep 0.05; echo b >&2")
    entries = [entry async for entry in node.log(ran.record).read()]
    assert [(entry.stream, entry.data) for entry in entries] == [(1, b"a\n"), (2, b"b\n")]
    assert entries[0].time_ns < entries[1].time_ns


async def test_a_detached_command_is_drained_into_the_log(node: Node) -> None:
    spec = SandboxSpec(command=ExecSpec(argv=("/bin/sh", "-c", "head -c 3000000 /dev/zero; echo end")))
    sandbox = await node.create(TENANT, spec)
    sandbox.detach()
    record = await sandbox.wait()
    size = sum([len(entry.data) async for entry in node.log(record).read(follow=True)])
    assert (record.state, size) == (State.SUCCEEDED, 3_000_004)


async def test_levels_are_proved_by_starting_them(node: Node) -> None:
    reports = {report.isolation: report for report in await node.levels()}
    assert reports[Isolation.CONTAINER].ok
    assert reports[Isolation.PROCESS].ok
    assert reports[Isolation.CONTAINER].proved_ms is not None
