"""Slots: what they give, what they count, and what they leave."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import subprocess
from pathlib import Path

import pytest
from tests.network.servers import NAME_SERVER, wait_until
from tests.network.topology import HOST, NEIGHBOUR, PORT, PRIVATE, PUBLIC, Guest, World, joined, off

from tartarus.model.errors import GuestFailed, InvalidRequest, InvalidState, NoSpace, Unsupported
from tartarus.network import ledger, namespace, nft, rules, wall
from tartarus.network.oaths import Oaths
from tartarus.network.pool import SlotPool
from tartarus.network.settings import NetworkSettings

pytestmark = pytest.mark.needs("root", "nft", "ip")


def test_a_guest_reaches_public_addresses_as_the_host(world: World) -> None:
    guest = world.guest()

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            assert await off(lambda: guest.exchange(PUBLIC, PORT, b"hello")) == HOST.encode() + b" hello"
            assert "eth0" in await off(lambda: guest.shell("ip", "-o", "link", "show", "up"))
            assert await off(lambda: guest.shell("ip", "-6", "address", "show", "dev", "eth0")) == ""

    world.run(scenario)
    assert world.traces() == []


def test_a_guest_without_a_slot_reaches_nothing(world: World) -> None:
    assert world.guest().ask(PUBLIC) == "Network is unreachable"


def test_what_a_slot_did_is_counted_from_its_taking_on(world: World) -> None:
    first, second = world.guest(), world.guest()

    async def scenario() -> None:
        pool = world.pool(slots=1)
        try:
            slot = await pool.take()
            await pool.attach(slot, first.namespace)
            await off(lambda: first.ask(PUBLIC))
            for _ in range(3):
                await off(lambda: first.ask(PRIVATE[0]))
            found = slot.counters()
            assert (found["opened"], found["refused_private"]) == (1, 3)
            assert found["sent_bytes"] > 100
            assert found["received_bytes"] > 100
            final = await pool.give_back(slot)
            assert final == slot.counters() == await pool.give_back(slot)
            assert (final["opened"], final["refused_private"]) == (1, 3)
            again = await pool.take()
            assert again.number == slot.number
            await pool.attach(again, second.namespace)
            assert "refused_private" not in again.counters()
            await off(lambda: second.ask(PRIVATE[1]))
            assert again.counters()["refused_private"] == 1
            await pool.give_back(again)
        finally:
            await pool.close()

    world.run(scenario)


def test_a_slot_that_is_free_longest_is_taken_next_and_there_is_an_end_of_them(world: World) -> None:
    async def scenario() -> None:
        pool = world.pool(slots=3)
        try:
            slots = [await pool.take() for _ in range(3)]
            with pytest.raises(NoSpace, match="no network slot is free"):
                await pool.take()
            await pool.give_back(slots[1])
            await pool.give_back(slots[0])
            assert [(await pool.take()).number for _ in range(2)] == [1, 0]
            assert len({slot.address for slot in slots}) == 3
        finally:
            await pool.close()

    world.run(scenario)


def test_a_new_guest_gets_nothing_of_the_last_one_s_connections(world: World) -> None:
    """The same slot, address and port: what the Internet still sends to the last guest must not arrive."""
    sender = namespace.run_in(world.internet, _bound)
    first, second = world.guest(), world.guest()

    def local(guest: Guest) -> socket.socket:
        def made() -> socket.socket:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("0.0.0.0", 5555))
            sock.settimeout(0.3)
            return sock

        return guest.run(made)

    async def scenario() -> None:
        pool = world.pool(slots=1)
        slot = await pool.take()
        await pool.attach(slot, first.namespace)
        with local(first) as sock:
            sock.sendto(b"hello", (PUBLIC, 4000))
            _, back = await off(lambda: sender.recvfrom(100))
            sender.sendto(b"for the first", back)
            assert (await off(lambda: sock.recv(100))) == b"for the first"
        await pool.give_back(slot)
        slot = await pool.take()
        await pool.attach(slot, second.namespace)
        with local(second) as sock:
            sender.sendto(b"still for the first", back)
            with pytest.raises(TimeoutError):
                await off(lambda: sock.recv(100))
        await pool.give_back(slot)
        await pool.close()

    try:
        world.run(scenario)
    finally:
        sender.close()


def _bound() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.bind((PUBLIC, 4000))
    return sock


def test_only_its_own_connections_are_forgotten(world: World) -> None:
    first, second = world.guest(), world.guest()

    async def scenario() -> None:
        pool = world.pool()
        async with joined(pool, first, second):
            with await off(lambda: second.run(lambda: socket.create_connection((PUBLIC, PORT), timeout=5))) as kept:
                assert kept.recv(100) == HOST.encode()
                assert first.slot is not None
                await pool.give_back(first.slot)
                before = second.slot.counters() if second.slot else {}
                kept.sendall(b"more")
                await off(lambda: wait_until(lambda: _unacknowledged(kept) == 0, "the server's kernel acknowledges"))
                after = second.slot.counters() if second.slot else {}
                assert before.get("refused_invalid") == after.get("refused_invalid")

    world.run(scenario)


def _unacknowledged(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, 0x5411, bytes(4)))[0])  # SIOCOUTQ


def test_a_pidfd_serves_as_well_and_an_ended_process_is_an_error(world: World) -> None:
    async def scenario() -> None:
        pool = world.pool()
        process = await off(lambda: subprocess.Popen(["unshare", "-n", "sleep", "60"]))
        pidfd = os.pidfd_open(process.pid)
        try:
            host = namespace.identity()
            await off(
                lambda: wait_until(
                    lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino != host[1], "the process unshares"
                )
            )
            slot = await pool.take()
            await pool.attach(slot, pidfd)
            assert "slot0" in str(await off(lambda: _router_links(pool)))
            process.kill()
            process.wait(5)
            other = await pool.take()
            with pytest.raises(GuestFailed, match="No such process"):
                await pool.attach(other, pidfd)
            await pool.give_back(slot)
            await pool.give_back(other)
        finally:
            process.kill()
            process.wait(5)
            os.close(pidfd)
            await pool.close()

    world.run(scenario)


def _router_links(pool: SlotPool) -> list[str]:
    assert pool._router is not None
    return [link.name for link in pool._router._links.all()]


def test_the_host_s_own_namespace_and_the_router_s_are_refused(world: World) -> None:
    async def scenario() -> None:
        pool = world.pool()
        slot = await pool.take()
        assert pool._router is not None
        for wrong in (world.host, pool._router.namespace):
            with pytest.raises(GuestFailed, match="no network namespace of its own"):
                await pool.attach(slot, wrong)
        await pool.give_back(slot)
        with pytest.raises(InvalidState):
            await pool.attach(slot, world.guest().namespace)
        await pool.close()

    world.run(scenario)
    assert world.shell("ip", "-o", "-4", "address", "show", "dev", "eth0").count("inet ") == 1


def test_a_failed_attach_leaves_nothing_and_the_slot_can_be_tried_again(world: World) -> None:
    guest, other = world.guest(), world.guest()
    guest.shell("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")

    async def scenario() -> None:
        pool = world.pool()
        slot = await pool.take()
        with pytest.raises(GuestFailed, match="File exists"):
            await pool.attach(slot, guest.namespace)
        assert "slot0" not in _router_links(pool)
        await pool.attach(slot, other.namespace)
        assert await off(lambda: other.ask(PUBLIC)) == HOST
        await pool.give_back(slot)
        await pool.close()

    world.run(scenario)


@pytest.mark.parametrize("end", ["cut", "give_back"])
def test_a_contract_that_the_kernel_does_not_take_back_goes_with_its_link(
    world: World, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Out of memory at that moment: nothing of it passes all the same, and nobody gets its slot before it is clean."""
    guest, later = world.guest(), world.guest()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    async def scenario() -> None:
        async with joined(world.pool(slots=8), guest) as pool:
            assert guest.slot is not None
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            with monkeypatch.context() as broken:
                broken.setattr(Oaths, "release", refuse)
                with pytest.raises(OSError, match="memory"):
                    await getattr(pool, end)(guest.slot)
            assert await off(lambda: guest.ask(PUBLIC)) == "Network is unreachable"
            await pool.give_back(guest.slot)
            numbers = set()
            for _ in range(16):
                later.slot = await pool.take()
                numbers.add(later.slot.number)
                await pool.attach(later.slot, later.namespace)
                assert await off(lambda: later.ask(PUBLIC)) == HOST
                await pool.give_back(later.slot)
            assert (guest.slot.number in numbers) is (end == "cut")  # which was given back when the kernel could again

    world.run(scenario)


