"""Published ports: bytes both ways over the guest's channel, without a network; who may not, and that they go."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tartarus.model.contract import Contract, Publish
from tartarus.model.errors import InvalidRequest, InvalidState, Unsupported
from tartarus.model.sandbox import ExecSpec, Isolation, Network, SandboxSpec
from tartarus.node.publishing import Published
from tartarus.node.service import Node

from .conftest import TENANT

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "system-python")]
ECHO = """
import socket, threading
server = socket.create_server(("127.0.0.1", 8080))
print("ready", flush=True)
def echo(connection):
    while data := connection.recv(65536):
        connection.sendall(data.upper())
    connection.close()
while True:
    threading.Thread(target=echo, args=(server.accept()[0],)).start()
"""


def spec(*ports: Publish, **rest: object) -> SandboxSpec:
    command = ExecSpec(argv=("python3", "-c", ECHO))
    return SandboxSpec(isolation=Isolation.CONTAINER, command=command, publish=ports, **rest)  # type: ignore[arg-type]


async def test_bytes_pass_both_ways_and_the_port_goes_with_the_sandbox(node: Node) -> None:
    sandbox = await node.create(TENANT, spec(Publish(8080), Publish(8081)))
    assert sandbox.main is not None
    assert await sandbox.main.read() == (1, b"ready\n")
    open_port, dead_port = (one.port for one in sandbox.record.spec.publish)
    assert min(open_port, dead_port) > 0
    with pytest.raises(InvalidRequest, match="can't be published"):  # it is taken
        await node.create(TENANT, spec(Publish(80), Publish(8080, open_port)))
    reader, writer = await asyncio.open_connection("127.0.0.1", open_port)
    sent = b"abcdefgh" * 100_000
    writing = asyncio.create_task(_send(writer, sent))
    assert await reader.read(-1) == sent.upper()
    await writing
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", dead_port)  # nobody listens inside
    assert await reader.read(-1) == b""
    writer.close()
    state = await node.contracts.state(sandbox)
    assert (state.contract, state.published) == (None, sandbox.record.spec.publish)
    await sandbox.kill()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", open_port)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()
    writer.write_eof()


async def test_who_can_t(node: Node) -> None:
    with pytest.raises(Unsupported, match="no ports to show"):
        await node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS, publish=(Publish(80),)))
    with pytest.raises(InvalidRequest, match="root's"):
        Published.bind("uid-1000", (Publish(80, 80),), node.sleeper.wake)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match="Address already in use"):
            Published.bind("uid-0", (Publish(80), Publish(80, port)), node.sleeper.wake)
    with pytest.raises(InvalidRequest, match="not exposed"):
        spec(Publish(80), network=Network.CONTRACT, contract=Contract(exposed_ports=(8080,)))


async def test_a_contract_says_which_ports_are_exposed(node: Node) -> None:
    sandbox = await node.create(TENANT, spec())
    asked = spec(network=Network.CONTRACT, contract=Contract(exposed_ports=(8081,)))
    sandbox.record = type(sandbox.record)(
        **{name: getattr(sandbox.record, name) for name in sandbox.record.__struct_fields__} | {"spec": asked}
    )
    with pytest.raises(InvalidState, match="not exposed"):
        async with sandbox.connection(8080):
            pass
    await sandbox.kill()
