"""Attacks through a network that is open: real packets, from a guest that may do more than any sandbox can.

The attacker is root in its own network namespace, with every capability there: it forges packets, changes addresses
and turns IPv6 on. A real sandbox can't (no capabilities, no raw sockets); what holds here does not depend on that.
The Internet of these tests answers on private and metadata addresses too, and the host itself can reach them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import threading
from ipaddress import IPv4Address

import pytest
from tests.escape.packets import (
    Attack,
    address_of,
    arrives,
    attempt,
    counters,
    frame,
    icmp,
    ip_packet,
    send_raw,
    udp,
    whole_frame,
)
from tests.network.servers import NAME_SERVER, wait_until
from tests.network.topology import (
    HOST,
    METADATA,
    NEIGHBOUR,
    PORT,
    PRIVATE,
    PUBLIC,
    ROUTER_OF_THE_HOST,
    Guest,
    World,
    joined,
    off,
)

from tartarus.network import namespace, nft, rules
from tartarus.network.pool import SlotPool

pytestmark = pytest.mark.needs("root", "nft", "ip")
REFUSED = {"No route to host", "TimeoutError"}


CLOSED = {
    "private": PRIVATE, "metadata": METADATA, "reserved": ("198.18.0.5", "192.0.0.9", "240.0.0.5", "255.255.255.255"),
    "link_local": ("169.254.7.7",), "multicast": ("224.0.0.251", "239.255.255.250"), "host": (HOST, "192.0.2.10"),
    "neighbour": (NEIGHBOUR, ROUTER_OF_THE_HOST, "198.51.100.255"), "gateway": ("10.201.0.1",),
    "peer": ("10.201.0.0", "10.201.0.3", "10.201.3.255"),
}  # fmt: skip


def test_closed_destinations(world: World) -> None:
    """Datagrams, whole and forged, and TCP where something would answer."""

    def at(target: str) -> Attack:
        def attack(guest: Guest, mark: bytes) -> None:
            guest.send(target, 9, mark)
            send_raw(guest, ip_packet(address_of(guest), target, 17, udp(mark)))
            if target in {*PRIVATE, *METADATA, NEIGHBOUR}:
                assert guest.ask(target) == "No route to host"
            if target in {HOST, "192.0.2.10"}:
                assert guest.ask(target, 8080) == "No route to host"

        return attack

    attempt(world, *((reason, at(target)) for reason, targets in CLOSED.items() for target in targets), others=1)


def test_the_router_s_own_loopback_and_nowhere(world: World) -> None:
    """Addresses that no kernel would send to; forced out, they are no way in."""

    def at(target: str) -> Attack:
        return lambda guest, mark: whole_frame(guest, ip_packet(address_of(guest), target, 17, udp(mark, 53)))

    attempt(world, ("host", at("127.0.0.1")), ("reserved", at("0.0.0.0")), ("reserved", at("0.0.0.7")))
    assert world.names.asked == []


def test_the_host_s_services_hear_nothing(world: World) -> None:
    """A server on every address of the host, the link's own ends included."""
    guest = world.guest()

    def attack() -> None:
        assert guest.slot is not None
        for target in (HOST, "192.0.2.10", str(guest.slot.gateway), "10.201.0.0", "127.0.0.1", "0.0.0.0"):
            assert not guest.exchange(target, 8081, b"hello", 0.2)
            assert guest.ask(target, 8080, 0.5) in {*REFUSED, "Connection refused", "Network is unreachable"}

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            await off(attack)

    world.run(scenario)
    assert world.host_datagrams.heard == []


def test_the_gateway_has_one_port_only(world: World) -> None:
    def at(port: int) -> Attack:
        def attack(guest: Guest, mark: bytes) -> None:
            guest.send("10.201.0.1", port, mark)
            assert guest.ask("10.201.0.1", port, 1) == "No route to host"

        return attack

    def other(protocol: int, payload: bytes) -> Attack:
        return lambda guest, mark: send_raw(
            guest, ip_packet(address_of(guest), "10.201.0.1", protocol, payload + mark + bytes(len(mark) % 2))
        )

    ports = (1, 22, 52, 54, 5353, 8080, 8081, 65535)
    attempt(
        world, *(("gateway", at(port)) for port in ports), ("gateway", other(50, b"")), ("", other(1, icmp(8, 0, b"")))
    )


