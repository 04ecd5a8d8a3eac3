"""Admission in the way of every new sandbox, on a real node."""

from __future__ import annotations

import asyncio

import pytest
from tests.node.conftest import TENANT, Run

from tartarus.model.audit import AuditQuery
from tartarus.model.contract import Contract, Grant
from tartarus.model.errors import DaemonUnavailable, InvalidState, RequestRejected, Unsupported
from tartarus.model.policies import PutPolicy
from tartarus.model.sandbox import ExecSpec, Isolation, Network, ResourceRequest, Resources, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.node.admission import Admission, Place
from tartarus.node.service import Node
from tartarus.node.trying import prove_level
from tartarus.policy.documents import read_policy
from tartarus.policy.judges import Admission as Asked
from tartarus.policy.judges import Classification, Court, Minos, Rhadamanthus, Ruling, Verdict, court

pytestmark = pytest.mark.anyio
TRUE = ExecSpec(argv=("true",))


def in_force(node: Node, *texts: str) -> None:
    node.admission.replace(map(read_policy, texts))


async def test_a_tenants_places_are_counted_and_given_back(node: Node) -> None:
    in_force(node, "id: p\nresources: {max_instances: 2}")
    first, second = [await node.create("acme", SandboxSpec()) for _ in range(2)]
    with pytest.raises(RequestRejected) as caught:
        await node.create("acme", SandboxSpec())
    assert caught.value.why == "minos: sandboxes at once: 3"
    assert caught.value.fix == "accepted would be: at most 2"
    other = await node.create("zeta", SandboxSpec())
    await first.kill()
    third = await node.create("acme", SandboxSpec(command=TRUE))
    assert third.record.spec.labels == {"tartarus.io/policies": "p"}
    third.detach()
    assert (await third.wait()).state is State.SUCCEEDED
    for sandbox in (second, other):
        await sandbox.kill()
    assert node.admission._books["acme"].sandboxes == node.admission._books["zeta"].sandboxes == 0


