"""Connections of others, and of before: what is said about them, and what still comes of them.

A sandbox that tells of an error of a connection that is not its own would reach whom another may.

The attacker is root in its own network namespace, as in test_network_open.py, and knows the other's connection to the
last port: the two may be one attacker's, in sandboxes of which one must not reach what the other does.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
from tests.escape.packets import address_of, arrives, checksum, icmp, ip_packet, ip_packet_6, udp, whole_frame
from tests.escape.packets import whole_frame_6 as whole_frame_of_6
from tests.network.servers import family_of, wait_until
from tests.network.topology import HOST, HOST_6, PUBLIC, PUBLIC_6, Guest, World, joined, off

from tartarus.model.contract import OPEN, Contract, Grant, RateLimit
from tartarus.network.compiled import compiled

pytestmark = pytest.mark.needs("root", "nft", "ip")
BESIDE = Contract(grants=(Grant(PUBLIC, (9,)), Grant("2001:db8:80::81", (9,))))
TALKING_FROM, TALKING_TO = 5555, 80


def error(about: Guest, sender: Guest, target: str, mark: bytes, kind: int, code: int) -> bytes:
    """That what `target` sent `about` did not get there, from `sender` to `target`, with a mark in the piece of it."""
    assert about.slot is not None
    assert sender.slot is not None
    content = udp(mark + bytes(len(mark) % 2), TALKING_FROM, TALKING_TO)
    if ":" in target:
        inner = ip_packet_6(target, str(about.slot.address_6), 17, content)
        return ip_packet_6(str(sender.slot.address_6), target, 58, bytes([kind, code, 0, 0, 0, 0, 5, 0]) + inner)
    whole = bytearray(ip_packet(target, address_of(about), 17, content))
    whole[2:4] = struct.pack(">H", len(whole))
    whole[10:12] = checksum(bytes(whole[:20]))
    return ip_packet(address_of(sender), target, 1, icmp(kind, code, b"\0\0\5\0" + bytes(whole)))


@pytest.fixture(name="conversation")
def _conversation(world: World) -> Iterator[dict[str, socket.socket]]:
    """Sockets of a guest's conversations with each target, closed at the end."""
    kept: dict[str, socket.socket] = {}
    yield kept
    for sock in kept.values():
        sock.close()


def talk(guest: Guest, target: str, port: int = TALKING_TO) -> socket.socket:
    def exchange() -> socket.socket:
        sock = socket.socket(family_of(target), socket.SOCK_DGRAM)
        sock.bind(("", TALKING_FROM))
        sock.settimeout(0.5)
        sock.connect((target, port))
        for _ in range(20):  # the host's own addresses come late, and then its rules are changed
            sock.send(b"hello")
            with contextlib.suppress(TimeoutError):
                if sock.recv(100):
                    return sock
        raise AssertionError("nobody answers")

    return guest.run(exchange)


KINDS = {4: ((3, 1), (3, 3), (3, 4), (4, 0), (5, 1), (11, 0), (12, 0)), 6: ((1, 4), (2, 0), (3, 0), (4, 1), (100, 0))}


@pytest.mark.parametrize("target", [PUBLIC, PUBLIC_6])
def test_nobody_speaks_of_another_s_connection(
    world: World, conversation: dict[str, socket.socket], target: str
) -> None:
    world.join_family_of(target)
    rich, poor = world.guest(), world.guest()
    send = whole_frame_of_6 if ":" in target else whole_frame

    def attack() -> None:
        assert poor.slot is not None
        spy = world.sniff(world.internet)
        conversation[target] = talk(rich, target)
        for kind, code in KINDS[6 if ":" in target else 4]:
            mark = world.mark()
            before = poor.slot.counters().get("refused_invalid", 0)
            send(poor, error(rich, poor, target, mark, kind, code))
            arrives(world, rich, spy)
            assert not spy.saw(mark), (kind, code)
            assert poor.slot.counters().get("refused_invalid", 0) > before, (kind, code)

    async def scenario() -> None:
        pool = world.pool()
        async with joined(pool, rich, contract=OPEN), joined(pool, poor, contract=BESIDE):
            await off(attack)

    world.run(scenario)


@pytest.mark.parametrize("target", [PUBLIC, PUBLIC_6])
def test_everybody_speaks_of_his_own(world: World, conversation: dict[str, socket.socket], target: str) -> None:
    """A port that nobody listens on any more is told to whom it was open, and needs no contract of its own."""
    world.join_family_of(target)
    guest = world.guest()
    contract = Contract(grants=(Grant(PUBLIC, (TALKING_TO, 9)), Grant(PUBLIC_6, (TALKING_TO, 9))))
    send = whole_frame_of_6 if ":" in target else whole_frame

    def tell() -> None:
        mark, spy = world.mark(), world.sniff(world.internet)
        conversation[target] = talk(guest, target)
        send(guest, error(guest, guest, target, mark, *KINDS[6 if ":" in target else 4][0]))
        wait_until(lambda: spy.saw(mark), "its own error passes")

    async def scenario() -> None:
        async with joined(world.pool(), guest, contract=contract):
            await off(tell)

    world.run(scenario)


@pytest.mark.parametrize(("target", "host"), [(PUBLIC, HOST), (PUBLIC_6, HOST_6)])
def test_what_comes_of_an_old_connection_is_held_to_the_new_rate(
    world: World, conversation: dict[str, socket.socket], target: str, host: str
) -> None:
    """Whoever was asked under an open contract sends on, to a sandbox that says nothing any more."""
    world.join_family_of(target)
    guest = world.guest()
    server = world.serve(world.internet, 81, socket.SOCK_DGRAM, target)
    slow = compiled(Contract(allowed_cidrs=OPEN.allowed_cidrs, rate_limit=RateLimit(packets_per_s=1)))

    def begin() -> None:
        conversation[target] = talk(guest, target, 81)

    def flood() -> None:
        for _ in range(200):
            server.socket.sendto(b"more", (host, TALKING_FROM))
        conversation[target].settimeout(1)
        heard = 0
        with contextlib.suppress(TimeoutError):
            while conversation[target].recv(100):
                heard += 1
        assert heard < 50

    async def scenario() -> None:
        pool = world.pool()
        async with joined(pool, guest, contract=OPEN):
            await off(begin)
            assert guest.slot is not None
            await pool.swear(guest.slot, slow)
            await off(flood)

    world.run(scenario)
