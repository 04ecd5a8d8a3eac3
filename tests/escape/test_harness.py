"""The tests' own honesty: what is broken, reached or changed must be noticed."""

from __future__ import annotations

import os
import socket

import pytest
from tests.escape.arena import Arena
from tests.escape.attack import every, inside, shipped
from tests.escape.host import changes
from tests.escape.kit import ESCAPED, outcome

from tartarus.model.sandbox import Isolation

pytestmark = [pytest.mark.anyio, pytest.mark.needs("system-python")]
LEVEL = Isolation.PROCESS


def _fails() -> str:
    raise ValueError("the attack is broken")


def _ends_early() -> str:
    os._exit(0)


def _succeeds() -> str:
    return outcome(os.getcwd)


@pytest.mark.parametrize("attack", [_fails, _ends_early])
async def test_an_attack_that_fails_by_itself_is_not_held(arena: Arena, attack: object) -> None:
    sandbox = await arena.sandbox(LEVEL)
    try:
        name = attack.__name__  # type: ignore[attr-defined]
        with pytest.raises(AssertionError, match="no verdict"):
            await arena.attack(sandbox, shipped(attack) + f"\nrun({name})\n")  # type: ignore[arg-type]
    finally:
        await sandbox.kill()


async def test_what_succeeds_is_an_escape(arena: Arena) -> None:
    sandbox = await arena.sandbox(LEVEL)
    try:
        assert await arena.attack(sandbox, shipped(_succeeds) + "\nrun(_succeeds)\n") == {"": ESCAPED}
    finally:
        await sandbox.kill()


async def test_a_knock_at_a_door_is_noticed(arena: Arena) -> None:
    world = arena.bait.world()
    for name, port in world["ports"].items():
        family = socket.AF_INET6 if name.endswith("6") else socket.AF_INET
        kind = socket.SOCK_DGRAM if name.startswith("udp") else socket.SOCK_STREAM
        with socket.socket(family, kind) as client:
            client.connect(("::1" if name.endswith("6") else "127.0.0.1", port))
            client.send(b"x")
    for path in (*world["sockets"], world["abstract"]):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    knocked = arena.bait.touched()
    assert len(knocked) == len(world["ports"]) + len(world["sockets"]) + 1, knocked
    assert arena.bait.touched() == []


async def test_a_change_of_the_bait_is_noticed(arena: Arena) -> None:
    before = arena.bait.state()
    path = arena.bait.directory / "writable"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    (arena.bait.directory / "new").touch()
    found = changes(before, arena.bait.state())
    assert any(str(path) in line for line in found)
    assert any(line.startswith(str(arena.bait.directory / "new")) for line in found)
    (arena.bait.directory / "new").unlink()
    assert arena.bait.state() == arena.bait.state()


async def test_a_hurt_twin_is_noticed(arena: Arena) -> None:
    sandbox = await arena.sandbox(LEVEL)
    twin = arena.twin(sandbox)
    try:
        before = twin.state()
        assert changes(before, twin.state()) == []
        os.setpriority(os.PRIO_PROCESS, twin.pid, 5)
        assert changes(before, twin.state())
    finally:
        twin.close()
        await sandbox.kill()


async def test_what_is_left_is_noticed(arena: Arena) -> None:
    sandbox = await arena.sandbox(LEVEL)
    assert any(sandbox.record.id in thing for thing in arena.leftovers())
    await sandbox.kill()
    assert not any(sandbox.record.id in thing for thing in arena.leftovers())


def test_two_attacks_can_not_share_a_name() -> None:
    taken = next(iter(every()))
    with pytest.raises(ValueError, match="two attacks"):
        inside(taken, tries="", container="EPERM")(_succeeds)
