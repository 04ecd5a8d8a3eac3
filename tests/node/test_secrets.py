"""Secrets in real sandboxes: where they are to be, before anything runs, and nowhere else."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.wasm.conftest import add
from tests.wasm.modules import OPEN

from tartarus.model.audit import AuditQuery
from tartarus.model.configuration import configured
from tartarus.model.errors import (
    FileFailed,
    InvalidRequest,
    InvalidState,
    RequestRejected,
    SecretRefused,
    SecretUnavailable,
    Unsupported,
)
from tartarus.model.forking import ForkRequest
from tartarus.model.library import CreateSnapshot
from tartarus.model.lifecycle import CheckpointRequest
from tartarus.model.quarantine import QuarantineReason
from tartarus.model.sandbox import ExecSpec, Isolation, Reason, SandboxSpec, Wasm
from tartarus.model.secrets import SecretUse
from tartarus.model.settings import Settings
from tartarus.model.snapshots import SnapshotKind
from tartarus.node.service import Node
from tartarus.policy.documents import read_policy
from tartarus.store.sandboxes import SandboxStore

from .conftest import TENANT, finish, leftovers

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]
VALUE = 's3cr3t-V4lue+with/odd=bytes \\ "and quotes"'
"""Long and odd enough to be found only where it was put."""
RENEWED = "another-V4lue-after-rotation"
TOKEN = SecretUse("token")


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def write(path: Path, value: str) -> None:
    path.write_text(f"# what tests use\nTOKEN={value}\nexport OTHERS={value}-of-others\nempty=\n")
    path.chmod(0o600)


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "secrets.env"
    write(path, VALUE)
    return path


@pytest.fixture
async def node(state_dir: Path, store: SandboxStore, env_file: Path) -> AsyncIterator[Node]:
    """A node whose configuration grants secrets of an env-file."""
    text = f"""
secrets:
  providers:
    - {{name: env, kind: env-file, options: {{path: {env_file}}}}}
  allow:
    - {{name: token, ref: "env:TOKEN"}}
    - {{name: others, ref: "env:OTHERS", tenants: [others]}}
    - {{name: theirs, ref: "env:OTHERS", tenants: [zeta], deliver: [file]}}
    - {{name: elsewhere, ref: "env:TOKEN", tenants: [eta], templates: [elsewhere]}}
    - {{name: gone, ref: "env:GONE"}}
    - {{name: empty, ref: "env:empty"}}
