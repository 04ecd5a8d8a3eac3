"""How fast it is decided what may happen, and written down: rules beside Cedar's, admission, the audit log."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Row
from tartarus.model.audit import AuditEntry
from tartarus.model.sandbox import Isolation, Resources, SandboxSpec
from tartarus.node.admission import Admission
from tartarus.policy.acts import Act, Effect
from tartarus.policy.document import read_rules
from tartarus.policy.documents import limits_of, read_policy
from tartarus.policy.gate import Gate
from tartarus.policy.judges import court
from tartarus.policy.rules import RuleSet
from tartarus.store.audit.log import AuditLog

_COUNTS = (10, 100, 1000, 10_000)
_ACTIONS = 20
_A_FILE = 1000
_BATCHES = 30
_DURABLE = 50


def _each_us(work: Callable[[], object], times: int) -> list[float]:
    """Microseconds of one call, from batches: a clock costs as much as what is measured.

    Of CPU: nothing here waits, and what else the machine does must not count.
    """
    found = []
    for _ in range(_BATCHES):
        began = time.process_time()
        for _ in range(times):
            work()
        found.append((time.process_time() - began) / times * 1e6)
    return found


def _rules(start: int, end: int, before: str) -> str:
    matches = (f"{{action: fs.act{number % _ACTIONS}, path: ['{before}d{number}/**']}}" for number in range(start, end))
    rules = (f"  - {{id: r{start + index}, match: {match}, effect: allow}}\n" for index, match in enumerate(matches))
    return "version: 1\nrules:\n" + "".join(rules)


def _gate(count: int, before: str = "") -> Callable[[], object]:
    starts = range(0, count, _A_FILE)
    files = [read_rules(_rules(start, min(start + _A_FILE, count), before), f"{start}.yaml") for start in starts]
    gate = Gate(RuleSet([]), RuleSet(files))
    wanted = count // 2
    act = Act(action=f"fs.act{wanted % _ACTIONS}", paths=(f"d{wanted}/src/a.py",))
    if gate.decide(act).effect is not Effect.ALLOW or gate.decide(Act(action="fs.act0", paths=("x",))).allowed:
        raise RuntimeError("the gate decides wrongly")
    return lambda: gate.decide(act)


def _cedar(count: int) -> Callable[[], object]:
    import cedarpy

    text = "".join(
        f'permit(principal, action == Action::"act{number % _ACTIONS}", resource in Dir::"d{number}");\n'
        for number in range(count)
    )
    policies = cedarpy.PolicySet.from_str(text)
    wanted = count // 2
    resource = {"type": "File", "id": f"d{wanted}/src/a.py"}
    entities = cedarpy.Entities.from_json_str(
        json.dumps([{"uid": resource, "attrs": {}, "parents": [{"type": "Dir", "id": f"d{wanted}"}]}])
    )
    request = {
        "principal": {"type": "User", "id": "a"}, "action": {"type": "Action", "id": f"act{wanted % _ACTIONS}"},
        "resource": resource, "context": {},
    }  # fmt: skip
    if not cedarpy.is_authorized(request, policies, entities).allowed:
        raise RuntimeError("Cedar decides otherwise")
    return lambda: cedarpy.is_authorized(request, policies, entities)


async def rules(_home: Path) -> list[Row]:
    """One decision among so many rules: an act on one path, which one of them allows."""
    rows = []
    for count in _COUNTS:
        bench = f"decision, {count} rules"
        rows.append(Row(bench, "tartarus", "us", _each_us(_gate(count), 200)))
        rows.append(Row(bench, "tartarus, paths with **/", "us", _each_us(_gate(count, "**/"), 200)))
        if not absent():
            times = max(3, 2000 // count)
            rows.append(Row(bench, "cedarpy", "us", _each_us(_cedar(count), times), "parsed before, as ours"))
    return rows


async def admission(_home: Path) -> list[Row]:
    """What stands in the way of every new sandbox, with ten policies in force."""
    texts = [f"id: p{number}\ntenants: [uid-{number}]\nresources: {{max_pids: 100}}" for number in range(9)]
    texts.append("id: all\nresources: {max_instances: 50, max_memory_mb: 1024}\ntemplates: [{id: host}]")
    documents = [read_policy(text) for text in texts]
    judges = Admission(court())
    judges.replace(documents)
    spec, limits = SandboxSpec(timeout_s=60.0), Resources(memory_bytes=2**28, pids=50)

    def admit() -> None:
        judges.admit("uid-1", spec, "host", limits, Isolation.CONTAINER).give_back()

    return [
        Row("admission", "policies, evaluated", "us", _each_us(lambda: limits_of(documents, "uid-1", "host"), 500)),
        Row("admission", "policies, again", "us", _each_us(lambda: judges.limits("uid-1", "host"), 5000)),
        Row("admission", "all judges", "us", _each_us(admit, 500)),
    ]


async def audit(home: Path) -> list[Row]:
    """Entries of the audit log: taken, written down in bulk, and one that is waited for."""
    entry = AuditEntry(
        actor="uid-0", tenant="uid-0", action="sandbox.create", target="sbx-0123456789abcdef", decision="allow",
        rules=("all",), input_digest="ab" * 32, summary="python at container", sandbox="sbx-0123456789abcdef",
    )  # fmt: skip
    log = await AuditLog.open(home / "audit", "tartarus/bench/audit")
    await log.append(entry, durable=True)
    taken, rates, durable = [], [], []
    for _ in range(_BATCHES // 3):
        began = time.perf_counter()
        for _ in range(5000):
            log.add(entry)
        taken.append((time.perf_counter() - began) / 5000 * 1e6)
        await log.flush()
        rates.append(5000 / (time.perf_counter() - began))
    for _ in range(_DURABLE):
        began = time.perf_counter()
        await log.append(entry, durable=True)
        durable.append((time.perf_counter() - began) * 1e3)
    await log.close()
    return [
        Row("audit, taken", "tartarus", "us", taken),
        Row("audit, entries on disk", "tartarus", "/s", rates, "buffered"),
        Row("audit, one on disk", "tartarus", "ms", durable, "waited for"),
    ]


def absent() -> list[str]:
    """What can't be measured here."""
    return [] if importlib.util.find_spec("cedarpy") else ["cedarpy"]