def test_many_come_and_go_at_once(world: World) -> None:
    guests = [world.guest() for _ in range(16)]

    async def one(pool: SlotPool, guest: Guest) -> str:
        slot = await pool.take()
        await pool.attach(slot, guest.namespace)
        said = await off(lambda: guest.ask(PUBLIC))
        await pool.give_back(slot)
        return said

    async def scenario() -> None:
        pool = world.pool()
        await pool.open()
        for _ in range(2):
            assert await asyncio.gather(*(one(pool, guest) for guest in guests)) == [HOST] * len(guests)
        assert _router_links(pool) in (["lo", rules.UPLINK], [rules.UPLINK, "lo"])
        await pool.close()

    world.run(scenario)


def test_who_is_cancelled_leaves_no_slot_half_attached_or_half_given_back(world: World) -> None:
    async def scenario() -> None:
        pool = world.pool()
        await pool.open()
        for _ in range(5):
            guest = world.guest()
            slot = await pool.take()
            attaching = asyncio.create_task(pool.attach(slot, guest.namespace))
            await asyncio.sleep(0)
            attaching.cancel()
            await pool.give_back(slot)
            await asyncio.gather(attaching, return_exceptions=True)
            assert slot.number in pool._free
            again = await pool.take()
            await pool.attach(again, world.guest().namespace)
            giving = asyncio.create_task(pool.give_back(again))
            await asyncio.sleep(0)
            giving.cancel()
            await asyncio.gather(giving, return_exceptions=True)
            assert again.number in pool._free
            assert rules.slot_link(slot.number) not in _router_links(pool)
        await pool.close()

    world.run(scenario)


