"""Templates and snapshots on a real node: made, proven, replaced, forgotten, kept apart."""

from __future__ import annotations

import os

import anyio
import pytest

from tartarus.model.definition import Definition, TemplateResources
from tartarus.model.errors import (
    BuildFailed,
    InvalidRequest,
    InvalidState,
    SnapshotNotFound,
    TemplateBlocked,
    TemplateExists,
    TemplateFailed,
    TemplateNotFound,
    Unsupported,
)
from tartarus.model.library import (
    BuildOutput,
    CreateSnapshot,
    CreateTemplate,
    DockerfileSource,
    TemplateBase,
)
from tartarus.model.sandbox import ExecSpec, Isolation, ResourceRequest, SandboxSpec
from tartarus.model.states import State

from .conftest import TENANT
from .making import SHELL, Maker, chunks, context

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox")]


async def test_a_dockerfile_becomes_a_template(maker):
    more = 'ENV WHO=you\nCOPY --chown=app file /srv/data/\nWORKDIR /srv/data\nUSER app\nLABEL a=b\nCMD ["sh"]\n'
    info = await maker.build("mine", more)
    assert (info.status.value, info.base, info.builtin) == ("ready", "a Dockerfile", False)
    script = "id; pwd; echo $WHO $HOME $USER; ls -ln file; cat file; grep -c . /etc/hosts; grep Cap /proc/self/status"
    lines = (await maker.out("mine", "sh", "-c", script)).splitlines()
    assert lines[:3] == ["uid=33(app) gid=34", "/srv/data", "you /srv app"]
    assert lines[3].split()[2:4] == ["33", "34"]
    assert lines[4:6] == ["from the context", "2"]
    assert {line.split()[1] for line in lines[6:]} == {"0" * 16}
    again = await maker.build("again", more)
    assert again.digest != info.digest  # its name is part of what it is
    assert [step.text for step in maker.steps if step.state.value == "cached" and step.item][1:3] != []
    with pytest.raises(TemplateExists):
        await maker.build("mine")
    with pytest.raises(InvalidRequest, match="built-in"):
        await maker.build("host")


async def test_one_tenants_templates_are_nobody_elses(maker):
    await maker.build("private")
    other = Maker(maker.node, "uid-54321")
    assert "private" not in await other.names()
    with pytest.raises(TemplateNotFound):
        await other.out("private", "sh")
    with pytest.raises(TemplateNotFound):
        await maker.node.library.templates.remove(other.tenant, "private")
    # Nor does a build of the other's find the layers that were made here.
    await other.build("theirs")
    assert not [step for step in other.steps if step.state.value == "cached"]
    await maker.node.library.templates.remove(other.tenant, "theirs")


async def test_a_step_that_fails_can_be_looked_into(maker):
    with pytest.raises(BuildFailed, match=r"3") as failed:
        await maker.build("broken", "RUN echo before >/srv/state\nRUN echo sorry >&2; exit 3\nRUN echo never\n")
    assert "sorry" in failed.value.why
    assert "tartarus run -it --template broken-failed" in failed.value.fix
    assert await maker.names() == {"broken-failed"}
    assert await maker.out("broken-failed", "cat", "/srv/state") == "before\n"


async def test_a_build_step_has_no_network_unless_it_is_given(maker):
    await maker.build("alone", "RUN ip addr >/srv/addresses; ! wget -T 2 -O /dev/null http://192.0.2.1/ 2>/dev/null\n")
    assert await maker.out("alone", "grep", "-c", "inet ", "/srv/addresses") == "1\n"


async def test_the_old_one_serves_until_the_new_one_is_proven(maker):
    first = await maker.build("turn", "RUN echo one >/srv/which\n")
    with pytest.raises(TemplateFailed, match="'false' ended with status 1"):
        await maker.build(
            "turn", "RUN echo two >/srv/which\n", replace=True, definition=Definition(ready_check=("false",))
        )
    assert await maker.out("turn", "cat", "/srv/which") == "one\n"
    info = await maker.node.library.templates.get(TENANT, "turn")
    assert "newest build failed" in info.message
    live = await maker.node.create(TENANT, SandboxSpec(template="turn"))
    second = await maker.build("turn", "RUN echo three >/srv/which\n", replace=True)
    assert (second.id, second.build, second.message) == (first.id, 2, "")
    assert await maker.out("turn", "cat", "/srv/which") == "three\n"
    process = await live.exec(ExecSpec(argv=("cat", "/srv/which")))
    assert await process.read() == (1, b"one\n")
    await live.kill()


async def test_what_stands_on_a_template_follows_it(maker):
    await maker.build("below", "RUN echo one >/srv/which\n")
    above = await maker.make("above", TemplateBase(template="below"), definition=Definition(env={"A": "b"}))
    await maker.build("below", "RUN echo two >/srv/which\n", replace=True)
    with anyio.fail_after(30):
        while (await maker.node.library.templates.get(TENANT, "above")).build == above.build:
            await anyio.sleep(0.02)
    assert await maker.out("above", "sh", "-c", "cat /srv/which; echo $A") == "two\nb\n"


