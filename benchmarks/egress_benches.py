"""What the egress proxy costs a sandbox: a connection's first answer, and how fast bytes pass, beside going directly.

On the namespaces that the network's tests have: guest, router, host and Internet, joined by veth. The client and the
server are processes of their own, and the proxy is the one that a daemon starts, in its confinement.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from tests.network.test_contracts import lookup
from tests.network.topology import PUBLIC, Guest, World
from tests.network.webs import client_hello

from benchmarks.measure import Row
from tartarus.model.contract import Contract, parse_allow
from tartarus.network import namespace
from tartarus.network.compiled import compiled
from tartarus.network.pool import SlotPool

_NAME = "shop.example"
_ANSWERS, _LOADED = 443, 444
_BYTES = 2 << 30
_ROUNDS = 5
_CONNECTIONS = 200
_SERVER = """
import socket, sys, threading
def serve(port, work):
    server = socket.create_server((sys.argv[1], port), backlog=1024)
    while True:
        connection = server.accept()[0]
        threading.Thread(target=work, args=(connection,), daemon=True).start()
def answer(connection):
    with connection:
        connection.recv(65536)
        connection.sendall(b"ok")
def load(connection):
    piece = bytes(1 << 20)
    with connection:
        connection.recv(65536)
        for _ in range(int(sys.argv[2]) >> 20):
            connection.sendall(piece)
threading.Thread(target=serve, args=(444, load), daemon=True).start()
print("ready", flush=True)
serve(443, answer)
"""
_CLIENT = """
import socket, sys, time
address, port, times, hello = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4])
buffer = bytearray(1 << 20)
for _ in range(times):
    began = time.perf_counter()
    with socket.create_connection((address, port)) as connection:
        connection.sendall(hello)
        first = connection.recv_into(buffer)
        got = first
        answered = time.perf_counter()
        while count := connection.recv_into(buffer):
            got += count
    print(answered - began if got < 100 else got * 8e-9 / (time.perf_counter() - began))
"""


def _asked(guest: Guest, port: int, times: int) -> list[float]:
    """Seconds to each answer, or Gbit/s of each load."""
    command = [sys.executable, "-c", _CLIENT, PUBLIC, str(port), str(times), client_hello(_NAME).hex()]
    return [float(line) for line in guest.shell(*command).split()]


async def _compare(world: World) -> list[Row]:
    proxied, direct = world.guest(), world.guest()
    pool = world.pool(new_connections=10_000, burst=10_000)
    times: dict[int, tuple[list[float], list[float]]] = {_ANSWERS: ([], []), _LOADED: ([], [])}
    try:
        await _join(pool, proxied, f"{_NAME}:443,444")
        await _join(pool, direct, f"{PUBLIC}:443,444")
        for guest in (proxied, direct):
            for port in times:
                await asyncio.to_thread(_asked, guest, port, 1)  # the proxy has started by then
        for _ in range(_ROUNDS):
            for port, count in ((_ANSWERS, _CONNECTIONS), (_LOADED, 1)):
                await asyncio.to_thread(lookup, proxied, _NAME)  # an answer is good for a minute
                for guest, values in zip((proxied, direct), times[port], strict=True):
                    values.extend(await asyncio.to_thread(_asked, guest, port, count))
    finally:
        await pool.close()
    ways = ("through the proxy", "directly")
    answers = [[value * 1e6 for value in values] for values in times[_ANSWERS]]
    return [
        *(Row("egress: first answer", way, "us", values) for way, values in zip(ways, answers, strict=True)),
        *(
            Row("egress: one connection", way, "Gb/s", values, f"{_BYTES >> 20} MiB, downwards")
            for way, values in zip(ways, times[_LOADED], strict=True)
        ),
    ]


async def _join(pool: SlotPool, guest: Guest, allowed: str) -> None:
    contract = compiled(Contract(grants=(parse_allow(allowed),)))
    guest.slot = await pool.take(contract)
    await pool.attach(guest.slot, guest.namespace)
    if contract.is_proxied:
        await asyncio.to_thread(lookup, guest, _NAME)


def _measured(home: Path) -> list[Row]:
    world = World(home / "egress")
    world.names.answers[_NAME] = [PUBLIC]
    command = [sys.executable, "-c", _SERVER, PUBLIC, str(_BYTES)]
    server = namespace.run_in(world.internet, lambda: subprocess.Popen(command, stdout=subprocess.PIPE))
    try:
        assert server.stdout is not None
        server.stdout.readline()
        return world.run(lambda: _compare(world))
    finally:
        server.kill()
        server.wait()
        world.close()


async def egress(home: Path) -> list[Row]:
    """Through the proxy and directly, in turn. Nothing where this is not root."""
    return await asyncio.to_thread(_measured, home) if os.geteuid() == 0 else []