"""
    text = text.replace(
        '{name: token, ref: "env:TOKEN"}', f'{{name: token, ref: "env:TOKEN", tenants: [{TENANT}, zeta]}}'
    )
    started = Node(configured(Settings.at(state_dir), text), store)
    await started.start()
    yield started
    await started.stop(Reason.NODE_DRAIN)
    assert leftovers(state_dir) == []


def asks(isolation: Isolation, script: str, *uses: SecretUse, **spec: object) -> SandboxSpec:
    """A shell script in a sandbox with these secrets."""
    command = ExecSpec(argv=("/bin/sh", "-c", script))
    asked = SandboxSpec(isolation=isolation, command=command, timeout_s=120.0, secrets=uses)
    return msgspec.structs.replace(asked, **spec)


async def said(node: Node, sandbox_id: str, script: str) -> list[str]:
    """What another command in a live sandbox writes."""
    process = await node.live(TENANT, sandbox_id).exec(ExecSpec(argv=("/bin/sh", "-c", script)))
    out = b""
    while (piece := await process.read()) is not None:
        out += piece[1]
    return out.decode().splitlines()


def written(state_dir: Path) -> list[str]:
    """Everything that this host wrote or shows of processes, with the value in it."""
    wanted = [VALUE.encode(), VALUE.encode()[:20]]
    found = []
    for path in state_dir.rglob("*"):
        parts = {"machines", "layers", "kernels"} & set(path.relative_to(state_dir).parts)
        if not parts and path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [str(path) for one in wanted if one in content]
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("environ", "cmdline") if int(process.name) != os.getpid() else ():
            try:
                content = (process / name).read_bytes()
            except OSError:
                continue
            found += [f"{process}/{name}" for one in wanted if one in content]
    database = sqlite3.connect(state_dir / "state.db")
    found += ["database" for line in database.iterdump() if VALUE[:20] in line]
    database.close()
    return found


LEVELS = [
    Isolation.CONTAINER,
    pytest.param(Isolation.GVISOR, marks=pytest.mark.needs("runsc")),
    pytest.param(Isolation.MICROVM, marks=pytest.mark.needs("microvm")),
]


@pytest.mark.parametrize("isolation", LEVELS, ids=lambda level: level.value)
async def test_a_secrets_whole_life(node: Node, state_dir: Path, isolation: Isolation) -> None:
    """In one sandbox for each level, since some are slow to make."""
    script = (
        "sha256sum </run/secrets/token; stat -c '%a %u' /run/secrets/token /run/secrets; stat -f -c %T /run/secrets;"
        " tr '\\0' '\\n' </proc/self/environ | grep -c s3cr3t; sleep 120"
    )
    sandbox = await node.create(TENANT, asks(isolation, script, TOKEN))
    assert sandbox.main is not None
    out = b""
    while out.count(b"\n") < 5:
        piece = await asyncio.wait_for(sandbox.main.read(), 60)
        assert piece is not None
        out += piece[1]
    assert out.decode().splitlines() == [f"{digest(VALUE)}  -", "400 0", "700 0", "tmpfs", "0"]
    entries = (await node.audit.find(AuditQuery(action="secret.deliver"))).entries
    assert [(one.target, one.decision, one.sandbox) for one in entries[:1]] == [("token", "allow", sandbox.record.id)]
    assert sandbox.record.spec.secrets == (SecretUse("token", "file", "/run/secrets/token"),)
    assert written(state_dir) == []
    library, name = node.library.snapshots, sandbox.record.id
    attempts = [
        library.create(TENANT, CreateSnapshot(name)),
        library.create(TENANT, CreateSnapshot(name, kind=SnapshotKind.MEMORY)),
        node.fork(TENANT, name, ForkRequest()),
        node.sleeper.sleep(sandbox),
        node.checkpoints.take(sandbox, CheckpointRequest()),
    ]
    for attempt in attempts:
        with pytest.raises(Unsupported, match="with secrets"):
            await attempt
    with pytest.raises(Unsupported, match="with secrets"):
        node.sleeper.schedule_sleep(sandbox, 1.0)
    # A program that has read it crashes, and leaves no picture of itself.
    assert await said(node, name, CRASH) == ["crashed"]
    await _no_neighbour_finds_it(node, isolation)
    # Nor is it among what is kept of a suspect.
    quarantine = node.furies.quarantine
    taken = await quarantine.take(sandbox, QuarantineReason.MANUAL_FLAG, "")
    case = await quarantine.settled(taken.id)
    missing = {one.name: one.missing for one in case.evidence if one.missing}
    assert all("with secrets" in missing[one] for one in ("files", "memory") if "can't" not in missing[one])
    assert written(state_dir) == []
    await quarantine.destroy(case.id, "test")
    assert not sandbox.held
    assert written(state_dir) == []


CRASH = """
cd /tmp; ulimit -c unlimited 2>/dev/null
sh -c 'token=$(cat /run/secrets/token); kill -SEGV $$' 2>/dev/null
echo crashed; find / -xdev -type f -name 'core*' -newer /run/secrets -not -path '/proc/*' -not -path '/sys/*' 2>/dev/null
"""
SEARCH = """
import glob, os, sys
places = ["/run", "/dev/shm", "/tmp", "/proc/1/root/run/secrets", "/proc/sys/kernel"]
files = [os.path.join(where, name) for place in places for where, _, names in os.walk(place) for name in names]
for process in glob.glob("/proc/[0-9]*"):
    files += [f"{process}/{name}" for name in ("environ", "cmdline", "root/run/secrets/token", "mountinfo")]
    files += glob.glob(f"{process}/fd/*")
found = read = 0
for path in files:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        content = os.read(fd, 1 << 20)
        os.close(fd)
    except OSError:
        continue
    read += 1
    found += sys.argv[1].encode() in content and not path.endswith(("/cmdline", "/fd/0"))