def test_addresses_avoid_the_host_s_routes_and_name_servers(world: World) -> None:
    world.shell("ip", "route", "add", "10.201.0.0/22", "dev", "eth1")

    async def scenario() -> None:
        pool = SlotPool(
            world.state_dir, NetworkSettings(slots=200, ranges=("10.201.0.0/21",), name_servers=("10.201.4.7",))
        )
        slot = await pool.take()
        assert str(slot.address) == "10.201.5.2"
        await pool.give_back(slot)
        await pool.close()
        full = SlotPool(world.state_dir, NetworkSettings(slots=200, ranges=("10.201.0.0/22",)))
        with pytest.raises(NoSpace, match="no addresses are left"):
            await full.open()

    world.run(scenario)
    assert world.state_dir.joinpath("network.json").exists() is False


def test_packets_fit_the_host_s_way_out(world: World) -> None:
    world.shell("ip", "link", "set", "eth0", "mtu", "1400")
    guest = world.guest()

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            assert "mtu 1400" in await off(lambda: guest.shell("ip", "link", "show", "eth0"))

    world.run(scenario)


def test_one_state_directory_has_one_network(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "WAIT_S", 0.1)

    async def scenario() -> None:
        async with joined(world.pool()) as pool:
            await pool.open()
            with pytest.raises(InvalidState, match="another daemon"):
                await world.pool().open()

    world.run(scenario)


def test_two_daemons_have_a_network_each(world: World, tmp_path: Path) -> None:
    first, second = world.guest(), world.guest()

    async def scenario() -> None:
        other = SlotPool(tmp_path / "other", NetworkSettings(name_servers=(NAME_SERVER,)))
        pool = world.pool()
        await pool.open()
        async with joined(other, second):
            async with joined(pool, first):
                assert first.slot is not None
                assert second.slot is not None
                assert first.slot.address != second.slot.address
                assert await off(lambda: first.ask(PUBLIC)) == HOST
                assert await off(lambda: second.ask(PUBLIC)) == HOST
                assert await off(lambda: second.ask(str(first.slot.address) if first.slot else "")) != HOST
            await off(lambda: wait_until(lambda: second.ask(PUBLIC, patience_s=0.5) == HOST, "the other goes on"))

    world.run(scenario)
    assert world.traces() == []


def test_it_opens_by_itself_and_can_be_opened_again(world: World) -> None:
    guest = world.guest()

    async def scenario() -> None:
        pool = world.pool()
        await asyncio.gather(pool.open(), pool.open())
        await pool.close()
        await pool.close()
        assert world.traces() == []
        async with joined(pool, guest):
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            # The second router knows the host as well as the first did.
            assert await off(lambda: guest.ask(NEIGHBOUR)) == "No route to host"
            assert guest.slot is not None
            assert guest.slot.counters()["refused_neighbour"] == 1

    world.run(scenario)


def test_closing_cuts_every_slot(world: World) -> None:
    guest = world.guest()

    async def scenario() -> None:
        pool = world.pool()
        slot = await pool.take()
        await pool.attach(slot, guest.namespace)
        await pool.close()
        assert await pool.give_back(slot) == slot.counters() == {}

    world.run(scenario)
    wait_until(lambda: "eth0" not in guest.shell("ip", "link"), "the link goes with the router")


def test_without_root_it_is_refused_in_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unsupported, match="does not run as root"):
        world.run(world.pool().take)
    assert world.traces() == []


def test_without_nft_it_is_refused_in_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "path", lambda: None)
    with pytest.raises(Unsupported, match="nft is missing"):
        world.run(world.pool().take)


def test_rules_that_the_kernel_refuses_leave_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wall, "host_table", lambda *_, **__: "table inet x { chain y { jump nowhere\n } }")
    with pytest.raises(Unsupported, match="can't be installed"):
        world.run(world.pool().open)
    assert world.traces() == []


@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 0}, {"slots": 100_000}, {"ranges": ("8.8.0.0/16",)}, {"ranges": ("10.1.2.3/16",)},
        {"ranges": ("10.0.0.0/30",)}, {"ranges": ("x",)}, {"connections": 0}, {"dns_queries": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        SlotPool(tmp_path, NetworkSettings(**settings))  # type: ignore[arg-type]


def test_the_neighbour_is_a_real_one(world: World) -> None:
    """What the escape tests call closed is open to the host itself."""

    def ask(address: str) -> str:
        with socket.create_connection((address, PORT), timeout=5) as connection:
            return connection.recv(100).decode()

    assert world.in_host(lambda: ask(NEIGHBOUR)) == "192.0.2.10"
    assert world.in_host(lambda: ask(PRIVATE[0])) == HOST
