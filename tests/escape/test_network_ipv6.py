"""Attacks with packets of IPv6 on contracts that open some of it: forged sources, neighbours, routers and headers.

The attacker is root in its own network namespace, as in test_network_open.py.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest
from tests.escape.packets import Attack, attempt, ip_packet_6, udp, whole_frame_6
from tests.network.servers import wait_until
from tests.network.topology import HOST_6, PUBLIC, PUBLIC_6, Guest, World, joined, off

from tartarus.model.contract import OPEN, Contract, Grant

pytestmark = pytest.mark.needs("root", "nft", "ip")
BESIDE = "2001:db8:80::81"
ONE_PORT = Contract(grants=(Grant(PUBLIC, (9,)), Grant(PUBLIC_6, (9,))))
UDP, ICMP, TO_ALL = 17, 58, "ff02::1"
ROUTER_ADVERTISEMENT, SOLICITATION, ADVERTISEMENT, REDIRECTION = 134, 135, 136, 137


@pytest.fixture(autouse=True)
def _with_ipv6(world: World) -> None:
    world.join_ipv6()


def own(guest: Guest) -> str:
    assert guest.slot is not None
    return str(guest.slot.address_6)


def peer(guest: Guest) -> str:
    assert guest.slot is not None
    assert guest.slot.address_6 is not None
    return str(guest.slot.address_6 + 1)


def sent(make: Callable[[Guest, bytes], bytes]) -> Attack:
    return lambda guest, mark: whole_frame_6(guest, make(guest, mark))


def test_forged_sources(world: World) -> None:
    """Of a peer, of the host, of the target, of nobody, of the router itself, and IPv4 in disguise."""

    def from_(source: str) -> Attack:
        return sent(lambda guest, mark: ip_packet_6(source or peer(guest), PUBLIC_6, UDP, udp(mark)))

    sources = ("", HOST_6, PUBLIC_6, "::", "fe80::1", "fe80::2", "::ffff:10.9.9.9", "fd00:ec2::254", "2001:db8::7")
    attempt(world, *(("spoofed", from_(source)) for source in sources), others=1, contracts=[OPEN, ONE_PORT])


def message(kind: int, target: bytes, mark: bytes) -> bytes:
    """A message among neighbours about `target`, with the sender's hardware and a mark as options."""
    return bytes([kind, 0, 0, 0, 0xE0, 0, 0, 0]) + target + bytes([2, 1, 2, 0, 0, 0, 0, 0]) + bytes([9, 9]) + mark


def test_neighbours_are_told_nothing_and_tell_nothing(world: World) -> None:
    """Routers' advertisements, redirections, and claims to be somebody's neighbour: to all, and to the router itself."""
    inner = bytes.fromhex("fe80") + bytes(13) + b"\1"

    def saying(kind: int, target: str, source: str = "", hops: int = 255) -> Attack:
        return sent(
            lambda guest, mark: ip_packet_6(source or own(guest), target, ICMP, message(kind, inner, mark), hops=hops)
        )

    attempt(
        world,
        *(("protocol", saying(kind, TO_ALL)) for kind in (ROUTER_ADVERTISEMENT, REDIRECTION)),
        ("", saying(ADVERTISEMENT, TO_ALL)),  # which is dropped without a word
        *(("protocol", saying(kind, "fe80::1")) for kind in (ROUTER_ADVERTISEMENT, REDIRECTION, 130, 138, 151)),
        *(("spoofed", saying(kind, TO_ALL, "fe80::2")) for kind in (ROUTER_ADVERTISEMENT, SOLICITATION, REDIRECTION)),
        ("protocol", saying(SOLICITATION, PUBLIC_6)),  # through the router, to somebody's link elsewhere
        ("protocol", saying(SOLICITATION, "fe80::1", hops=254)),
        contracts=[OPEN, ONE_PORT],
    )


def test_nobody_takes_a_peer_s_place(world: World) -> None:
    """What a guest tells the router of others' addresses, and of its own, changes no way of anybody's."""
    guest, other = world.guest(), world.guest()

    def claim() -> None:
        assert other.slot is not None
        assert other.slot.address_6 is not None
        assert guest.slot is not None
        assert guest.slot.address_6 is not None
        for target in (
            other.slot.address_6.packed,
            guest.slot.address_6.packed,
            bytes.fromhex("fe80") + bytes(13) + b"\2",
        ):
            for kind in (ADVERTISEMENT, SOLICITATION):
                whole_frame_6(
                    guest, ip_packet_6(own(guest), "fe80::1", ICMP, message(kind, target, b"claimed"), hops=255)
                )
        assert guest.ask(PUBLIC_6) == HOST_6
        assert other.ask(PUBLIC_6) == HOST_6

    async def scenario() -> None:
        async with joined(world.pool(), guest, other):
            await off(claim)
            assert other.slot is not None
            assert not [name for name in other.slot.counters() if name.startswith("refused_")]

    world.run(scenario)


