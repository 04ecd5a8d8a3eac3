"""Contracts with real packets of IPv6: what one opens, what never is, and what the host is changed in for it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path

import dns.message
import dns.query
import pytest
from tests.escape.packets import ip_packet_6
from tests.network.servers import wait_until
from tests.network.test_contracts import REFUSED, allowing, held, says
from tests.network.test_death import kill, line, start
from tests.network.topology import (
    HOST,
    HOST_6,
    METADATA_6,
    NEIGHBOUR_6,
    PORT,
    PRIVATE_6,
    PUBLIC,
    PUBLIC_6,
    RESERVED_6,
    ROUTER_OF_THE_HOST_6,
    Guest,
    World,
    off,
)

from tartarus.network import forwarding, namespace, resolver

pytestmark = pytest.mark.needs("root", "nft", "ip")
DENIED = "Connection refused"


def test_only_what_is_named_is_open(world: World) -> None:
    world.join_ipv6()
    guest = world.guest()
    world.serve(world.internet, 81, address="::")

    async def scenario() -> None:
        contract = allowing(f"[{PUBLIC_6}]:80", "[2001:db8:81::/48]:80", denied_cidrs=("2001:db8:81:9::/64",))
        async with held(world.pool(), guest, contract) as slot:
            assert await says(guest, PUBLIC_6) == HOST_6
            for address, port in ((PUBLIC_6, 81), ("2001:db8:82::1", 80), ("2001:db8:81:9::1", 80)):
                assert await says(guest, address, port) == DENIED
            closed = {"private": PRIVATE_6, "metadata": METADATA_6, "reserved": RESERVED_6, "host": (HOST_6,),
                      "neighbour": (NEIGHBOUR_6, ROUTER_OF_THE_HOST_6)}  # fmt: skip
            for addresses in closed.values():
                for address in addresses:
                    assert await says(guest, address) == DENIED
            assert await says(guest, PUBLIC) == REFUSED  # of IPv4 nothing was named
            found = slot.counters()
            assert found["refused_contract"] == 4
            assert {reason: found[f"refused_{reason}"] for reason in closed} == {
                reason: len(addresses) for reason, addresses in closed.items()
            }
            assert not {"refused_spoofed", "refused_ipv6", "refused_protocol", "refused_unsworn"} & set(found)

    world.run(scenario)
    assert world.traces() == []


def test_a_host_with_ipv6_off_for_new_links_still_gives_it(world: World) -> None:
    world.join_ipv6()
    guest = world.guest()
    guest.run(lambda: Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1"))

    async def scenario() -> None:
        async with held(world.pool(), guest, allowing(f"[{PUBLIC_6}]:80")):
            assert await says(guest, PUBLIC_6) == HOST_6

    world.run(scenario)


def lookup(guest: Guest, name: str) -> list[str]:
    """Ask the slot's own name server for addresses of IPv6."""
    assert guest.slot is not None
    gateway = str(guest.slot.gateway)
    answer = guest.run(lambda: dns.query.udp(dns.message.make_query(name, "AAAA"), gateway, timeout=5))
    return [rdata.address for rrset in answer.answer for rdata in rrset]


def test_a_domain_opens_what_it_was_answered_for_its_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_LEAST_TTL_S", 1)
    monkeypatch.setattr(resolver, "_MOST_TTL_S", 1)
    world.join_ipv6()
    guest = world.guest()
    world.names.answers |= {"public.example": [PUBLIC, PUBLIC_6], "shop.example": [PUBLIC, PUBLIC_6]}

    async def scenario() -> None:
        contract = allowing("public.example:80/direct", "*.wild.example:80/direct", "shop.example:80")
        async with held(world.pool(), guest, contract) as slot:
            assert await says(guest, PUBLIC_6) == DENIED
            # The egress proxy has no way to IPv6, so a name that is reached through it is told to have none.
            assert await off(lambda: lookup(guest, "shop.example")) == []
            assert world.names.asked == []
            assert await off(lambda: lookup(guest, "public.example")) == [PUBLIC_6]
            assert await says(guest, PUBLIC_6) == HOST_6
            assert await says(guest, PUBLIC_6, 81) == DENIED
            kept = await off(lambda: guest.run(lambda: socket.create_connection((PUBLIC_6, PORT), timeout=5)))
            await asyncio.sleep(2.2)
            assert await says(guest, PUBLIC_6) == DENIED
            with kept:  # what was begun in that time goes on
                assert await off(lambda: kept.recv(100)) == HOST_6.encode()
            inside = (*PRIVATE_6, *METADATA_6, *RESERVED_6, "::1", "fe80::1", "::ffff:10.9.9.9", HOST_6, NEIGHBOUR_6)
            for address in inside:
                world.names.answers["a.wild.example"] = [address]
                assert await off(lambda: lookup(guest, "a.wild.example")) == []
            assert slot.counters()["dns_rebinding"] == len(inside)

    world.run(scenario)


