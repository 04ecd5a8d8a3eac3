"""Packets and frames of an attacker's own making, and how an attack with them is judged."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address

from tests.network.servers import Sniffer, wait_until
from tests.network.topology import PUBLIC, Guest, World, joined, off

from tartarus.model.contract import OPEN, Contract, Grant
from tartarus.network.router import NEXT_HOP_HARDWARE

_PIDFD_GETFD = 438


def ip_packet(
    source: str, target: str, protocol: int, payload: bytes, *, fragment: int = 0, number: int = 1, options: bytes = b""
) -> bytes:
    """An IPv4 packet; the kernel fills in length and checksum."""
    words = 5 + len(options) // 4
    return struct.pack(
        ">BBHHHBBH4s4s", 0x40 | words, 0, 0, number, fragment, 64, protocol, 0,
        IPv4Address(source).packed, IPv4Address(target).packed,
    ) + options + payload  # fmt: skip


def udp(payload: bytes, port: int = 9, source: int = 4444) -> bytes:
    """A UDP datagram without a checksum."""
    return struct.pack(">HHHH", source, port, 8 + len(payload), 0) + payload


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)


def ip_packet_6(source: str, target: str, protocol: int, payload: bytes, *, hops: int = 64) -> bytes:
    """A packet of IPv6; where UDP or ICMPv6 has its checksum, that is filled in."""
    ends = IPv6Address(source).packed + IPv6Address(target).packed
    place = {17: 6, 58: 2}.get(protocol)
    if place is not None:
        payload = payload[:place] + checksum_6(ends, protocol, payload) + payload[place + 2 :]
    return struct.pack(">IHBB", 0x60000000, len(payload), protocol, hops) + ends + payload


def checksum_6(ends: bytes, protocol: int, payload: bytes) -> bytes:
    """Over what an upper header is sent in, whose own place for it is still zero."""
    return checksum(ends + struct.pack(">II", len(payload), protocol) + payload + bytes(len(payload) % 2))


def whole_frame_6(guest: Guest, *packets: bytes) -> None:
    """Packets to the next hop's hardware, as they are."""
    text = guest.shell("ip", "-6", "-o", "neighbour", "show", "fe80::1").split("lladdr ")[1].split()[0]
    frame(guest, *(bytes.fromhex(text.replace(":", "")) + b"\x02" + bytes(5) + b"\x86\xdd" + one for one in packets))


def icmp(kind: int, code: int, payload: bytes) -> bytes:
    payload += bytes(len(payload) % 2)
    return bytes([kind, code]) + checksum(bytes([kind, code, 0, 0]) + payload) + payload


def send_raw(guest: Guest, *packets: bytes) -> None:
    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            for packet in packets:
                sock.sendto(packet, (str(IPv4Address(packet[16:20])), 0))

    guest.run(send)


def frame(guest: Guest, *frames: bytes) -> None:
    """Whole Ethernet frames, past the guest's own kernel."""

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            for data in frames:
                sock.send(data)

    guest.run(send)


def address_of(guest: Guest) -> str:
    assert guest.slot is not None
    return str(guest.slot.address)


def counters(guest: Guest) -> dict[str, int]:
    assert guest.slot is not None
    return guest.slot.counters()


def arrives(world: World, guest: Guest, sniffer: Sniffer) -> None:
    """A harmless packet, sent after the others, arrives: what was to come has come."""
    mark = world.mark()
    guest.send(PUBLIC, 9, mark)
    wait_until(lambda: sniffer.saw(mark), "a harmless packet passes")


Attack = Callable[[Guest, bytes], None]


ONE_HOST = Contract(grants=(Grant(PUBLIC),))


def attempt(
    world: World, *attacks: tuple[str, Attack], others: int = 0, contracts: Sequence[Contract] = (OPEN, ONE_HOST)
) -> None:
    """Run attacks that send packets with a mark, which must be seen nowhere, but be counted under the attack's reason.

    Under each contract; what is closed to everybody is told as that, whatever the contract says.
    """
    spies = [world.sniff(where) for where in (world.internet, world.lan, world.host)]
    for contract in contracts:
        _attempt(world, attacks, others, contract, spies)


def _attempt(
    world: World, attacks: Sequence[tuple[str, Attack]], others: int, contract: Contract, spies: list[Sniffer]
) -> None:
    guest = world.guest()

    def all_of_them() -> None:
        for reason, attack in attacks:
            mark, before = world.mark(), counters(guest)
            attack(guest, mark)
            arrives(world, guest, spies[0])
            assert not [spy for spy in spies if spy.saw(mark)], (reason, attack)
            more = {name: count - before.get(name, 0) for name, count in counters(guest).items()}
            assert not reason or more.get(f"refused_{reason}", 0) >= 1, more

    async def scenario() -> None:
        async with joined(world.pool(), guest, *(world.guest() for _ in range(others)), contract=contract):
            await off(all_of_them)

    world.run(scenario)


def whole_frame(guest: Guest, packet: bytes) -> None:
    """A packet to the gateway's hardware, as it is: the guest's kernel has no say in its source and options."""
    if guest.hardware is None:
        guest.ask(PUBLIC)
        text = guest.shell("ip", "-o", "neighbour", "show", "10.201.0.1").split("lladdr ")[1].split()[0]
        guest.hardware = bytes.fromhex(text.replace(":", ""))
    frame(guest, frame_of(packet, guest.hardware))


def frame_of(packet: bytes, to: bytes = NEXT_HOP_HARDWARE) -> bytes:
    """An IPv4 packet's frame, with the length and checksum that a kernel would fill in."""
    size = 4 * (packet[0] & 15)
    head = bytearray(packet[:size])
    head[2:4] = struct.pack(">H", len(packet))
    head[10:12] = checksum(bytes(head))
    return to + b"\x02" + bytes(5) + b"\x08\x00" + bytes(head) + packet[size:]


def taken(pid: int, fd: int) -> socket.socket:
    """A socket that a process has, as one of ours."""
    process = os.pidfd_open(pid)
    try:
        found = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return socket.socket(fileno=found)
