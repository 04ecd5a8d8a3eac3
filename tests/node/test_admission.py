"""Admission in the way of every new sandbox, on a real node."""

from __future__ import annotations

import asyncio

import pytest
from tests.node.conftest import TENANT, Run

from tartarus.model.errors import RequestRejected, Unsupported
from tartarus.model.sandbox import ExecSpec, Isolation, ResourceRequest, Resources, SandboxSpec
from tartarus.model.states import State
from tartarus.node.admission import Admission
from tartarus.node.service import Node
from tartarus.policy.documents import read_policy
from tartarus.policy.judges import Court, court

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