async def test_requests_at_once_do_not_share_the_last_place(node: Node) -> None:
    in_force(node, "id: p\nresources: {max_instances: 3}")
    made = await asyncio.gather(*(node.create("acme", SandboxSpec()) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(one, RequestRejected) for one in made) == 5
    await asyncio.gather(*(one.kill() for one in made if not isinstance(one, BaseException)))


async def test_what_fails_to_start_gives_its_place_back(node: Node) -> None:
    in_force(node, "id: p\nresources: {max_instances: 1}")
    with pytest.raises(Exception, match="nowhere"):
        await node.create("acme", SandboxSpec(command=ExecSpec(argv=("/nowhere",))))
    await (await node.create("acme", SandboxSpec())).kill()


async def test_policy_gives_defaults_and_floors(node: Node) -> None:
    in_force(node, "id: p\nisolation: container\nresources: {default_timeout: 90s}")
    sandbox = await node.create("acme", SandboxSpec())
    assert (sandbox.record.spec.timeout_s, sandbox.record.isolation) == (90.0, Isolation.CONTAINER)
    await sandbox.kill()
    with pytest.raises(Unsupported, match="takes the container level"):
        await node.create("acme", SandboxSpec(isolation=Isolation.PROCESS))


async def test_too_much_is_rejected_before_anything_is_made(node: Node, run: Run) -> None:
    in_force(node, "id: p\nresources: {max_memory_mb: 64}", "id: q\ntenants: [uid-0]\nresources: {max_pids: 10}")
    with pytest.raises(RequestRejected) as caught:
        await node.create(TENANT, SandboxSpec(resources=ResourceRequest(memory_bytes=2**27, pids=8)))
    assert "memory of one sandbox: 128 MiB" in caught.value.why
    ran = await run(Isolation.CONTAINER, "echo", "fine", resources=ResourceRequest(memory_bytes=2**26, pids=8))
    assert ran.record.state is State.SUCCEEDED


async def test_what_the_doctor_tries_is_nobodys_quota(node: Node) -> None:
    in_force(
        node,
        "id: p\nisolation: microvm\nresources: {max_memory_mb: 1, max_duration: 1s}\ntemplates: [{id: host, allowed_callers: []}]",
    )
    await prove_level(node.create, node.modules.compile, Isolation.CONTAINER)
    with pytest.raises((RequestRejected, Unsupported)):
        await node.create("acme", SandboxSpec(isolation=Isolation.CONTAINER))
    await node.audit.flush()
    page = await node.audit.find(AuditQuery(tenant="tartarus-doctor"))
    assert page.entries == ()


async def test_policy_changes_and_judgements_are_in_the_audit_log(node: Node) -> None:
    class Odd(Minos):
        name = "odd"

        def post_hoc(self, record: SandboxRecord) -> Classification | None:
            return Classification("odd", f"{record.name} was odd", quarantine=True)

    node._afterwards._court = Court([Odd(), Minos()])
    start = (await node.audit.find(AuditQuery(limit=1))).entries
    before = start[0].sequence if start else -1
    text = "id: small\nresources: {max_pids: 50}\n"
    kept = await node.policies.put("small", "uid-0", PutPolicy(text, "why not"))
    with pytest.raises(InvalidState):
        await node.policies.put("small", "uid-0", PutPolicy(text, expected=kept.version + 7))
    await node.policies.delete("small", "uid-0")
    sandbox = await node.create("acme", SandboxSpec(name="strange"))
    await sandbox.kill()
    await node._afterwards.close()
    page = await node.audit.find(AuditQuery())
    found = [one for one in reversed(page.entries) if one.sequence > before]
    assert [(one.action, one.decision) for one in found] == [
        ("policy.put", "allow"), ("policy.put", "allow"), ("policy.put", "error"), ("policy.delete", "allow"),
        ("sandbox.create", "allow"), ("sandbox.end", ""), ("sandbox.classify", "require_review"),
    ]  # fmt: skip
    assert (found[-1].reason, found[0].input_digest) == ("strange was odd", kept.digest)
    assert (await node.audit.verify()).findings == ()


async def test_a_policy_that_cannot_be_written_down_is_not_in_force(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: object) -> None:
        raise DaemonUnavailable("the audit log can't be written")

    monkeypatch.setattr(node.audit, "record", full)
    with pytest.raises(DaemonUnavailable):
        await node.policies.put("never", "uid-0", PutPolicy("id: never\nresources: {max_pids: 1}\n"))
    assert [one.id for one in await node.policies.list()] == []
    await (await node.create("acme", SandboxSpec())).kill()


def test_one_that_begins_again_is_judged_without_its_own_place() -> None:
    admission = Admission(court())
    admission.replace([read_policy("id: p\nresources: {max_instances: 2}")])

    def admitted() -> Place:
        return admission.admit("acme", SandboxSpec(), "host", Resources(), Isolation.CONTAINER)

    first = admitted()
    second = admission.known(SandboxRecord(
        id="sbx-1", tenant="acme", name="", template="host", isolation=Isolation.CONTAINER, isolation_reason="",
        state=State.HIBERNATED, spec=SandboxSpec(), created_at=0.0,
    ))  # fmt: skip
    with pytest.raises(RequestRejected):
        admitted()
    first = admission.admit_again(first)
    admission.replace([read_policy("id: p\nresources: {max_instances: 1}")])
    with pytest.raises(RequestRejected, match="sandboxes at once: 2"):
        admission.admit_again(first)
    assert admission._books["acme"].sandboxes == 2  # it keeps the place that it had
    second.give_back()
    admission.admit_again(first).give_back()
    assert admission._books["acme"].sandboxes == 0


def test_a_contract_is_judged_by_what_it_opens_and_by_plugins_and_by_no_quota() -> None:
    class Suspicious:
        name = "suspicious"

        def pre_admit(self, request: Asked) -> Ruling:
            contract = request.spec.contract
            odd = contract is not None and any(ports == (22,) for _, ports in contract.networks())
            return Ruling(Verdict.QUARANTINE if odd else Verdict.ACCEPT, self.name, "port 22" if odd else "")

        def post_hoc(self, record: SandboxRecord) -> None:
            raise ZeroDivisionError(record)

    def asking(to: str, *ports: int) -> SandboxSpec:
        return SandboxSpec(network=Network.CONTRACT, contract=Contract(grants=(Grant(to, ports),)))

    refused: list[str] = []
    admission = Admission(
        Court([Minos(), Rhadamanthus(), Suspicious()]), rejected=lambda action, *_: refused.append(action)
    )
    place = admission.admit("acme", asking("203.0.113.0/24"), "host", Resources(), Isolation.CONTAINER)
    policy = "id: p\nresources: {max_instances: 1}\nnetwork: {allowed_cidrs: [203.0.113.0/24]}"
    admission.replace([read_policy(policy)])
    admission.admit_contract(place, asking("203.0.113.7/32", 80))
    with pytest.raises(RequestRejected, match="rhadamanthus: network"):
        admission.admit_contract(place, asking("198.51.100.0/24"))
    with pytest.raises(RequestRejected, match="suspicious: port 22"):
        admission.admit_contract(place, asking("203.0.113.7/32", 22))
    assert refused == ["network.swear"] * 2


def test_a_judge_that_breaks_rejects() -> None:
    class Broken:
        name = "broken"

        def pre_admit(self, request: object) -> object:
            raise ZeroDivisionError(request)

        def post_hoc(self, record: object) -> None:
            raise ZeroDivisionError(record)

    spec = SandboxSpec()
    limits = Resources()
    Admission(court()).admit("acme", spec, "host", limits, Isolation.CONTAINER)
    with pytest.raises(RequestRejected, match="the judge broke"):
        Admission(Court([Broken()])).admit("acme", spec, "host", limits, Isolation.CONTAINER)  # type: ignore[list-item]