def test_private_addresses_take_a_contract_that_says_so(world: World) -> None:
    world.join_ipv6()
    guest, beside = world.guest(), world.guest()

    async def scenario() -> None:
        pool = world.pool()
        beside.slot = await pool.take(allowing("[::/0]"))
        await pool.attach(beside.slot, beside.namespace)
        async with held(pool, guest, allowing("[fd00::/8]", deny_private=False)) as slot:
            assert await says(guest, PRIVATE_6[0]) == HOST_6
            for address in (PRIVATE_6[1], *METADATA_6, NEIGHBOUR_6, HOST_6, PUBLIC_6, str(beside.slot.address_6)):
                assert await says(guest, address) == DENIED
            assert await says(beside, PRIVATE_6[0]) == DENIED
            assert slot.counters()["refused_peer"] == 1
            await pool.swear(slot, allowing("[fd00::/8]", f"[{NEIGHBOUR_6}]", deny_metadata=False))
            assert await says(guest, METADATA_6[0]) == HOST_6
            for address in (PRIVATE_6[0], NEIGHBOUR_6):
                assert await says(guest, address) == DENIED
            await pool.swear(slot, allowing(f"[{NEIGHBOUR_6}]", deny_private=False))
            mark, sniffer = world.mark(), world.sniff(world.lan)
            guest.send(NEIGHBOUR_6, 9, mark)
            await off(lambda: wait_until(lambda: sniffer.saw(mark), "it gets to the neighbour"))
            await pool.swear(slot, allowing(PUBLIC))  # of IPv6 nothing: told at once as well
            assert await says(guest, PUBLIC_6) == DENIED
            assert slot.counters()["refused_ipv6"] == 1
            assert slot.why_not_6 == "the contract opens nothing of it"

    world.run(scenario)
    assert world.traces() == []


def test_a_host_without_a_way_to_it_is_left_as_it_is(world: World) -> None:
    world.join_ipv6(default_route=False)
    guest = world.guest()
    before = settings(world)

    async def scenario() -> None:
        async with held(world.pool(), guest, allowing("[::/0]", "0.0.0.0/0")) as slot:
            assert (slot.address_6, slot.why_not_6) == (None, "the host has no default route for IPv6")
            assert await off(lambda: guest.shell("ip", "-6", "address", "show", "dev", "eth0")) == ""
            assert await says(guest, PUBLIC) == HOST
            assert settings(world) == before

    world.run(scenario)


def settings(world: World) -> dict[str, str]:
    """What of the host's own links is set for IPv6."""
    names = [f"{link}/{name}" for link in ("all", "default", "eth0", "eth1")
             for name in ("forwarding", "force_forwarding", "accept_ra")]  # fmt: skip
    return {name: world.forwarding_6(name) for name in names}


