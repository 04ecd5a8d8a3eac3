"""kill -9 of the process that has the network: guests are cut with it, and the next start puts the host back."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.network.servers import wait_until
from tests.network.topology import HOST, PUBLIC, Guest, World, joined, off

from tartarus.model.errors import InvalidState
from tartarus.network import ledger

pytestmark = pytest.mark.needs("root", "nft", "ip")
VICTIM = Path(__file__).with_name("victim.py")


def start(world: World, guest: Guest, *more: str) -> subprocess.Popen[str]:
    argv = [sys.executable, str(VICTIM), str(world.state_dir), str(guest.namespace), *more]
    return world.in_host(lambda: subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=[guest.namespace]))


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)
    if process.stdout is not None:
        process.stdout.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_guests_are_cut_at_once_and_the_next_start_puts_everything_back(world: World) -> None:
    guest = world.guest()
    process = start(world, guest)
    try:
        assert [line(process), line(process)] == ["starting", "joined"]
        assert guest.ask(PUBLIC) == HOST
    finally:
        kill(process)
    # Nobody had to clean up for that.
    wait_until(lambda: "eth0" not in guest.shell("ip", "link"), "the guest's link goes with the daemon")
    wait_until(lambda: "tartarus" not in world.shell("ip", "link"), "and so does the host's")
    assert guest.ask(PUBLIC) == "Network is unreachable"
    # What stays is known, and closed: a table, and a link that forwards for nobody.
    assert world.forwarding("eth0") == "1"
    assert any("tartarus" in trace for trace in world.traces())
    assert world.run(world.pool().clean) is True
    assert world.traces() == []
    assert world.run(world.pool().clean) is False


def test_opening_again_is_as_good_as_cleaning(world: World) -> None:
    guest, other = world.guest(), world.guest()
    process = start(world, guest)
    try:
        assert [line(process), line(process)] == ["starting", "joined"]
    finally:
        kill(process)

    async def scenario() -> None:
        async with joined(world.pool(), other):
            assert await off(lambda: other.ask(PUBLIC)) == HOST

    world.run(scenario)
    assert world.traces() == []


def test_at_any_moment(world: World) -> None:
    world.join_ipv6()
    chance = random.Random(7)
    for kernel in ("new", "old", "new", "old", "new"):  # as to what it can do for IPv6
        guest = world.guest()
        process = start(world, guest, kernel)
        try:
            assert line(process) == "starting"
            time.sleep(chance.random() * 0.08)
        finally:
            kill(process)
        world.run(world.pool().clean)
        wait_until(lambda: not world.traces(), f"what is left: {world.traces()}")
        guest.close()


def test_a_living_daemon_is_not_cleaned_up_after(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "WAIT_S", 0.1)
    guest = world.guest()
    process = start(world, guest)
    try:
        assert [line(process), line(process)] == ["starting", "joined"]
        with pytest.raises(InvalidState, match="another daemon"):
            world.run(world.pool().clean)
        assert guest.ask(PUBLIC) == HOST
    finally:
        kill(process)
        world.run(world.pool().clean)
    assert os.path.exists(world.state_dir / "network.lock")