def headed(kind: int, header: bytes) -> Attack:
    """A datagram to an open place behind a header of another kind."""

    def make(guest: Guest, mark: bytes) -> bytes:
        inner = ip_packet_6(own(guest), PUBLIC_6, UDP, udp(mark))[40:]
        return ip_packet_6(own(guest), PUBLIC_6, kind, bytes([UDP]) + header + inner)

    return sent(make)


def test_headers_before_what_is_judged(world: World) -> None:
    """Hop-by-hop and destination options, routes through others, mobility, authentication; and other protocols."""
    padding, elsewhere = bytes([0, 1, 4, 0, 0, 0, 0]), bytes([2, 0, 1]) + bytes(4) + bytes.fromhex("fd00" + "0" * 28)
    segments = bytes([2, 4, 1, 0, 0, 0, 0]) + bytes.fromhex("fd00" + "0" * 28)

    def protocol(number: int) -> Attack:
        def make(guest: Guest, mark: bytes) -> bytes:
            inner = ip_packet_6(own(guest), "fd12:3456::1", UDP, udp(mark))
            return ip_packet_6(own(guest), PUBLIC_6, number, inner)

        return sent(make)

    attempt(
        world,
        *(("protocol", headed(kind, header)) for kind, header in (
            (0, padding), (60, padding), (43, elsewhere), (43, segments), (51, bytes([1]) + bytes(10)),
        )),
        *(("protocol", protocol(number)) for number in (4, 41, 47, 50, 59, 89, 115, 132, 255)),
        contracts=[OPEN, ONE_PORT],
    )  # fmt: skip


def fragment(guest: Guest, target: str, whole: bytes, start: int, end: int | None, number: int) -> bytes:
    """A piece of what comes after the header, in bytes that 8 divides."""
    more = 0 if end is None else 1
    head = bytes([UDP, 0]) + struct.pack(">HI", start | more, number)
    return ip_packet_6(own(guest), target, 44, head + whole[start:end])


def test_fragments(world: World) -> None:
    """In pieces: the first too small for a port, out of order, overlapping, or never there at all."""

    def pieces(target: str, port: int, *cuts: tuple[int, int | None], lie: int = 0) -> Attack:
        def attack(guest: Guest, mark: bytes) -> None:
            whole = ip_packet_6(own(guest), target, UDP, udp(mark + bytes(40), port))[40:]
            other = udp(mark + bytes(40), lie)[:8] + whole[8:] if lie else whole
            for first, last in cuts:
                data = other if lie and first == 0 else whole
                whole_frame_6(guest, fragment(guest, target, data, first, last, port))

        return attack

    attempt(
        world,
        ("contract", pieces(PUBLIC_6, 10, (0, 8), (8, 16), (16, None))),
        ("contract", pieces(PUBLIC_6, 11, (16, None), (8, 16), (0, 8))),
        ("contract", pieces(BESIDE, 9, (0, 16), (16, None))),
        ("private", pieces("fd12:3456::1", 9, (0, 16), (16, None))),
        ("", pieces(PUBLIC_6, 12, (0, 24), (8, 32), (16, None), lie=9)),  # overlapping: the kernel throws it away
        ("", pieces(PUBLIC_6, 9, (16, None))),
        contracts=[ONE_PORT],
    )


def test_what_is_open_goes_through_in_pieces_as_well(world: World) -> None:
    guest, mark = world.guest(), world.mark()
    server = world.serve(world.internet, 9, socket.SOCK_DGRAM, PUBLIC_6)

    async def scenario() -> None:
        async with joined(world.pool(), guest, contract=ONE_PORT):
            guest.send(PUBLIC_6, 9, mark + bytes(5000))
            await off(lambda: wait_until(lambda: [data for data in server.heard if mark in data], "it is whole again"))

    world.run(scenario)


def test_messages_of_connections_that_never_were(world: World) -> None:
    """Errors and echo replies nobody asked for, a packet too big among them; and names' and routers' groups."""

    def about(kind: int, target: str) -> Attack:
        def make(guest: Guest, mark: bytes) -> bytes:
            inner = ip_packet_6(target, own(guest), UDP, udp(mark))
            return ip_packet_6(own(guest), target, ICMP, bytes([kind, 0, 0, 0, 0, 0, 5, 0]) + inner)

        return sent(make)

    def told(target: str) -> Attack:
        return sent(lambda guest, mark: ip_packet_6(own(guest), target, UDP, udp(mark)))

    attempt(
        world,
        *(("invalid", about(kind, PUBLIC_6)) for kind in (1, 2, 3, 4, 129)),
        *(("multicast", told(target)) for target in (TO_ALL, "ff02::2", "ff02::fb", "ff05::c", "ff0e::1")),
        *(("link_local", told(target)) for target in ("fe80::1", "fe80::2", "fe80::9")),
        *(("reserved", told(target)) for target in ("::ffff:10.9.9.9", "::10.9.9.9", "2002:a09:909::1", "2001::9")),
        ("metadata", told("fe80::a9fe:a9fe")),
        contracts=[OPEN, ONE_PORT],
    )