async def test_a_template_over_the_hosts_programs(maker):
    said = Definition(warmup_script="import colorsys", env={"A": "b"}, resources=TemplateResources(max_memory=512))
    info = await maker.make("mine", TemplateBase(template="host"), definition=said)
    assert info.warm_ms is not None
    code = "import os, sys; print('colorsys' in sys.modules, os.environ['A'])"
    assert await maker.out("mine", "python3", "-c", code) == "True b\n"
    await maker.node.library.templates.remove(TENANT, "mine")
    await maker.node.library.sweep()
    assert not [rootfs for rootfs in maker.node._pool.rootfs_in_use() if rootfs.template.id == "mine"]
    await maker.make("mine", TemplateBase(template="host"), definition=said)
    with pytest.raises(InvalidRequest, match="more memory than template 'mine' allows"):
        await maker.out("mine", "true", resources=ResourceRequest(memory_bytes=2**30))


@pytest.mark.parametrize(
    ("script", "said"),
    [("import no_such_module", "no_such_module"), ("raise SystemExit(3)", "SystemExit: 3"), ("1/0", "at line 1")],
)
async def test_a_warm_up_that_fails_leaves_nothing(maker, script, said):
    with pytest.raises(TemplateFailed) as failed:
        await maker.make("bad", TemplateBase(template="host"), definition=Definition(warmup_script=script))
    assert said in str(failed.value) + failed.value.why
    assert await maker.names() == set()


ATTACKS = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
found = []
def tried(name, value):
    if value >= 0:
        found.append(name)
for name, number, *arguments in (
    ("bpf", 321, 0, 0, 0), ("keyctl", 250, 0, -3, 0), ("io_uring", 425, 8, 0), ("userfaultfd", 323, 0),
    ("ptrace", 101, 16, 1, 0, 0), ("fsopen", 430, b"tmpfs", 0), ("open_tree", 428, -100, b"/", 1),
    ("perf", 298, 0, 0, -1, -1, 0), ("setns", 308, 0, 0), ("kexec", 246, 0, 0, 0, 0), ("chroot", 161, b"/tmp"),
    ("mknod", 133, b"/tmp/disk", 0o60600, 0xfe00), ("settimeofday", 164, 0, 0), ("quotactl", 179, 0, 0, 0, 0),
):
    tried(name, libc.syscall(number, *arguments))
try:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)
    found.append("packet socket")
except OSError:
    pass
for path in ("/etc/shadow", "/proc/1/mem", "/proc/1/root/etc/shadow", "/dev/mem", "/dev/sda", "/dev/vda"):
    try:
        open(path, "rb")
        found.append(path)
    except OSError:
        pass
for fd in os.listdir("/proc/self/fd"):
    try:
        if os.readlink("/proc/self/fd/" + fd).startswith("/") and int(fd) > 2:
            found.append(os.readlink("/proc/self/fd/" + fd))
    except OSError:
        pass
