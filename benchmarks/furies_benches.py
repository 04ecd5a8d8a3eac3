"""How soon limits are kept among 500 live sandboxes, how soon a suspect stands still, what secrets cost a launch."""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measure import Row, Timed, alternate
from benchmarks.node_benches import run_once, running_node
from tartarus.model.errors import IsolationUnavailable
from tartarus.model.quarantine import QuarantineReason
from tartarus.model.sandbox import ExecSpec, Isolation, ResourceRequest, SandboxSpec
from tartarus.model.secrets import SecretUse
from tartarus.model.states import State
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node

LIVE = 500
_TENANT = "uid-0"
_LIMITED = 100
_LIMIT_S = 5.0
_SUSPECTS, _FEW_SUSPECTS = 40, 10
_ISOLATED = (Isolation.GVISOR, Isolation.MICROVM)
_AT_ONCE = 4
_BUSY = "for i in 1 2 3; do while :; do :; done & done; wait"
_SECRETS = (0, 1, 8)
_BYSTANDER = ResourceRequest(memory_bytes=16 * 1024**2)


async def _start(
    node: Node, *argv: str, timeout_s: float | None = None, isolation: Isolation = Isolation.CONTAINER
) -> Sandbox:
    command = ExecSpec(argv=argv)
    resources = _BYSTANDER if isolation is Isolation.CONTAINER else ResourceRequest()
    return await node.create(
        _TENANT, SandboxSpec(isolation=isolation, command=command, resources=resources, timeout_s=timeout_s)
    )


async def _start_many(node: Node, count: int, timeout_s: float | None = None) -> Sequence[Sandbox]:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one() -> Sandbox:
        async with gate:
            return await _start(node, "sleep", "3600", timeout_s=timeout_s)

    return await asyncio.gather(*(one() for _ in range(count)))


async def enforcement(_home: Path) -> list[Row]:
    """Time limits and quarantine among `LIVE` sandboxes that sleep."""
    async with running_node() as node:
        await _start_many(node, LIVE)
        note = f"{LIVE} live"
        answered, gone = await _deadlines(node)
        frozen = [await _freeze(node) for _ in range(_SUSPECTS)]
        if len(node._live) != LIVE:
            raise RuntimeError(f"{len(node._live)} of {LIVE} sandboxes live")
        return [
            Row("deadline, late by", "answered", "ms", answered, note),
            Row("deadline, late by", "nothing of it left", "ms", gone, note),
            Row("quarantine", "3 busy loops stand still", "ms", frozen, note),
            *[row for isolation in _ISOLATED for row in await _freezes(node, isolation, note)],
        ]


async def _deadlines(node: Node) -> tuple[list[float], list[float]]:
    """Milliseconds after each limit until it was answered, and until its sandbox was gone."""
    answered: list[float] = []
    limited = await _start_many(node, _LIMITED, _LIMIT_S)
    for sandbox in limited:
        assert sandbox.guard is not None
        timed = functools.partial(_answer, sandbox, sandbox.guard.past_deadline, answered)
        sandbox.guard.past_deadline = timed  # type: ignore[method-assign]
    records = await asyncio.gather(*(sandbox.wait() for sandbox in limited))
    if len(answered) != _LIMITED or any(record.state is not State.TIMED_OUT for record in records):
        raise RuntimeError("not every time limit was kept")
    return answered, [((record.ended_at or 0.0) - _limit(record.started_at)) * 1e3 for record in records]


def _answer(sandbox: Sandbox, answer: Callable[[], bool], late: list[float]) -> bool:
    late.append((time.time() - _limit(sandbox.record.started_at)) * 1e3)
    return answer()


def _limit(started_at: float | None) -> float:
    assert started_at is not None
    return started_at + _LIMIT_S


async def _freezes(node: Node, isolation: Isolation, note: str) -> list[Row]:
    try:
        values = [await _freeze(node, isolation) for _ in range(_FEW_SUSPECTS)]
    except IsolationUnavailable as error:
        print(f"no {isolation.value} here: {error}", file=sys.stderr)
        return []
    return [Row("quarantine", f"the same, {isolation.value}", "ms", values, note)]


async def _freeze(node: Node, isolation: Isolation = Isolation.CONTAINER) -> float:
    """Milliseconds from the decision to nothing of it running."""
    sandbox = await _start(node, "sh", "-c", _BUSY, isolation=isolation)
    await asyncio.sleep(0.02)
    quarantine = node.furies.quarantine
    case = await quarantine.take(sandbox, QuarantineReason.MANUAL_FLAG, "bench")
    await quarantine.settled(case.id)
    await quarantine.destroy(case.id, "bench")
    if case.freeze_ms is None:
        raise RuntimeError("it was not frozen")
    return case.freeze_ms


async def secrets(home: Path) -> list[Row]:
    """A launch with secrets, asked for anew each time, and each in its file before the command starts."""
    values = home / "secrets.env"
    values.touch(mode=0o600)
    values.write_text("".join(f"S{number}=value-{number}\n" for number in range(max(_SECRETS))))
    grants = "".join(f'    - {{name: s{number}, ref: "env:S{number}"}}\n' for number in range(max(_SECRETS)))
    config = (
        f"secrets:\n  providers:\n    - {{name: env, kind: env-file, options: {{path: {values}}}}}\n  allow:\n{grants}"
    )
    async with running_node(config=config) as node:

        async def launch(count: int) -> float:
            uses = tuple(SecretUse(f"s{number}") for number in range(count))
            argv = ("/bin/sh", "-c", 'for f in /run/secrets/*; do [ -s "$f" ] && echo .; done; :')
            spec = SandboxSpec(isolation=Isolation.CONTAINER, command=ExecSpec(argv=argv), secrets=uses)
            return (await run_once(node, spec, b".\n" * count))[1]

        contenders: dict[str, Timed] = {f"{count} secrets": functools.partial(launch, count) for count in _SECRETS}
        return await alternate("launch with secrets", contenders, 60, slow_runs=60)


BENCHES = {"enforcement": enforcement, "secrets": secrets}