print(read > 3, found)
"""


async def _no_neighbour_finds_it(node: Node, isolation: Isolation) -> None:
    """Another sandbox of the same tenant's, in all that it can open."""
    half = VALUE[2:12]  # it knows what to look for
    spec = SandboxSpec(isolation=isolation, command=ExecSpec(argv=("env", "python3", "-c", SEARCH, half)))
    assert (await finish(await node.create(TENANT, spec))).out == b"True 0\n"


async def test_a_variable_is_the_commands_alone(node: Node) -> None:
    use = SecretUse("token", "env", "API_TOKEN")
    script = 'printf %s "$API_TOKEN" | sha256sum; sleep 60'
    sandbox = await node.create(TENANT, asks(Isolation.CONTAINER, script, use))
    assert sandbox.main is not None
    first = await asyncio.wait_for(sandbox.main.read(), 60)
    assert first is not None
    assert first[1].decode().split()[0] == digest(VALUE)
    assert await said(node, sandbox.record.id, 'echo "[$API_TOKEN]"; ls /run/secrets | wc -l') == ["[]", "0"]
    assert VALUE not in repr(sandbox.record)
    await sandbox.kill()


async def test_process_level_takes_variables_and_no_files(node: Node) -> None:
    use = SecretUse("token", "env", "API_TOKEN")
    ran = await finish(await node.create(TENANT, asks(Isolation.PROCESS, 'printf %s "$API_TOKEN" | sha256sum', use)))
    assert ran.out.decode().startswith(digest(VALUE))
    with pytest.raises(Unsupported, match="no secrets as files"):
        await node.create(TENANT, asks(Isolation.PROCESS, "true", TOKEN))


@pytest.mark.parametrize(
    "ref", ["others", "env:OTHERS", "theirs", "nothing", "env:NOTHING", "env:TOKENS", "vault:TOKEN"]
)
async def test_what_is_not_listed_is_refused_in_the_same_words(node: Node, ref: str) -> None:
    with pytest.raises(SecretRefused) as caught:
        await node.create(TENANT, asks(Isolation.CONTAINER, "true", SecretUse(ref)))
    with pytest.raises(SecretRefused) as unknown:
        await node.create(TENANT, asks(Isolation.CONTAINER, "true", SecretUse("n" * len(ref))))
    assert str(caught.value).replace(ref, "") == str(unknown.value).replace("n" * len(ref), "")


@pytest.mark.parametrize(("ref", "why"), [("gone", "has no GONE"), ("empty", "is empty")])
async def test_what_can_not_be_had_makes_no_sandbox(node: Node, ref: str, why: str) -> None:
    with pytest.raises(SecretUnavailable, match=why):
        await node.create(TENANT, asks(Isolation.CONTAINER, "true", TOKEN, SecretUse(ref)))
    assert not node._live
    assert node.secrecy._redactor.text(VALUE) == VALUE  # nothing is held any more


async def test_a_grant_says_how_it_is_delivered_and_to_which_template(node: Node) -> None:
    for tenant, use in (("zeta", SecretUse("theirs", "env")), ("eta", SecretUse("elsewhere"))):
        with pytest.raises(SecretRefused):
            await node.create(tenant, asks(Isolation.CONTAINER, "true", use))
    ran = await finish(
        await node.create("zeta", asks(Isolation.CONTAINER, "cat /run/secrets/theirs", SecretUse("theirs")))
    )
    assert ran.out.decode() == f"{VALUE}-of-others"


async def test_two_for_one_place_and_sleep_when_idle_are_refused(node: Node) -> None:
    with pytest.raises(InvalidRequest, match="same target"):
        await node.create(TENANT, asks(Isolation.CONTAINER, "true", TOKEN, SecretUse("env:TOKEN")))
    with pytest.raises(InvalidRequest, match="not hibernated"):
        await node.create(TENANT, asks(Isolation.CONTAINER, "true", TOKEN, idle_s=60.0))