capabilities = [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapPrm", "CapEff"))]
assert {int(word, 16) & ~0x2011cb for word in capabilities} == {0}, capabilities
assert not [name for name in found if not name.endswith("warmup.py")], found
"""


async def test_what_a_hostile_warm_up_may_not(maker):
    await maker.make("hostile", TemplateBase(template="host"), definition=Definition(warmup_script=ATTACKS))


@pytest.mark.parametrize(
    "isolation",
    [
        pytest.param(Isolation.GVISOR, marks=pytest.mark.needs("runsc")),
        pytest.param(Isolation.MICROVM, marks=pytest.mark.needs("microvm")),
    ],
)
async def test_a_template_with_files_of_its_own_at_stronger_levels(maker, isolation):
    await maker.build("files", "COPY --chown=app file /srv/data/\nUSER app\nENV WHO=you\n")
    script = "id; echo $WHO $HOME; ls -ln /srv/data/file; cat /srv/data/file; ls /usr 2>&1 | head -1"
    lines = (await maker.out("files", "sh", "-c", script, isolation=isolation)).splitlines()
    assert lines[:2] == ["uid=33(app) gid=34", "you /srv"]
    assert lines[2].split()[2:4] == ["33", "34"]
    assert lines[3] == "from the context"
    assert await maker.out("files", "sh", "-c", script, isolation=isolation) == "\n".join([*lines, ""])


async def test_a_template_with_files_of_its_own_is_no_business_of_the_process_level(maker):
    await maker.build("files")
    with pytest.raises(Unsupported, match="container level"):
        await maker.out("files", "true", isolation=Isolation.PROCESS)


async def test_a_policy_that_can_not_be_followed_blocks(maker, state_dir):
    policy = state_dir / "scan-policy.json"
    policy.write_text('{"require_complete": true}')
    try:
        info = await maker.build("unchecked")
    finally:
        policy.unlink()
    assert info.status.value == "blocked"
    assert "could not be checked" in info.message
    with pytest.raises(TemplateBlocked):
        await maker.out("unchecked", "true")


async def test_a_replacement_that_is_blocked_leaves_the_old_one_in_service(maker, state_dir):
    await maker.build("steady", "RUN echo one >/srv/which\n")
    policy = state_dir / "scan-policy.json"
    policy.write_text('{"require_complete": true}')
    try:
        with pytest.raises(TemplateBlocked, match="goes on"):
            await maker.build("steady", "RUN echo two >/srv/which\n", replace=True)
    finally:
        policy.unlink()
    assert await maker.out("steady", "cat", "/srv/which") == "one\n"


async def test_a_stream_that_nobody_reads_ends_its_work(maker):
    upload = await maker.node.library.uploads.put(TENANT, chunks(context()))
    source = DockerfileSource(dockerfile=f"{SHELL}RUN echo started; sleep 600\n", context=upload.id)
    stream = maker.node.library.templates.create(TENANT, CreateTemplate(name="slow", source=source))
    async for event in stream:
        if isinstance(event, BuildOutput) and "started" in event.text:
            break
    assert (await maker.node.library.templates.get(TENANT, "slow")).status.value == "building"
    with pytest.raises(InvalidState, match="is building"):
        await maker.out("slow", "true")
    await stream.aclose()
    assert await maker.names() == set()


async def test_more_layers_than_a_mount_takes(maker):
    steps = "".join(f"COPY file /srv/data/{number}\n" for number in range(140))
    await maker.build("tall", f"{steps}RUN ls /srv/data | wc -l >/srv/count\n")
    assert await maker.out("tall", "cat", "/srv/count", "/srv/data/139") == "140\nfrom the context\n"


async def test_removing_and_sweeping(maker, state_dir):
    await maker.build("gone", "RUN echo here >/srv/here\n")
    live = await maker.node.create(TENANT, SandboxSpec(template="gone"))
    await maker.node.library.templates.remove(TENANT, "gone")
    layers = state_dir / "cache" / "tenants" / TENANT / "layers"
    for place in layers.iterdir():
        os.utime(place, (1, 1))
    await maker.node.library.sweep()
    process = await live.exec(ExecSpec(argv=("cat", "/srv/here")))
    assert await process.read() == (1, b"here\n")
    await live.kill()
    with pytest.raises(TemplateNotFound):
        await maker.out("gone", "true")


async def test_snapshots(maker):
    snapshots = maker.node.library.snapshots
    await maker.build("base", "RUN echo kept >/srv/kept; echo old >/srv/old\n")
    sandbox = await maker.node.create(TENANT, SandboxSpec(template="base"))
    process = await sandbox.exec(ExecSpec(argv=("sh", "-c", "echo new >/srv/new; rm /srv/old; ln -s new /srv/link")))
    assert await process.read() is None
    taken = await snapshots.create(TENANT, CreateSnapshot(sandbox=sandbox.record.id, name="first"))
    assert (taken.template, taken.name, sandbox.record.state) == ("base", "first", State.RUNNING)
    await sandbox.kill()
    listing = "cd /srv; cat kept link; ls"
    assert await maker.out("host", "sh", "-c", listing, snapshot="first") == "kept\nnew\ndata\nkept\nlink\nnew\n"
    # A snapshot of a sandbox that came from one, of a template that is gone.
    await maker.node.library.templates.remove(TENANT, "base")
    sandbox = await maker.node.create(TENANT, SandboxSpec(snapshot=taken.id))
    process = await sandbox.exec(ExecSpec(argv=("sh", "-c", "echo more >/srv/more")))
    assert await process.read() is None
    await sandbox.pause()
    second = await snapshots.create(TENANT, CreateSnapshot(sandbox=sandbox.record.id))
    assert sandbox.record.state is State.PAUSED
    await sandbox.kill()
    await snapshots.delete(TENANT, "first")
    assert await maker.out("host", "cat", "/srv/more", "/srv/new", snapshot=second.id) == "more\nnew\n"
    assert [info.id for info in await snapshots.list(TENANT)] == [second.id]


async def test_snapshots_are_their_tenants(maker):
    sandbox = await maker.node.create(TENANT, SandboxSpec())
    taken = await maker.node.library.snapshots.create(TENANT, CreateSnapshot(sandbox=sandbox.record.id))
    await sandbox.kill()
    with pytest.raises(SnapshotNotFound):
        await Maker(maker.node, "uid-54321").out("host", "true", snapshot=taken.id)
    with pytest.raises(SnapshotNotFound):
        await maker.node.library.snapshots.delete("uid-54321", taken.id)


async def test_no_snapshot_at_process_level(maker):
    sandbox = await maker.node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS))
    with pytest.raises(Unsupported, match="process level"):
        await maker.node.library.snapshots.create(TENANT, CreateSnapshot(sandbox=sandbox.record.id))
    await sandbox.kill()


async def test_equal_changes_are_kept_once(maker):
    sandbox = await maker.node.create(TENANT, SandboxSpec())
    taken = []
    for script in ("echo same >/srv/same", "true", "touch -d @1 /srv/same"):
        process = await sandbox.exec(ExecSpec(argv=("sh", "-c", script)))
        assert await process.read() is None
        taken.append(await maker.node.library.snapshots.create(TENANT, CreateSnapshot(sandbox=sandbox.record.id)))
    await sandbox.kill()
    assert taken[0].digest == taken[1].digest != taken[2].digest