def test_sandboxes_don_t_reach_each_other(world: World) -> None:
    first, second = world.guest(), world.guest()
    servers = [world.serve(second.namespace, PORT), world.serve(second.namespace, 81, socket.SOCK_DGRAM)]
    mark = world.mark()
    spy = world.sniff(second.namespace)

    def attack() -> None:
        target = address_of(second)
        assert first.ask(target) == "No route to host"
        assert first.exchange(target, 81, mark, 0.3) == b""
        send_raw(first, ip_packet(address_of(first), target, 1, icmp(8, 0, mark)))
        whole_frame(first, ip_packet(address_of(first), target, 17, udp(mark)))
        assert first.hardware is not None
        for hardware in (b"\xff" * 6, first.hardware):
            frame(first, hardware + b"\x02" + bytes(5) + b"\x88\xb5" + mark + bytes(40))
        assert second.ask(PUBLIC) == HOST
        assert not spy.saw(mark)
        assert servers[1].heard == []
        assert counters(first)["refused_peer"] >= 3

    async def scenario() -> None:
        async with joined(world.pool(), first, second):
            await off(attack)

    world.run(scenario)


def test_forged_sources(world: World) -> None:
    def of(source: str, target: str) -> Attack:
        return lambda guest, mark: whole_frame(guest, ip_packet(source, target, 17, udp(mark, 53)))

    sources = ("8.8.8.8", HOST, "10.201.0.0", "10.201.0.1", "10.201.0.3", "127.0.0.1", "0.0.0.0", "224.0.0.1")
    targets = (PUBLIC, PRIVATE[0], "10.201.0.1")
    # Some the router's kernel drops before it looks at any rule: a source that can't be one, or its own.
    attempt(world, *(("", of(source, target)) for source in sources for target in targets), others=1)
    attempt(world, *(("spoofed", of(source, PUBLIC)) for source in ("8.8.8.8", "10.201.0.3", HOST)), others=1)
    assert world.names.asked == []


def test_an_address_of_its_own_choice(world: World) -> None:
    """It gives itself more addresses: another slot's, a public one, the host's."""

    def attack(guest: Guest, mark: bytes) -> None:
        guest.ask(PUBLIC)  # it knows the gateway's hardware address from an honest question
        for address in ("10.201.0.3", "203.0.113.200", HOST):
            guest.shell("ip", "address", "add", f"{address}/32", "dev", "eth0")

            def send(address: str = address) -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.bind((address, 0))
                    sock.sendto(mark, (PUBLIC, 9))

            guest.run(send)

    attempt(world, ("spoofed", attack), others=1)


def test_ipv6(world: World) -> None:
    """Turned on again from inside, with addresses and neighbours of its own making."""

    def attack(guest: Guest, mark: bytes) -> None:
        assert guest.shell("ip", "-6", "address", "show", "dev", "eth0") == ""
        guest.shell("sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0")
        for address in ("fe80::2/64", "2001:db8::2/64", "fd00::2/64"):
            guest.shell("ip", "address", "add", address, "dev", "eth0", "nodad")
        guest.shell("ip", "-6", "route", "add", "default", "dev", "eth0")

        def send() -> None:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                index = socket.if_nametoindex("eth0")
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
                for target in ("ff02::1", "ff02::2", "ff02::1:ff00:1", "ff05::c"):
                    sock.sendto(mark, (target, 9, 0, index))

        guest.run(send)
        hop = bytes.fromhex("333300000001") + b"\x02" + bytes(5) + b"\x86\xdd"
        header = struct.pack(">IHBB", 0x60000000, 8 + len(mark), 17, 64)
        for source, target in (("fe80::2", "fd00:ec2::254"), ("2001:db8::2", "2600::1"), ("::", "::1")):
            addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
            frame(guest, hop + header + addresses + udp(mark))
        # A router advertisement, to make the router one of ours.
        advertisement = bytes([134, 0, 0, 0, 64, 0, 255, 255]) + bytes(8) + mark
        addresses = socket.inet_pton(socket.AF_INET6, "fe80::2") + socket.inet_pton(socket.AF_INET6, "ff02::1")
        frame(guest, hop + struct.pack(">IHBB", 0x60000000, len(advertisement), 58, 255) + addresses + advertisement)

    attempt(world, ("ipv6", attack))


