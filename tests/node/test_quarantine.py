"""Quarantine (Typhon) on real sandboxes: frozen, cut off, kept as evidence, and nobody's but its holder's."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tartarus.model.audit import AuditQuery
from tartarus.model.errors import CaseNotFound, GuestFailed, InvalidState, NoSpace, Quarantined
from tartarus.model.quarantine import Case, CaseStatus, QuarantineReason, ReleaseRequest
from tartarus.model.sandbox import ExecSpec, Isolation, Reason, ResourceRequest, SandboxSpec
from tartarus.model.states import State
from tartarus.node.quarantine import processes
from tartarus.node.quarantine.typhon import Typhon
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node

from .conftest import TENANT

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]
TICKS = "echo begun; echo taken >/tmp/loot; while :; do sleep 0.02; echo tick; done"
Start = Callable[..., Awaitable[Sandbox]]


@pytest.fixture
async def start(node: Node) -> Start:
    async def begin(script: str = TICKS, *, isolation: Isolation = Isolation.CONTAINER, **spec: object) -> Sandbox:
        command = ExecSpec(argv=("sh", "-c", script))
        return await node.create(TENANT, SandboxSpec(isolation=isolation, command=command, **spec))  # type: ignore[arg-type]

    return begin


@pytest.fixture
async def typhon(node: Node) -> AsyncIterator[Typhon]:
    yield node.furies.quarantine
    for case in node.furies.quarantine.list():
        await node.furies.quarantine.destroy(case.id, "test")


async def held(typhon: Typhon, sandbox: Sandbox, detail: str = "look at it") -> Case:
    case = await typhon.take(sandbox, QuarantineReason.MANUAL_FLAG, detail, by="test")
    return await typhon.settled(case.id)


def pieces(typhon: Typhon, case: Case) -> dict[str, Path]:
    place = typhon._cases.evidence(case.id)
    return {one.name: place / one.path for one in case.evidence if not one.missing}


@pytest.mark.parametrize(
    "isolation",
    [
        Isolation.CONTAINER,
        Isolation.PROCESS,
        pytest.param(Isolation.GVISOR, marks=pytest.mark.needs("runsc")),
        pytest.param(Isolation.MICROVM, marks=pytest.mark.needs("microvm")),
    ],
)
async def test_held_it_stands_still_with_its_evidence_and_goes_on_when_released(
    typhon: Typhon, start: Start, isolation: Isolation
) -> None:
    sandbox = await start(isolation=isolation)
    sandbox.detach()
    process = await sandbox.exec(ExecSpec(argv=("sleep", "600")))
    await process.started()
    assert await _said_more(sandbox)
    case = await held(typhon, sandbox)
    assert case.freeze_ms is not None
    assert (case.status, case.network_cut, case.complete, case.trouble) == (CaseStatus.HELD, True, True, "")
    there = pieces(typhon, case)
    assert {"record", "use", "processes"} <= set(there)
    assert ("files" in there) is (isolation in {Isolation.CONTAINER, Isolation.GVISOR})
    assert ("memory" in there) is (isolation in {Isolation.GVISOR, Isolation.MICROVM})
    assert b"begun" in there["output"].read_bytes()
    if "files" in there:
        assert (there["files"] / "tmp/loot").read_text() == "taken\n"
    assert json.loads(there["record"].read_text())["state"] == "quarantined"
    assert json.loads(there["processes"].read_text())["total"] >= 1
    # Whoever waited was told, and it is nobody's to end or to use.
    record = await sandbox.wait()
    assert (record.state, record.reason) == (State.QUARANTINED, Reason.POLICY_VIOLATION)
    with pytest.raises(GuestFailed, match="quarantined"):
        await process.read()
    with pytest.raises(Quarantined):
        await sandbox.kill()
    with pytest.raises(Quarantined):
        await sandbox.stop()
    with pytest.raises(InvalidState):
        await sandbox.exec(ExecSpec(argv=("true",)))
    size = there["output"].stat().st_size
    await asyncio.sleep(0.3)
    assert sum(path.stat().st_size for path in sandbox.log.segments if path.exists()) <= size + 100_000
    before = len([entry async for entry in sandbox.log.read()])
    assert (await typhon.release(case.id, "test", ReleaseRequest())).state is State.RUNNING
    assert await _said_more(sandbox, before + 3)
    await sandbox.kill()
    assert typhon.get(case.id).status is CaseStatus.RELEASED
    await typhon.destroy(case.id, "test")
    with pytest.raises(CaseNotFound):
        typhon.get(case.id)


async def _said_more(sandbox: Sandbox, before: int = 0) -> bool:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if len([entry async for entry in sandbox.log.read()]) > before:
            return True
        await asyncio.sleep(0.02)
    return False


async def test_nothing_of_it_runs_from_the_moment_it_is_held(typhon: Typhon, start: Start) -> None:
    sandbox = await start("for i in 1 2 3; do (while :; do :; done) & done; wait")
    await typhon.take(sandbox, QuarantineReason.MANUAL_FLAG, "", by="test")
    used = sandbox.guest.stats().cpu_usec
    await asyncio.sleep(0.3)
    assert sandbox.guest.stats().cpu_usec == used
    await typhon.destroy(sandbox.record.id, "test")
    assert (await sandbox.wait()).state is State.KILLED


async def test_evidence_is_for_root_alone(typhon: Typhon, start: Start) -> None:
    case = await held(typhon, await start())
    assert typhon._cases.root.stat().st_mode & 0o777 == 0o700
    await typhon.destroy(case.id, "test")
    assert list(typhon._cases.root.iterdir()) == []


@pytest.mark.needs("runsc")
async def test_an_examiner_sees_the_evidence_and_can_change_none(node: Node, typhon: Typhon, start: Start) -> None:
    case = await held(typhon, await start())
    script = "cat /evidence/files/*/tree/tmp/loot; echo x >/evidence/record.json; ls /sys/class/net"
    examiner = await typhon.examine(case.id, TENANT, ExecSpec(argv=("sh", "-c", script)))
    out = b""
    assert examiner.main is not None
    while (piece := await examiner.main.read()) is not None:
        out += piece[1]
    assert out.startswith(b"taken\n")
    assert b"Read-only" in out
    assert examiner.record.isolation is Isolation.GVISOR
    await examiner.wait()
    await typhon.destroy(case.id, "test")


async def test_its_time_limit_rests_and_counts_again(typhon: Typhon, start: Start) -> None:
    sandbox = await start(timeout_s=1.0)
    case = await held(typhon, sandbox)
    await asyncio.sleep(1.0)
    assert sandbox.record.state is State.QUARANTINED
    await typhon.release(case.id, "test", ReleaseRequest(paused=True))
    assert (await sandbox.wait()).state is State.TIMED_OUT


async def test_cases_that_hold_nobody_are_let_go_after_their_time(
    node: Node, typhon: Typhon, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox, ended = await start(), await start()
    first, other = await held(typhon, sandbox), await held(typhon, ended)
    await typhon.release(first.id, "test", ReleaseRequest())
    again = await held(typhon, sandbox)  # the same sandbox, for another case
    await typhon.destroy(other.id, "test", keep_evidence=True)
    await node.furies.sweep()
    assert {case.id for case in typhon.list()} == {first.id, other.id, again.id}
    monkeypatch.setattr(typhon, "_kept_s", 0.0)
    await node.furies.sweep()
    assert [(case.id, case.status) for case in typhon.list()] == [(again.id, CaseStatus.HELD)]
    assert not typhon._cases.evidence(first.id).parent.exists()
    assert typhon._cases.evidence(again.id).exists()
    assert sandbox.record.state is State.QUARANTINED
    page = await node.audit.find(AuditQuery(action="quarantine.destroy", limit=2))
    assert {(one.target, one.actor) for one in page.entries} == {(first.id, "tartarus"), (other.id, "tartarus")}


async def test_taken_twice_at_once_it_is_one_case(typhon: Typhon, start: Start) -> None:
    sandbox = await start()
    cases = await asyncio.gather(*(held(typhon, sandbox, str(number)) for number in range(5)))
    assert len({case.id for case in cases}) == 1
    await typhon.destroy(cases[0].id, "test")
    with pytest.raises(InvalidState):
        await held(typhon, sandbox)


async def test_one_that_ends_while_it_is_held(typhon: Typhon, start: Start) -> None:
    sandbox = await start()
    case = await held(typhon, sandbox)
    os.kill(sandbox.guest.pid, 9)
    await sandbox.guest.resume()  # version 1 of cgroups kills no frozen process
    while typhon.get(case.id).status is CaseStatus.HELD:
        await asyncio.sleep(0.01)
    assert typhon.get(case.id).trouble == "it ended while it was held"
    with pytest.raises(InvalidState):
        await typhon.release(case.id, "test", ReleaseRequest())


async def test_without_room_for_evidence_it_stays_frozen_and_a_sweep_tries_again(
    typhon: Typhon, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await start()
    with monkeypatch.context() as patched:
        patched.setattr(typhon.collector, "collect", _no_room)
        case = await held(typhon, sandbox)
        assert (case.status, case.complete) == (CaseStatus.HELD, False)
        assert "no room" in case.trouble
        with pytest.raises(InvalidState):
            await typhon.examine(case.id, TENANT, None)
    await typhon.sweep()
    case = await typhon.settled(case.id)
    assert (case.complete, case.trouble) == (True, "")
    await typhon.destroy(case.id, "test")


async def _no_room(*_: object) -> None:
    raise NoSpace("no room for the evidence of a quarantined sandbox")


async def test_one_that_can_not_be_frozen_is_ended(
    typhon: Typhon, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await start()

    async def restless() -> None:
        raise GuestFailed("the sandbox did not freeze")

    monkeypatch.setattr(sandbox.guest, "pause", restless)
    case = await held(typhon, sandbox)
    assert (case.status, case.freeze_ms) == (CaseStatus.ENDED, None)
    assert "could not be frozen" in case.trouble
    assert (await sandbox.wait()).state is State.KILLED


async def test_what_a_judge_suspects_is_held_before_anybody_has_it(node: Node, typhon: Typhon, start: Start) -> None:
    from tartarus.policy.judges import Ruling, Verdict

    class Suspicious:
        name = "suspicious"

        def pre_admit(self, request: object) -> Ruling:  # noqa: ARG002
            return Ruling(Verdict.QUARANTINE, self.name, "from a source that nobody knows")

        def post_hoc(self, record: object) -> None:
            """Nothing."""

    node.admission._court._judges = (Suspicious(),)
    sandbox = await start()
    assert sandbox.record.state is State.QUARANTINED
    case = typhon.get(sandbox.record.id)
    assert (case.reason, case.detail) == (QuarantineReason.UNTRUSTED_SOURCE, "from a source that nobody knows")
    await typhon.destroy(case.id, "test")


async def test_a_fork_bomb_with_hostile_names_is_listed_whole(typhon: Typhon, start: Start) -> None:
    script = (
        'exec python3 -c "'
        "import os, ctypes\n"
        "ctypes.CDLL(None).prctl(15, b'x) R 1 \\x1b[2J\\n', 0, 0, 0)\n"
        "try:\n while True:\n  if os.fork() == 0: pass\n"
        "except OSError: os.read(os.pipe()[0], 1)\n"
        '"'
    )
    sandbox = await start(script, resources=ResourceRequest(pids=100))
    await asyncio.sleep(1.0)
    case = await held(typhon, sandbox)
    facts = json.loads(pieces(typhon, case)["processes"].read_text())
    assert facts["total"] == len(facts["processes"]) >= 50
    bombs = [one for one in facts["processes"] if one["name"].startswith("x) R 1")]
    assert bombs
    assert all(one["parent"] > 1 and "\x1b" not in one["name"] and "\n" not in one["name"] for one in bombs)
    await typhon.destroy(case.id, "test")


async def test_a_process_that_never_lets_its_words_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LIMIT_S", 0.2)
    monkeypatch.setattr(processes, "_facts", lambda pid: time.sleep(3600) if pid == 2 else None)
    assert (await processes.processes_of([1, 2, 3])).cut_short


async def test_hostile_file_names_in_evidence(typhon: Typhon, start: Start) -> None:
    names = "cd /tmp; mkdir -p 'a/..b'; touch -- '-rf' \"$(printf 'x\\033[2J\\ny')\" 'a/..b/...'; ln -s /etc/shadow link; ln -s .. up; mkfifo pipe"
    sandbox = await start(f"{names}; echo made; sleep 600")
    sandbox.detach()
    assert await _said_more(sandbox)
    case = await held(typhon, sandbox)
    assert case.complete
    tree = pieces(typhon, case)["files"] / "tmp"
    assert (tree / "link").is_symlink()
    assert (tree / "x\x1b[2J\ny").exists()
    await typhon.destroy(case.id, "test")
    assert list(typhon._cases.root.iterdir()) == []


@pytest.mark.parametrize(
    ("bomb", "kept"),
    [
        ("truncate -s 1000G huge; echo made", False),
        ("for i in $(seq 600); do mkdir d; cd d; done; echo made", None),
        ("mkfifo pipe; ln -s /proc/self/mem mem; dd if=/dev/zero of=big bs=1M count=40 2>/dev/null; echo made", True),
    ],
    ids=["sparse", "deep", "odd"],
)
async def test_files_that_are_made_to_hurt_whoever_keeps_them(
    typhon: Typhon, start: Start, bomb: str, kept: bool | None
) -> None:
    sandbox = await start(f"cd /tmp; {bomb}; exec sleep 600", resources=ResourceRequest(disk_bytes=64 << 20))
    sandbox.detach()
    assert await _said_more(sandbox)
    case = await held(typhon, sandbox)
    assert case.complete
    assert kept is None or ("files" in pieces(typhon, case)) is kept
    used = sum(path.lstat().st_blocks for path in typhon._cases.evidence(case.id).rglob("*")) * 512
    assert used < 100 << 20
    await typhon.destroy(case.id, "test")
    assert list(typhon._cases.root.iterdir()) == []


async def test_a_flood_of_output_is_kept_as_far_as_its_log(typhon: Typhon, start: Start) -> None:
    sandbox = await start("yes flood & yes flood")
    sandbox.detach()
    await asyncio.sleep(0.5)
    case = await held(typhon, sandbox)
    assert (case.status, case.complete) == (CaseStatus.HELD, True)
    size = pieces(typhon, case)["output"].stat().st_size
    assert 0 < size <= 17 << 20
    before = sandbox.channel.output_bytes
    await asyncio.sleep(0.2)
    assert sandbox.channel.output_bytes <= before + (4 << 20)  # what was under way
    await typhon.destroy(case.id, "test")


FIGHTS = """
import ctypes, os, signal, subprocess, sys
for number in range(1, 65):
    if number not in (9, 19, 32, 33):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
