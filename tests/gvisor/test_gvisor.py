"""What is particular to gVisor: its own kernel, restored guests, and that the end of any part ends all of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from tests.node.conftest import TENANT, Run, finish, leftovers

from tartarus.guest.binary import agent_binary
from tartarus.guest.contexts import CellDone, CellResult
from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, ResourceRequest, Resources, SandboxSpec
from tartarus.model.states import State
from tartarus.model.template import Template
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.runtimes.base import GuestRequest, RootFs
from tartarus.runtimes.cgroups import open_hierarchy
from tartarus.runtimes.gvisor import platforms
from tartarus.runtimes.gvisor.platforms import Wanted
from tartarus.runtimes.gvisor.ready import ReadyRunsc
from tartarus.runtimes.gvisor.runtime import GvisorRuntime
from tartarus.runtimes.gvisor.snapshot import GvisorSnapshot
from tartarus.runtimes.idmap import IdMap, host_id_map

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "runsc")]
GVISOR = Isolation.GVISOR
MIB = 1024**2


async def _start(node: Node, *argv: str, **spec: object) -> Sandbox:
    command = ExecSpec(argv=argv) if argv else None
    return await node.create(TENANT, SandboxSpec(isolation=GVISOR, command=command, **spec))  # type: ignore[arg-type]


def _processes(sandbox_id: str) -> dict[str, int]:
    """The host's processes of a sandbox: pid by the name of its program."""
    found: dict[str, int] = {}
    # Beside us others make groups, and remove them.
    with contextlib.suppress(OSError):
        for procs in Path("/sys/fs/cgroup").glob(f"**/{sandbox_id}/cgroup.procs"):
            for pid in procs.read_text().split():
                name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                found.setdefault(Path(name).name, int(pid))
    return found


async def test_the_kernel_is_gvisors(run: Run) -> None:
    assert b"Starting gVisor" in (await run(GVISOR, "dmesg")).out


async def test_a_restored_guest_has_its_own_randomness(node: Node) -> None:
    code = "import os,random,uuid; print(os.urandom(8).hex(), random.random(), uuid.uuid4())"
    seen = []
    for _ in range(3):
        sandbox = await _start(node, "python3", "-c", code)
        ran = await finish(sandbox)
        seen.append(ran.out.split())
        assert len(seen[-1]) == 3
    assert seen[2][0] != seen[1][0]
    assert len({part for parts in seen for part in parts}) == 9


async def test_a_restored_guest_runs_warm_and_at_the_hosts_time(node: Node) -> None:
    await finish(await _start(node, "python3", "-c", "pass"))
    loop = asyncio.get_running_loop()
    began = loop.time()
    sandbox = await _start(node, "python3", "-c", "import os, time; print(os.uname().nodename, time.time())")
    ran = await finish(sandbox)
    name, told = ran.out.split()
    assert ran.record.warm
    assert name.decode() == ran.record.id
    assert abs(time.time() - float(told)) < loop.time() - began + 1


async def test_what_is_asked_beyond_the_templates_process_limit_starts_cold(node: Node) -> None:
    ran = await finish(await _start(node, "python3", "-c", "print(1)", resources=ResourceRequest(pids=9)))
    assert (ran.out, ran.record.warm) == (b"1\n", False)


def _snapshot(node: Node) -> GvisorSnapshot:
    """The one template's that these tests warm."""
    runtime = node._levels.runtimes[GVISOR]
    assert isinstance(runtime, GvisorRuntime)
    (snapshot,) = runtime._snapshots
    return snapshot


async def _ready(node: Node) -> tuple[GvisorSnapshot, ReadyRunsc]:
    """The runsc that was started ahead, once there is one."""
    await finish(await _start(node, "python3", "-c", "pass"))
    snapshot = _snapshot(node)
    # A process that is just being started has no name yet.
    while snapshot._ready is None or "runsc-sandbox" not in _processes(snapshot._ready.parts.name):
        await asyncio.sleep(0.02)
    return snapshot, snapshot._ready


async def test_a_warm_guest_is_restored_into_a_runsc_started_ahead(node: Node) -> None:
    snapshot, ready = await _ready(node)
    sandbox = await _start(node, "python3", "-c", "print(6*7, flush=True); import time; time.sleep(60)")
    assert sandbox.main is not None
    assert await sandbox.main.read() == (1, b"42\n")
    name = ready.parts.name
    assert "runsc-sandbox" in _processes(name)
    await sandbox.kill()
    assert not _processes(name)
    left = {path.name for path in Path(f"/proc/{snapshot.nursery.pid}/root/w/state").iterdir()}
    assert not [file for file in left if f"{name}_" in file or f"{name}." in file]


async def test_a_limit_that_was_asked_for_holds_in_a_runsc_started_ahead(node: Node) -> None:
    await _ready(node)
    code = "x=bytearray(400*1024*1024)\nfor i in range(0,len(x),4096): x[i]=1\nprint('held')"
    sandbox = await _start(node, "python3", "-c", code, resources=ResourceRequest(memory_bytes=64 * MIB))
    ran = await finish(sandbox)
    assert ran.out == b""
    assert ran.record.state is not State.SUCCEEDED