def test_fragments(world: World) -> None:
    """In pieces too small for a port, out of order, and with a header for somewhere else."""

    def attack(guest: Guest, mark: bytes) -> None:
        own = address_of(guest)
        for number, target in enumerate((PRIVATE[0], METADATA[0], NEIGHBOUR, HOST, "10.201.0.3"), 10):
            whole = udp(mark + mark)
            pieces = [whole[start : start + 8] for start in range(0, len(whole), 8)]
            packets = [
                ip_packet(
                    own, target, 17, piece, fragment=index | (0x2000 if index < len(pieces) - 1 else 0), number=number
                )
                for index, piece in enumerate(pieces)
            ]
            send_raw(guest, *reversed(packets))
            # The tail alone, without the piece that has the ports; and one that is never complete.
            send_raw(guest, ip_packet(own, target, 17, mark, fragment=3, number=number + 50))
            send_raw(guest, ip_packet(own, target, 17, udp(mark), fragment=0x2000, number=number + 90))

    attempt(world, ("private", attack), others=1)


def test_fragments_that_overlap(world: World) -> None:
    """A harmless port first, then another over it: what the rules have seen is what is sent on."""
    guest = world.guest()
    spy, before_translation = world.sniff(world.internet), world.sniff(world.host)

    def attack() -> None:
        for number, ports in enumerate(((9, 53), (53, 9)), 200):
            pieces = [udp(bytes(8), port) for port in ports]
            send_raw(
                guest,
                *(ip_packet(address_of(guest), PUBLIC, 17, piece, fragment=0x2000, number=number) for piece in pieces),
                ip_packet(address_of(guest), PUBLIC, 17, bytes(8), fragment=2, number=number),
            )
        arrives(world, guest, spy)
        assert not before_translation.saw(udp(b"", 53)[:4])

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            await off(attack)

    world.run(scenario)


def test_large_datagrams_that_are_cut_on_the_way_do_pass(world: World) -> None:
    guest = world.guest()

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            assert await off(lambda: guest.exchange(PUBLIC, PORT, bytes(4000))) == HOST.encode() + b" " + bytes(64)

    world.run(scenario)


def test_other_protocols(world: World) -> None:
    """IGMP, IP in IP, IPv6 in IP, GRE, IPsec, OSPF, SCTP and the like, with a private packet inside."""

    def of(protocol: int) -> Attack:
        def attack(guest: Guest, mark: bytes) -> None:
            inner = ip_packet(address_of(guest), PRIVATE[0], 17, udp(mark))
            for target in (PUBLIC, PRIVATE[0]):
                send_raw(guest, ip_packet(address_of(guest), target, protocol, inner))

        return attack

    whole = ((("protocol"), of(protocol)) for protocol in (2, 4, 41, 47, 50, 51, 89, 94, 103, 112, 115, 255))
    # The kernel knows these two well enough to see that they are damaged.
    attempt(world, *whole, ("invalid", of(132)), ("invalid", of(136)))