async def test_links_in_its_place_lead_no_value_to_a_disk(node: Node) -> None:
    """What is in a sandbox owns its secrets' directory; a new value must replace what it put there, not follow it."""
    script = "rm -f /run/secrets/token; mkdir /work/trap; ln -s /work/trap/token /run/secrets/token; echo set; sleep 60"
    sandbox = await node.create(TENANT, asks(Isolation.CONTAINER, script, TOKEN))
    assert sandbox.main is not None
    assert sandbox.held is not None
    assert await asyncio.wait_for(sandbox.main.read(), 60) == (1, b"set\n")
    await sandbox.held.deliver(sandbox.channel)
    look = "ls /work/trap | wc -l; stat -c %F /run/secrets/token; rm /run/secrets/token; mkdir /run/secrets/token"
    assert await said(node, sandbox.record.id, look) == ["0", "regular file"]
    with pytest.raises(SecretUnavailable, match="can't be put at"):
        await sandbox.held.deliver(sandbox.channel)
    with pytest.raises(FileFailed, match="cross-device"):
        await sandbox.files.write("/work/value", b"value", in_memory=True)
    assert await said(node, sandbox.record.id, "ls -A /work") == ["trap"]
    await sandbox.kill()


async def test_what_a_guest_says_of_it_is_taken_out_of_messages(node: Node) -> None:
    sandbox = await node.create(TENANT, asks(Isolation.CONTAINER, "sleep 60", TOKEN))
    assert sandbox.held is not None
    assert "s3cr3t" not in sandbox.held.scrub(f"broke: {VALUE!r} {VALUE} {VALUE.encode()!r}")
    await sandbox.kill()
    assert node.secrecy._redactor.text(VALUE) == VALUE


async def test_a_renewed_value_reaches_a_running_sandbox(node: Node, env_file: Path) -> None:
    sandbox = await node.create(TENANT, asks(Isolation.CONTAINER, "sleep 60", TOKEN, SecretUse("token", "env", "T")))
    write(env_file, RENEWED)
    assert await node.secrecy.refresh(sandbox) == ("token",)
    assert (await said(node, sandbox.record.id, "sha256sum </run/secrets/token"))[0].startswith(digest(RENEWED))
    redact = node.secrecy._redactor.text
    assert (redact(VALUE), RENEWED in redact(f"x{RENEWED}x")) == (VALUE, False)
    env_file.write_text("TOKEN=\n")
    with pytest.raises(SecretUnavailable):
        await node.secrecy.refresh(sandbox)
    assert (await said(node, sandbox.record.id, "sha256sum </run/secrets/token"))[0].startswith(digest(RENEWED))
    await sandbox.pause()
    with pytest.raises(InvalidState, match="paused"):
        await node.secrecy.refresh(sandbox)
    await sandbox.kill()
    with pytest.raises(InvalidState):
        await node.secrecy.refresh(sandbox)
    assert redact(RENEWED) == RENEWED


async def test_a_renewal_after_which_it_ends_leaves_nothing(node: Node) -> None:
    sandbox = await node.create(TENANT, asks(Isolation.CONTAINER, "sleep 60", TOKEN))
    renewing = asyncio.gather(*(node.secrecy.refresh(sandbox) for _ in range(3)), return_exceptions=True)
    await asyncio.sleep(0)
    await sandbox.kill()
    await renewing
    assert not sandbox.held
    assert node.secrecy._redactor.text(VALUE) == VALUE


async def test_a_policy_narrows_what_is_granted_and_never_widens_it(node: Node) -> None:
    node.admission.replace(
        [read_policy("id: p\nsecrets: {allowed: [gone, others]}"), read_policy("id: q\nsecrets: {allowed: [others]}")]
    )
    with pytest.raises(RequestRejected, match="does not allow secrets: token"):
        await node.create(TENANT, asks(Isolation.CONTAINER, "true", SecretUse("env:TOKEN")))
    with pytest.raises(SecretRefused):
        await node.create(TENANT, asks(Isolation.CONTAINER, "true", SecretUse("others")))
    node.admission.replace([read_policy("id: p\nsecrets: {allowed: [token]}")])
    assert (await finish(await node.create(TENANT, asks(Isolation.CONTAINER, "true", TOKEN)))).record.exit_code == 0
    node.admission.replace([])


async def test_a_module_reads_its_secret_below_a_directory_of_its_own(node: Node) -> None:
    wasm = Wasm(module=await add(node, OPEN))
    command = ExecSpec(argv=("prog.wasm", "token"))
    asked = SandboxSpec(command=command, wasm=wasm, secrets=(TOKEN,), timeout_s=60.0)
    ran = await finish(await node.create(TENANT, asked))
    assert ran.out.decode() == "errno 44\n" * 3 + VALUE