def send_through_the_host(world: World, mark: bytes) -> None:
    """A packet from the Internet to the host's other network, as if the host were a router."""

    def send() -> None:
        argv = ["ip", "-6", "route", "replace", "2001:db8:20::/64", "via", HOST_6]
        subprocess.run(argv, check=True, timeout=20)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.sendto(mark, (NEIGHBOUR_6, 9))

    namespace.run_in(world.internet, send)


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_the_host_forwards_for_contracts_that_need_it_and_for_nobody_else(
    world: World, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """Of kernels before 6.17 all links forward; and who then went on by advertisements still does."""
    world.join_ipv6()
    if kernel == "old":
        monkeypatch.setattr(forwarding, "_LINK", "not_in_this_kernel")
    elif not world.in_host(lambda: forwarding.read("default/force_forwarding")):
        pytest.skip("this kernel forwards from all links or none")
    world.shell("sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=1", "net.ipv6.conf.eth1.accept_ra=0")
    guest, before = world.guest(), settings(world)
    changed = {"eth0/force_forwarding": "1"}
    if kernel == "old":
        changed = {"eth0/accept_ra": "2", "default/accept_ra": "2"}
        changed |= {f"{link}/forwarding": "1" for link in ("all", "default", "eth0", "eth1")}
    mark, sniffer = world.mark(), world.sniff(world.lan)

    async def scenario() -> None:
        async with held(world.pool(), guest, allowing("0.0.0.0/0")) as slot:
            assert settings(world) == before
            await slot._pool.swear(slot, allowing("[::/0]"))
            assert settings(world) == before | changed
            assert world.forwarding_6(f"{slot._pool._host.uplink}/accept_ra") == "0"
            assert await says(guest, PUBLIC_6) == HOST_6
            await off(lambda: send_through_the_host(world, mark))
            if kernel == "old":
                listed = lambda: world.shell("nft", "list", "chain", "inet", slot._pool._host.table, "forward")  # noqa: E731
                await off(lambda: wait_until(lambda: "packets 0" not in listed().splitlines()[-3], "it is refused"))
            world.shell("sysctl", "-qw", "net.ipv6.conf.all.forwarding=0", "net.ipv6.conf.eth0.force_forwarding=0")
            wanted = before | changed
            await off(lambda: wait_until(lambda: settings(world) == wanted, "it is turned on again"))
            assert await says(guest, PUBLIC_6) == HOST_6

    world.run(scenario)
    assert settings(world) == before
    assert not sniffer.saw(mark)
    assert world.traces() == []


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_a_killed_daemon_s_changes_are_put_back(world: World, kernel: str) -> None:
    world.join_ipv6()
    guest, before = world.guest(), settings(world)
    process = start(world, guest, kernel)
    try:
        assert [line(process), line(process)] == ["starting", "joined"]
        assert guest.ask(PUBLIC_6) == HOST_6
    finally:
        kill(process)
    assert settings(world) != before
    assert world.run(world.pool().clean) is True
    assert settings(world) == before
    assert world.traces() == []


def advertise(world: World, router: str) -> None:
    """A router on the Internet's side says that it is one, for half an hour."""

    def send() -> None:
        subprocess.run(["ip", "address", "add", f"{router}/64", "dev", "wan0", "nodad"], check=True, timeout=20)
        # Or it would tell its neighbours that it is none.
        subprocess.run(["sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"], check=True, timeout=20)
        message = bytes([134, 0, 0, 0, 64, 0]) + (1800).to_bytes(2, "big") + bytes(8)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("wan0", 0))
            hardware = sock.getsockname()[4]
            head = bytes.fromhex("333300000001") + hardware + b"\x86\xdd"
            sock.send(head + ip_packet_6(router, "ff02::1", socket.IPPROTO_ICMPV6, message, hops=255))

    namespace.run_in(world.internet, send)
    wait_until(lambda: f"via {router} dev eth0 proto ra" in world.shell("ip", "-6", "route"), "the host hears it")


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_a_host_goes_on_to_hear_its_routers(world: World, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    if kernel == "old":
        monkeypatch.setattr(forwarding, "_LINK", "not_in_this_kernel")
    world.join_ipv6(default_route=False)
    world.shell("sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=1")
    guest, before = world.guest(), settings(world)
    advertise(world, "fe80::98")

    async def scenario() -> None:
        async with held(world.pool(), guest, allowing("[::/0]")) as slot:
            assert slot.why_not_6 == ""
            assert await says(guest, PUBLIC_6) == HOST_6
            await off(lambda: advertise(world, "fe80::99"))
            assert "via fe80::98" in world.shell("ip", "-6", "route", "show", "default")
            assert await says(guest, PUBLIC_6) == HOST_6

    world.run(scenario)
    assert settings(world) == before
    assert "via fe80::98" in world.shell("ip", "-6", "route", "show", "default")