async def test_a_runsc_started_ahead_that_died_is_passed_over(node: Node) -> None:
    _, ready = await _ready(node)
    os.kill(_processes(ready.parts.name)["runsc-sandbox"], signal.SIGKILL)
    while ready.alive:
        await asyncio.sleep(0.02)
    assert (await finish(await _start(node, "python3", "-c", "print(6*7)"))).out == b"42\n"


async def test_there_is_no_network_but_loopback(run: Run) -> None:
    code = (
        "import socket\n"
        "a=socket.create_server(('127.0.0.1',0)); socket.create_connection(a.getsockname()).close()\n"
        "try: socket.create_connection(('192.0.2.1',80),2)\n"
        "except OSError as e: print(type(e).__name__, e.errno)\n"
    )
    assert (await run(GVISOR, "python3", "-c", code)).out == b"OSError 113\n"  # no route to host


async def test_the_agent_of_a_template_and_its_user_namespace_stay_out_of_reach(run: Run) -> None:
    ran = await run(
        GVISOR,
        "/bin/sh",
        "-c",
        "echo x > /.tartarus/guest; mv /.tartarus /x; chmod 777 /.tartarus/guest; id -u; cat /proc/self/uid_map; ls /w /g /l0",
    )
    assert b"0\n" in ran.out
    assert ran.err.count(b"No such file") == 3
    after = await run(GVISOR, "true")
    assert after.record.state is State.SUCCEEDED


async def test_disk_is_limited_and_tmp_is_a_part_of_it(run: Run) -> None:
    script = "head -c 20000000 /dev/zero > /tmp/x; head -c 20000000 /dev/zero > /work/y; stat -c %s /tmp/x /work/y"
    ran = await run(GVISOR, "/bin/sh", "-c", script, resources=ResourceRequest(disk_bytes=32 * MIB))
    assert b"No space left on device" in ran.err
    sizes = [int(word) for word in ran.out.split()]
    assert sizes[0] == 20_000_000
    assert sizes[1] < 14 * MIB


async def test_memory_beyond_the_limit_ends_the_sandbox(run: Run) -> None:
    code = "x=bytearray(600*1024*1024)\nfor i in range(0,len(x),4096): x[i]=1\nprint('held')"
    ran = await run(GVISOR, "python3", "-c", code, resources=ResourceRequest(memory_bytes=128 * MIB))
    assert ran.out == b""
    assert ran.record.state is not State.SUCCEEDED


async def test_a_mount_shows_the_host_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host")
    script = "cat /mnt/here/in; echo from the guest > /mnt/here/out"
    await run(GVISOR, "/bin/sh", "-c", script, mounts=(Mount(str(tmp_path), "/mnt/here"),))
    assert (tmp_path / "out").read_text() == "from the guest\n"


async def test_a_paused_guest_stands_still(node: Node) -> None:
    sandbox = await _start(node, "/bin/sh", "-c", "while :; do echo x; sleep 0.02; done")
    assert sandbox.main is not None
    assert await sandbox.main.read() is not None
    await sandbox.pause()
    before = (await sandbox.stats()).cpu_usec
    await asyncio.sleep(0.3)
    assert (await sandbox.stats()).cpu_usec - before < 2000
    await sandbox.resume()
    assert await sandbox.main.read() is not None
    await sandbox.pause()
    await sandbox.kill()


@pytest.mark.parametrize("part", ["runsc", "runsc-sandbox", "runsc-gofer"])
async def test_the_death_of_a_part_ends_the_sandbox(node: Node, state_dir: Path, part: str) -> None:
    sandbox = await _start(node, "sleep", "60")
    while part not in (pids := _processes(sandbox.record.id)):
        await asyncio.sleep(0.02)
    os.kill(pids[part], signal.SIGKILL)
    if part == "runsc-gofer":  # the sandbox can't open files any more, but is not told
        await sandbox.kill()
    record = await asyncio.wait_for(sandbox.wait(), 10)
    assert record.state not in {State.RUNNING, State.SUCCEEDED}
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}/exe").exists()]
    assert sandbox.record.id not in leftovers(state_dir)


async def test_the_death_of_a_nursery_ends_its_guests_and_the_next_finds_a_new_one(node: Node) -> None:
    sandbox = await _start(node, "sleep", "60")
    pids = _processes(sandbox.record.id)
    status = Path(f"/proc/{pids['runsc']}/status").read_text()
    nursery = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
    os.kill(nursery, signal.SIGKILL)
    await asyncio.wait_for(sandbox.wait(), 10)
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}/exe").exists()]
    assert (await finish(await _start(node, "echo", "again"))).out == b"again\n"