def test_source_routes(world: World) -> None:
    """Loose and strict: through an allowed address to one that is not."""

    def of(kind: int, target: str) -> Attack:
        options = bytes([kind, 7, 4]) + IPv4Address(PRIVATE[0]).packed + b"\0"
        return lambda guest, mark: whole_frame(
            guest, ip_packet(address_of(guest), target, 17, udp(mark, 53), options=options)
        )

    attempt(world, *(("", of(kind, target)) for kind in (0x83, 0x89) for target in (PUBLIC, "10.201.0.1")))
    assert world.names.asked == []


@pytest.mark.parametrize("port", [53, 853])
def test_name_servers_of_its_own_choice(world: World, port: int) -> None:
    def attack(guest: Guest, mark: bytes) -> None:
        for target in (NAME_SERVER, PUBLIC):
            guest.send(target, port, mark)
            assert guest.ask(target, port) == "No route to host"

    attempt(world, ("dns", attack))
    assert world.names.asked == []


def test_icmp(world: World) -> None:
    """Redirects, forged errors, timestamps and masks; a plain echo to a public address is harmless."""

    def attack(guest: Guest, mark: bytes) -> None:
        own = address_of(guest)
        embedded = ip_packet(PRIVATE[0], own, 17, udp(mark))
        for target in (PUBLIC, PRIVATE[0], "10.201.0.1", "10.201.0.0", HOST):
            for kind, code in (
                (0, 0),
                (3, 1),
                (3, 4),
                (4, 0),
                (5, 1),
                (9, 0),
                (10, 0),
                (11, 0),
                (12, 0),
                (13, 0),
                (17, 0),
            ):
                send_raw(guest, ip_packet(own, target, 1, icmp(kind, code, b"\0\0\0\0" + embedded + mark)))
        for target in (PRIVATE[0], METADATA[0], NEIGHBOUR, HOST):
            send_raw(guest, ip_packet(own, target, 1, icmp(8, 0, b"\0\1\0\1" + mark)))

    attempt(world, ("host", attack), others=1)


def test_a_plain_echo_passes(world: World) -> None:
    guest, mark = world.guest(), world.mark()
    spy = world.sniff(guest.namespace)

    def send() -> None:
        send_raw(guest, ip_packet(address_of(guest), PUBLIC, 1, icmp(8, 0, b"\0\1\0\1" + mark)))
        # Once on its way out, once as the reply.
        wait_until(lambda: sum(mark in packet for packet in list(spy.seen)) >= 2, "the echo comes back")

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            await off(send)

    world.run(scenario)


def test_lies_about_who_has_an_address(world: World) -> None:
    """ARP for another sandbox's address and for the gateway's: links are each one's own, so only the liar is fooled."""
    liar, other = world.guest(), world.guest()

    def attack() -> None:
        for address in (address_of(other), "10.201.0.1", "10.201.0.0", HOST):
            own, packed = bytes.fromhex("020000000666"), IPv4Address(address).packed
            for operation in (1, 2):
                body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + own + packed + bytes(6) + packed
                frame(liar, b"\xff" * 6 + own + b"\x08\x06" + body)
        spy = world.sniff(liar.namespace)
        assert other.ask(PUBLIC) == HOST
        assert other.exchange(PUBLIC, PORT, b"secret") == HOST.encode() + b" secret"
        assert not spy.saw(b"secret")

    async def scenario() -> None:
        async with joined(world.pool(), liar, other):
            await off(attack)

    world.run(scenario)


