"""Attacks on a contract with real packets: what it does not name stays closed, whatever the packets look like.

The attacker is root in its own network namespace, as in test_network_open.py.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address

import dns.message
import dns.query
import dns.rcode
import pytest
from tests.escape.packets import (
    Attack,
    address_of,
    attempt,
    checksum,
    frame,
    icmp,
    ip_packet,
    send_raw,
    udp,
    whole_frame,
)
from tests.network.servers import NAME_SERVER
from tests.network.topology import PRIVATE, PUBLIC, Guest, World, joined, off

from tartarus.model.contract import Contract, Grant

pytestmark = pytest.mark.needs("root", "nft", "ip")
BESIDE = "203.0.113.81"
ONE_PORT = Contract(grants=(Grant(PUBLIC, (9,)), Grant("public.example", (80,))))


def segment(target: str, port: int, flags: int) -> Attack:
    """One TCP segment, well-formed."""

    def attack(guest: Guest, mark: bytes) -> None:
        own, data = address_of(guest), mark + bytes(len(mark) % 2)
        head = struct.pack(">HHIIBBH", 4444, port, 1, 1, 0x50, flags, 1024)
        pseudo = IPv4Address(own).packed + IPv4Address(target).packed + struct.pack(">HH", 6, 20 + len(data))
        send_raw(guest, ip_packet(own, target, 6, head + checksum(pseudo + head + bytes(4) + data) + bytes(2) + data))

    return attack


def raw(target: str, protocol: int, payload: bytes) -> Attack:
    return lambda guest, mark: send_raw(guest, ip_packet(address_of(guest), target, protocol, payload + mark))


def datagram(target: str, port: int) -> Attack:
    def attack(guest: Guest, mark: bytes) -> None:
        guest.send(target, port, mark)
        send_raw(guest, ip_packet(address_of(guest), target, 17, udp(mark, port)))
        whole_frame(guest, ip_packet(address_of(guest), target, 17, udp(mark, port)))

    return attack


def test_other_ports_and_other_addresses(world: World) -> None:
    others = ((PUBLIC, 10), (PUBLIC, 80), (PUBLIC, 65535), (BESIDE, 9), ("203.0.112.80", 9), ("1.1.1.1", 443))
    syn, ack, rst = 2, 0x10, 4
    attempt(
        world,
        *(("contract", datagram(*other)) for other in others),
        *(("contract", segment(target, port, syn)) for target, port in others),
        # Of no connection that anybody saw begin.
        *(("invalid", segment(PUBLIC, 9, flags)) for flags in (ack, rst | ack)),
        contracts=[ONE_PORT],
    )  # fmt: skip


def test_what_has_no_port(world: World) -> None:
    """A contract that names ports opens nothing else: no echo, no other protocol, no error message."""

    def echo(guest: Guest, mark: bytes) -> None:
        for target in (PUBLIC, BESIDE):
            send_raw(guest, ip_packet(address_of(guest), target, 1, icmp(8, 0, b"\0\1\0\1" + mark)))

    def unreachable(guest: Guest, mark: bytes) -> None:
        embedded = ip_packet(PUBLIC, address_of(guest), 17, udp(mark))
        for code in (1, 3, 4):
            send_raw(guest, ip_packet(address_of(guest), PUBLIC, 1, icmp(3, code, b"\0\0\0\0" + embedded + mark)))

    attempt(
        world, ("contract", echo), ("", unreachable),
        *(("protocol", raw(PUBLIC, protocol, b"")) for protocol in (2, 4, 41, 50, 89)), contracts=[ONE_PORT],
    )  # fmt: skip


def test_pieces(world: World) -> None:
    """A closed port in fragments, in both orders, and tails that have no port."""

    def at(target: str, port: int) -> Attack:
        def attack(guest: Guest, mark: bytes) -> None:
            own, whole = address_of(guest), udp(mark + mark, port)
            pieces = [whole[start : start + 8] for start in range(0, len(whole), 8)]
            for number, backwards in ((20, False), (21, True)):
                packets = [
                    ip_packet(own, target, 17, piece, number=number,
                              fragment=index | (0x2000 if index < len(pieces) - 1 else 0))
                    for index, piece in enumerate(pieces)
                ]  # fmt: skip
                send_raw(guest, *(reversed(packets) if backwards else packets))
            send_raw(guest, ip_packet(own, target, 17, mark, fragment=3, number=22))

        return attack

    attempt(world, ("contract", at(PUBLIC, 10)), ("contract", at(BESIDE, 9)), contracts=[ONE_PORT])


def test_frames_of_other_kinds(world: World) -> None:
    """An allowed packet's content in a VLAN, in IPv6, in nobody's protocol; and to everybody."""

    def attack(guest: Guest, mark: bytes) -> None:
        whole_frame(guest, ip_packet(address_of(guest), BESIDE, 17, udp(mark)))  # it knows the gateway's hardware now
        assert guest.hardware is not None
        inner = ip_packet(address_of(guest), BESIDE, 17, udp(mark))
        for target in (guest.hardware, b"\xff" * 6, bytes.fromhex("01005e000001")):
            head = target + b"\x02" + bytes(5)
            frame(guest, head + b"\x81\x00\0\1\x08\x00" + inner)
            frame(guest, head + b"\x88\xb5" + inner)
            frame(guest, head + b"\x86\xdd" + inner + bytes(40))
        for group in ("224.0.0.1", "239.1.2.3", "255.255.255.255"):
            guest.send(group, 9, mark)

    attempt(world, ("multicast", attack), contracts=[ONE_PORT])


def test_names_by_tcp_and_by_others(world: World) -> None:
    """DNS over TCP is held to the contract as DNS over UDP is; other servers and DNS over TLS or HTTPS are closed."""
    guest = world.guest()
    world.names.answers["inside.public.example"] = [PRIVATE[0]]

    def ask(name: str) -> dns.message.Message:
        assert guest.slot is not None
        gateway = str(guest.slot.gateway)
        return guest.run(lambda: dns.query.tcp(dns.message.make_query(name, "A"), gateway, timeout=5))

    def attack() -> None:
        assert guest.slot is not None
        for name in ("other.example", "leaked-secret.evil.example", "x.public.example"):
            assert ask(name).rcode() == dns.rcode.REFUSED
        assert world.names.asked == []
        assert [rdata.address for rdata in ask("public.example").answer[0]] == [PUBLIC]
        # The owner of a name points it inside, over TCP.
        world.names.answers["public.example"] = [PRIVATE[0]]
        assert ask("public.example").rcode() == dns.rcode.REFUSED
        assert guest.ask(PRIVATE[0]) == "No route to host"
        for target, port in ((NAME_SERVER, 53), (NAME_SERVER, 853), (NAME_SERVER, 443), (PUBLIC, 853)):
            assert guest.ask(target, port) == "No route to host"
        found = guest.slot.counters()
        assert found["dns_rebinding"] == 1
        assert found["refused_dns"] >= 3

    async def scenario() -> None:
        async with joined(world.pool(), guest, contract=ONE_PORT):
            await off(attack)

    world.run(scenario)


def test_another_sandbox_s_open_address_is_not_its_own(world: World) -> None:
    """What one was answered, or is allowed, opens nothing to another that forges its address."""
    rich, poor = world.guest(), world.guest()

    def attack() -> None:
        mark, spy = world.mark(), world.sniff(world.internet)
        assert rich.exchange(PUBLIC, 80, b"hello") != b""
        for port in (9, 80):
            whole_frame(poor, ip_packet(address_of(rich), PUBLIC, 17, udp(mark, port)))
        poor.shell("ip", "address", "add", f"{IPv4Address(address_of(rich))}/32", "dev", "eth0")

        def as_the_other() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((address_of(rich), 0))
                sock.sendto(mark, (PUBLIC, 80))

        poor.run(as_the_other)
        assert rich.exchange(PUBLIC, 80, b"again") != b""
        assert not spy.saw(mark)
        assert poor.slot is not None
        assert poor.slot.counters()["refused_spoofed"] >= 3

    async def scenario() -> None:
        pool = world.pool()
        async with joined(pool, rich), joined(pool, poor, contract=ONE_PORT):
            await off(attack)

    world.run(scenario)