async def test_what_runsc_says_is_part_of_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "runsc"
    broken.write_bytes(agent_binary().read_bytes())  # a program that knows none of runsc's options, and says so
    broken.chmod(0o755)
    (tmp_path / "layer").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runtime = GvisorRuntime(tmp_path / "state", None, host_id_map())
    rootfs = RootFs(Template(id="broken", name="Broken"), (tmp_path / "layer",), (), "broken")
    snapshot = await runtime.snapshot(rootfs)
    guest = await runtime.clone(snapshot, GuestRequest("sbx-broken", "broken", Resources()), warm=False)
    with pytest.raises(GuestFailed, match="usage"):
        await guest.ready()
    await guest.ended
    await runtime.close()


async def test_terminals_files_and_signals_work(node: Node) -> None:
    sandbox = await _start(node)
    terminal = await sandbox.exec(
        ExecSpec(argv=("/bin/sh", "-c", "tty; stty size; read x; echo got $x"), tty=True, stdin=True)
    )
    await terminal.write_stdin(b"typed\n")
    out = b""
    while (piece := await terminal.read()) is not None:
        out += piece[1]
    assert b"/dev/pts/" in out
    assert b"got typed" in out
    await sandbox.files.write("/work/a", b"content", mode=0o640)
    assert (await sandbox.files.stat("/work/a")).size == 7
    sleeper = await sandbox.exec(
        ExecSpec(argv=("/bin/sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done"))
    )
    assert await sleeper.read() == (1, b"up\n")
    sleeper.signal(signal.SIGTERM)
    assert (await sleeper.wait()).code == 5
    await sandbox.kill()


async def test_what_it_wrote_can_be_found_by_the_host(node: Node) -> None:
    sandbox = await _start(node)
    await sandbox.files.write("/work/kept", b"kept", mode=0o644)
    changes = sandbox.guest.changes()
    assert changes is not None
    assert (changes / "work" / "kept").read_bytes() == b"kept"
    assert (changes / "work" / "kept").stat().st_uid == host_id_map().base
    await sandbox.kill()
    assert sandbox.guest.changes() is None


@pytest.mark.parametrize(
    ("path", "id_map", "why"),
    [
        ("/nonexistent", IdMap(1 << 20, 65536, privileged=True), "not installed"),
        (os.environ["PATH"], IdMap(1000, 1, privileged=False), "root"),
    ],
)
def test_a_host_that_lacks_something_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, id_map: IdMap, why: str
) -> None:
    monkeypatch.setenv("PATH", path)
    with pytest.raises(IsolationUnavailable, match=why):
        GvisorRuntime(tmp_path, None, id_map)


@pytest.mark.parametrize("platform", ["auto", "kvm"])
async def test_kvm_is_used_only_where_a_guest_runs_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: Wanted
) -> None:
    monkeypatch.setattr(platforms, "PROBE_S", 3.0)
    hierarchy = open_hierarchy(tmp_path)
    (tmp_path / "layer" / "tmp").mkdir(parents=True)
    rootfs = RootFs(Template(id="bare", name="Bare"), (tmp_path / "layer",), (), "bare")
    runtime = GvisorRuntime(tmp_path / "state", hierarchy, host_id_map(), platform=platform)
    assert runtime.capabilities().how == f"{platform} (not tried yet)"
    try:
        snapshot = await runtime.snapshot(rootfs)
    except IsolationUnavailable as error:
        assert platform == "kvm"
        assert "no guest ran on KVM" in error.why  # noqa: PT017 - a host with KVM raises nothing
    else:
        guest = await runtime.clone(snapshot, GuestRequest("made-bare", "bare", Resources()), warm=False)
        await guest.ready()
        await guest.destroy()
        assert runtime.capabilities().how in {"kvm", "systrap, since no guest ran on KVM within 3 s"} or (
            "systrap, since no guest ran on KVM: " in runtime.capabilities().how
        )
        assert runtime.needs(snapshot)["platform"] == runtime.capabilities().how.split(",")[0]
    finally:
        await runtime.close()
        assert not hierarchy.existing()
        hierarchy.close()


async def test_the_interpreter_stays_warm_and_keeps_contexts(node: Node) -> None:
    """This kernel has no pidfd_open, by which the warm interpreter sees its children end elsewhere."""
    sandbox = await _start(node)
    for status in (0, 3):
        process = await sandbox.exec(ExecSpec(argv=("python3", "-c", f"print(6*7); raise SystemExit({status})")))
        assert (await process.started())[1]
        assert await process.read() == (1, b"42\n")
        assert (await process.wait()).code == status
    contexts = [sandbox.context(await sandbox.open_context()) for _ in range(2)]
    for at, context in enumerate(contexts):
        assert [event async for event in context.run(f"x = {at}")] == [CellDone(1)]
    for at, context in enumerate(contexts):
        events = [event async for event in context.run("x")]
        assert events == [CellResult({"text/plain": str(at)}, is_main=True), CellDone(2)]
        await context.close()
    await sandbox.kill()