class Flood:
    """Sends datagrams to every target, without a pause, from before it has a network until after."""

    def __init__(self, guest: Guest, targets: dict[str, bytes]) -> None:
        self.targets = targets
        self.sent = 0
        self.open = True
        self.thread = threading.Thread(target=lambda: guest.run(self._send))
        self.thread.start()

    def _send(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while self.open:
                for target, mark in self.targets.items():
                    try:
                        sock.sendto(mark, (target, 9))
                        self.sent += 1
                    except OSError:
                        continue

    def close(self) -> None:
        self.open = False
        self.thread.join(10)


def test_the_first_and_the_last_packet(world: World) -> None:
    """A guest that sends from before it is attached until after its slot has gone, over and over."""
    guest = world.guest()
    closed = {target: world.mark() for target in (PRIVATE[0], METADATA[0], NEIGHBOUR, HOST, "10.201.0.1")}
    passing = world.mark()
    spies = [world.sniff(where) for where in (world.internet, world.lan, world.host)]
    flood = Flood(guest, {**closed, PUBLIC: passing})

    async def scenario() -> None:
        pool = world.pool(new_connections=100_000, burst=100_000)
        for _ in range(5):
            slot = await pool.take()
            sent = flood.sent
            await pool.attach(slot, guest.namespace)
            await off(lambda sent=sent: wait_until(lambda: flood.sent > sent + 50, "it sends"))  # type: ignore[misc]
            assert (await pool.give_back(slot))["refused_private"] > 0
            before = [len(spy.seen) for spy in spies]
            sent = flood.sent
            await asyncio.sleep(0.05)
            late = [packet for spy, start in zip(spies, before, strict=True) for packet in spy.seen[start + 64 :]]
            assert not [packet for packet in late if passing in packet and flood.sent == sent]
        await pool.close()

    try:
        world.run(scenario)
    finally:
        flood.close()
    assert spies[0].saw(passing)
    for mark in closed.values():
        assert not [spy for spy in spies if spy.saw(mark)]


def test_nothing_passes_after_a_slot_is_given_back(world: World) -> None:
    """An open connection too: neither its packets nor the answers go on."""
    guest, mark = world.guest(), world.mark()
    spy = world.sniff(world.internet)

    async def scenario() -> None:
        pool = world.pool()
        slot = guest.slot = await pool.take()
        await pool.attach(slot, guest.namespace)
        connection = await off(lambda: guest.run(lambda: socket.create_connection((PUBLIC, PORT), timeout=5)))
        with connection:
            assert connection.recv(100) == HOST.encode()
            await pool.give_back(slot)
            connection.settimeout(0.2)
            with contextlib.suppress(OSError):
                connection.sendall(mark)
            with pytest.raises(OSError, match=r"unreachable|timed out"):
                connection.recv(1)
        assert await off(lambda: guest.ask(PUBLIC)) == "Network is unreachable"
        assert guest.send(PUBLIC, 9, mark) == "[Errno 101] Network is unreachable"
        assert not spy.saw(mark)
        await pool.close()

    world.run(scenario)


def test_more_connections_than_its_share(world: World) -> None:
    greedy, modest = world.guest(), world.guest()

    def attack() -> None:
        held = []
        refused = 0
        for _ in range(30):
            try:
                held.append(greedy.run(lambda: socket.create_connection((PUBLIC, PORT), timeout=5)))
            except OSError:
                refused += 1
        for sock in held:
            sock.close()
        assert (len(held), refused) == (20, 10)
        assert counters(greedy)["refused_connections"] == 10
        assert modest.ask(PUBLIC) == HOST

    async def scenario() -> None:
        async with joined(world.pool(connections=20), greedy, modest):
            await off(attack)

    world.run(scenario)


def test_more_new_connections_than_its_rate(world: World) -> None:
    greedy, modest = world.guest(), world.guest()

    def attack() -> None:
        def scan() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for port in range(10_000, 10_200):
                    try:
                        sock.sendto(b"", (PUBLIC, port))
                    except OSError:
                        continue

        greedy.run(scan)
        found = counters(greedy)
        assert found["refused_rate"] >= 150
        assert found["opened"] <= 50
        assert modest.ask(PUBLIC) == HOST

    async def scenario() -> None:
        async with joined(world.pool(new_connections=5, burst=10), greedy, modest):
            await off(attack)

    world.run(scenario)


def knock(world: World, guest: Guest, mark: bytes) -> None:
    """Send to a guest from the Internet and the neighbours, with a route through the host, and from the host itself."""
    for where, gateway in ((world.internet, HOST), (world.lan, "192.0.2.10"), (world.host, "")):

        def send(gateway: str = gateway) -> None:
            if gateway:
                way = ["ip", "route", "replace", "10.201.0.0/22", "via", gateway]
                subprocess.run(way, check=True, timeout=20)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(PermissionError):
                sock.sendto(mark, (address_of(guest), PORT))
            with pytest.raises(OSError, match=r"."):
                socket.create_connection((address_of(guest), PORT), timeout=0.3)

        namespace.run_in(where, send)


def forward_everything(world: World) -> None:
    for link in ("eth0", "eth1"):
        world.shell("sysctl", "-qw", f"net.ipv4.conf.{link}.forwarding=1")


def test_nobody_outside_begins_a_conversation(world: World) -> None:
    guest, mark = world.guest(), world.mark()
    server = world.serve(guest.namespace, PORT, socket.SOCK_DGRAM)
    world.serve(guest.namespace, PORT)
    spy = world.sniff(guest.namespace)
    forward_everything(world)

    def attack() -> None:
        knock(world, guest, mark)
        assert guest.ask(PUBLIC) == HOST
        assert not spy.saw(mark)
        assert server.heard == []

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            await off(attack)

    world.run(scenario)


def test_the_host_s_own_address_translation_is_no_way_round(world: World) -> None:
    """As a container engine publishes a port: an allowed address that becomes a private one on the way."""
    guest = world.guest()
    ruleset = f"""
table ip published {{
  chain prerouting {{ type nat hook prerouting priority dstnat; policy accept;
    ip daddr {PUBLIC} tcp dport 81 dnat to {NEIGHBOUR}:{PORT}
    ip daddr {PUBLIC} tcp dport 82 dnat to {PRIVATE[0]}:{PORT}
    ip daddr {PUBLIC} tcp dport 83 redirect to :8080
  }}
}}
"""

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            await off(lambda: world.in_host(lambda: nft.apply(ruleset)))
            for port in (81, 82, 83):
                assert await off(lambda port=port: guest.ask(PUBLIC, port, 0.4)) in REFUSED  # type: ignore[misc]
            assert await off(lambda: guest.ask(PUBLIC)) == HOST

    world.run(scenario)


def test_the_second_wall_holds_without_the_first(world: World) -> None:
    """The router lets everything through, as by a mistake of ours: the host's own rules still stand."""
    guest, knocking = world.guest(), world.mark()
    spies = [world.sniff(where) for where in (world.internet, world.lan)]
    inside = world.sniff(guest.namespace)
    world.serve(guest.namespace, PORT)
    forward_everything(world)
    hooks = {
        "entering": "prerouting priority mangle",
        "forward": "forward priority filter",
        "input": "input priority filter",
    }
    open_door = "".join(
        f"flush chain inet {rules.ROUTER_TABLE} {name}\n"
        f"add chain inet {rules.ROUTER_TABLE} {name} {{ type filter hook {hook}; policy accept; }}\n"
        for name, hook in hooks.items()
    )
    open_door += f"flush chain inet {rules.ROUTER_TABLE} redirecting\n"  # nothing is led to the proxy either

    def attack(pool: SlotPool) -> None:
        router = pool._router
        assert router is not None
        namespace.run_in(router.namespace, lambda: nft.apply(open_door))
        for target in (*PRIVATE, *METADATA, NEIGHBOUR, ROUTER_OF_THE_HOST, HOST, "198.18.0.5", "240.0.0.5"):
            mark = world.mark()
            guest.send(target, 9, mark)
            guest.send(target, 8081, mark)
            assert guest.ask(target, 8080 if target == HOST else PORT, 0.1) == "TimeoutError"
            arrives(world, guest, spies[0])
            assert not [spy for spy in spies if spy.saw(mark)]
        knock(world, guest, knocking)
        assert not inside.saw(knocking)

    async def scenario() -> None:
        async with joined(world.pool(), guest) as pool:
            await off(lambda: attack(pool))

    world.run(scenario)
    assert world.host_datagrams.heard == []
