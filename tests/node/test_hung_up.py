"""Callers that go away in the moment in which their sandbox has just begun: it does not go on without them."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tartarus.model.contract import Publish
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.model.states import State
from tartarus.node.publishing import Published
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.policy.judges import Ruling, Verdict

from .conftest import TENANT

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "system-python")]
SPEC = SandboxSpec(
    isolation=Isolation.CONTAINER, command=ExecSpec(argv=("/bin/sleep", "1000")), publish=(Publish(8080),)
)


async def left_before_its_ports_are_served(node: Node, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The sandbox whose creator hung up then."""
    begun: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()

    async def serve(_: Published, sandbox: Sandbox) -> None:
        begun.set_result(sandbox)
        await asyncio.sleep(1000)

    monkeypatch.setattr(Published, "serve", serve)
    creating = asyncio.create_task(node.create(TENANT, SPEC))
    sandbox = await begun
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    return sandbox


async def test_it_ends_and_gives_back_what_it_had(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = await left_before_its_ports_are_served(node, monkeypatch)
    assert sandbox.record.state is State.KILLED
    assert node.admission._books[TENANT].sandboxes == 0
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", sandbox.record.spec.publish[0].port)


async def test_what_a_judge_suspects_is_held_all_the_same(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    class Suspicious:
        name = "suspicious"

        def pre_admit(self, request: object) -> Ruling:  # noqa: ARG002
            return Ruling(Verdict.QUARANTINE, self.name, "from a source that nobody knows")

        def post_hoc(self, record: object) -> None:
            """Nothing."""

    node.admission._court._judges = (Suspicious(),)
    sandbox = await left_before_its_ports_are_served(node, monkeypatch)
    assert sandbox.record.state is State.QUARANTINED
    assert node.admission._books[TENANT].sandboxes == 1
    await node.furies.quarantine.destroy(sandbox.record.id, "test")
    await sandbox.wait()
    assert node.admission._books[TENANT].sandboxes == 0


async def test_an_answer_that_nobody_takes_any_more(node: Node) -> None:
    adopt = node._launcher._adopt
    made: list[Sandbox] = []

    def adopted(sandbox: Sandbox) -> None:
        adopt(sandbox)
        made.append(sandbox)
        asyncio.get_running_loop().call_soon(creating.cancel)  # it is made by then; whoever asked has yet to hear so

    node._launcher._adopt = adopted
    creating = asyncio.create_task(node.create(TENANT, msgspec.structs.replace(SPEC, publish=())))
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert made[0].record.state is State.KILLED
