"""What a network contract costs a launch, alone and among 500 others, in a network namespace of the bench's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from benchmarks.measure import Row, wall_ms
from benchmarks.node_benches import run_once, running_node
from tartarus.model.contract import Contract, Grant
from tartarus.model.sandbox import ExecSpec, Isolation, Network, SandboxSpec
from tartarus.network import namespace
from tartarus.network.compiled import compiled
from tartarus.network.pool import SlotPool
from tartarus.node.service import Node

OTHERS = 500
_RUNS = 100
_AT_ONCE = 8
_CONTRACT = Contract(
    grants=(Grant("203.0.113.0/24", (80, 443)), Grant("198.51.100.7", (22,)), Grant("192.0.2.0/25", (8080,)))
)
_ANOTHER = Contract(grants=(Grant("203.0.113.0/25", (443,)), *_CONTRACT.grants[1:]))


async def network(_home: Path) -> list[Row]:
    """Slots and launches, before and while `OTHERS` hold contracts of their own on links of their own."""
    made = namespace.create()
    try:
        # The host's own network is left alone; the daemon's threads are all of that namespace.
        return await asyncio.to_thread(namespace.run_in, made, lambda: asyncio.run(_measure()))
    finally:
        os.close(made)


async def _measure() -> list[Row]:
    async with running_node() as node:
        slots = node.networking.slots
        await slots.give_back(await slots.take())  # the router is made once
        quiet = [await _slots(slots, "no other"), await _launches(node, "no other contract live")]
        async with _others(slots):
            among = f"{OTHERS} others"
            return [
                *quiet[0],
                *await _slots(slots, among),
                *quiet[1],
                *await _launches(node, f"{OTHERS} contracts live"),
            ]


async def _slots(slots: SlotPool, note: str) -> list[Row]:
    taken: list[float] = []
    joined: list[float] = []
    sworn: list[float] = []
    for _ in range(_RUNS):
        guest = namespace.create()
        try:
            began = time.perf_counter()
            slot = await slots.take(compiled(_CONTRACT))
            taken.append((time.perf_counter() - began) * 1e3)
            joined.append(await wall_ms(lambda slot=slot, guest=guest: slots.attach(slot, guest)))  # type: ignore[misc]
            sworn.append(await wall_ms(lambda slot=slot: slots.swear(slot, compiled(_ANOTHER))))  # type: ignore[misc]
            await slots.give_back(slot)
        finally:
            os.close(guest)
    return [
        Row("network slot", "taken, held to a contract", "ms", taken, note),
        Row("network slot", "joined to a guest", "ms", joined, note),
        Row("network slot", "another contract applied", "ms", sworn, note),
    ]


async def _launches(node: Node, note: str) -> list[Row]:
    plain = SandboxSpec(isolation=Isolation.CONTAINER, command=ExecSpec(argv=("echo", "done")))
    held = SandboxSpec(
        isolation=Isolation.CONTAINER, command=plain.command, network=Network.CONTRACT, contract=_CONTRACT
    )
    contenders: dict[str, Callable[[], Awaitable[float]]] = {
        name: (lambda spec=spec: _launch(node, spec))  # type: ignore[misc]
        for name, spec in (("without a network", plain), ("with a contract", held))
    }
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(_RUNS + 1):
        for name, launch in contenders.items():
            took = await launch()
            if turn:  # once unmeasured
                values[name].append(took)
    return [Row("launch, container", name, "ms", times, note) for name, times in values.items()]


async def _launch(node: Node, spec: SandboxSpec) -> float:
    return (await run_once(node, spec, b"done\n"))[0]


@contextlib.asynccontextmanager
async def _others(slots: SlotPool) -> AsyncIterator[None]:
    """`OTHERS` slots, each with a link and a contract that no other has."""
    gate = asyncio.Semaphore(_AT_ONCE)
    guests: list[int] = []

    async def one(number: int) -> None:
        async with gate:
            own = Contract(grants=(*_CONTRACT.grants, Grant(f"203.0.{number % 256}.0/24", (1000 + number,))))
            slot = await slots.take(compiled(own))
            guests.append(await asyncio.to_thread(namespace.create))
            await slots.attach(slot, guests[-1])

    try:
        await asyncio.gather(*(one(number) for number in range(OTHERS)))
        yield
    finally:
        for guest in guests:
            os.close(guest)


BENCHES = {"network": network}