def each(work):
    if os.fork() == 0:
        try: work()
        finally: os._exit(0)
def churn():  # a new process each moment, the old one gone
    while True:
        if os.fork(): os._exit(0)
def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)
def vforked():
    subprocess.run(["sleep", "600"])
def traced():
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).ptrace(0, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
    os.read(os.pipe()[0], 1)
def spin():
    while True: pass
for work in (churn, churn, stopped, vforked, traced, spin):
    each(work)
print("fights", flush=True)
while True: os.getppid()
"""


async def test_programs_that_fight_the_freezer_stand_still(typhon: Typhon, start: Start) -> None:
    sandbox = await start(f"exec python3 -c '{FIGHTS.replace(chr(39), chr(34))}'", resources=ResourceRequest(pids=64))
    sandbox.detach()
    assert await _said_more(sandbox)
    case = await typhon.take(sandbox, QuarantineReason.MANUAL_FLAG, "", by="test")
    assert (case.status, case.trouble) == (CaseStatus.HELD, "")
    group = sandbox.guest.group
    assert group is not None
    used, there = sandbox.guest.stats().cpu_usec, sorted(group.pids())
    await asyncio.sleep(0.3)
    assert (sandbox.guest.stats().cpu_usec, sorted(group.pids())) == (used, there)
    assert (await typhon.settled(case.id)).complete
    await typhon.destroy(case.id, "test")
    assert (await sandbox.wait()).state is State.KILLED
