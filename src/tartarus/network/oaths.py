"""Contracts in the packet filter: each is some members of the router's sets, put there and taken away at one moment.

Each has a number, by which the rules know it: the slot's, and one that counts that slot's contracts. Its bytes are
the same in either order, because nft 1.0 has the kernel turn marks around for some sets and not for others.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address, summarize_address_range
from typing import NamedTuple

from tartarus.model.contract import MAX_PORT, RateLimit
from tartarus.network.compiled import MAX_OPENINGS, Compiled, Opening
from tartarus.network.destinations import Address
from tartarus.network.families import V4, V6, Family
from tartarus.network.netlink import (
    CREATE,
    NETLINK_NETFILTER,
    NetlinkSocket,
    Request,
    attribute,
    nested,
    text,
)
from tartarus.network.rules import ROUTER_TABLE, count_chain

_GENERATIONS = 15
_PER_SLOT = 16
_NEW, _DELETE = (10 << 8) | 12, (10 << 8) | 14
_HEADER = struct.pack(">BBH", 1, 0, 0)  # NFPROTO_INET
_TABLE, _SET, _ELEMENTS = 1, 2, 3
_ELEMENT = 1
_KEY, _DATA, _TIMEOUT, _EXPRESSION, _KEY_END = 1, 2, 4, 7, 10
_VALUE = 1
_EXPR_NAME, _EXPR_DATA = 1, 2
_RATE, _UNIT, _BURST, _TYPE, _FLAGS = 1, 2, 3, 4, 5
_PACKETS, _BYTES, _INVERTED = 0, 1, 1
_DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN, _JUMP = 2, 1, 2, -3
_MOST_BLOCKS = 64
_ANY_PROTOCOL, _TCP_TO_UDP = (0, 255), (6, 17)
_NAME_BYTES = 16
# Elements of one message: netlink's attributes count their bytes in 16 bits.
_PER_MESSAGE = 400
_LEAST_BURST = 64 * 1024
"""Bytes: one packet of the largest size that a link hands over at once."""


class Oath(NamedTuple):
    """A contract that was sworn: its number, and its members of each set."""

    mark: int
    members: dict[str, list[bytes]]


class Answer(NamedTuple):
    """An address of a domain that is open for so many seconds more: `direct` ports, and `web` ones by the proxy.

    None is all ports, an empty set none. IPv6 has no `web`.
    """

    address: Address
    direct: frozenset[int] | None
    web: frozenset[int] | None
    ttl_s: float


class Oaths:
    """The router's sets. Made by a thread in its network namespace; any thread may use it then."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)
        # The kernel takes long for each removal from a long set of ranges; who swears waits behind one at most.
        self._removals = NetlinkSocket(NETLINK_NETFILTER)
        self._counts: dict[int, int] = {}
        self._since: dict[int, int] = {}
        # Members of contracts that are void.
        self._void: dict[int, dict[str, list[bytes]]] = {}
        # What was opened under each number that holds: it must be gone before another contract has that number.
        self._answers: dict[int, set[tuple[str, bytes]]] = {}
        self._lock = threading.Lock()
        self._sweeping = threading.Lock()

    def close(self) -> None:
        """Close it; safe to repeat."""
        self._netlink.close()
        self._removals.close()

    def next_mark(self, slot: int) -> tuple[int, bool]:
        """The number of the slot's next contract, and whether connections of its 15th last may still have it."""
        count = self._counts[slot] = self._counts.get(slot, 0) % _GENERATIONS + 1
        since = self._since[slot] = self._since.get(slot, 0) + 1
        mark = _palindrome(slot * _PER_SLOT + count)
        if mark in self._void:
            self._sweep(mark)
        return mark, since > _GENERATIONS

    def forgotten(self, slot: int) -> None:
        """The slot has no connections any more."""
        self._since.pop(slot, None)

    def swear(
        self, mark: int, slot_link: str, addresses: Sequence[Address], contract: Compiled, old: Oath | None = None,
        answers: Iterable[Answer] = (), *, carries_6: bool = False,
    ) -> Oath:  # fmt: skip
        """From one moment on the slot's packets pass by this contract and by no other. Raises OSError.

        `old`: the one that held before. Nothing asks for its members any more; they go with the next `sweep`.
        `addresses`: all of the slot's. `answers`: addresses of domains, opened from the same moment on. `carries_6`:
        whether any packet of IPv6 may pass.
        """
        members = dict(_members(mark, contract, carries_6=carries_6))
        link = slot_link.encode().ljust(_NAME_BYTES, b"\0")
        number = struct.pack("=I", mark)
        with self._lock:
            self._answers[mark] = set()
        try:
            opened = list(_change(_NEW, members.items()))
            switch: list[Request] = []
            if old is not None:
                # Before the switch, so that nothing that both allow is held up; a first one has nothing to hold up.
                self._netlink.transact(*opened)
                opened = []
                before = struct.pack("=I", old.mark)
                switch += _change(_DELETE, [("sworn", [_element(link)]), *_sworn_to(addresses),
                                            ("live", [_element(before)])])  # fmt: skip
            for one in answers:
                self.answer(mark, one)
            switch += _change(_NEW, [("sworn", [_element(link, data=number)]), ("live", [_element(number)]),
                                     *_sworn_to(addresses, number)])  # fmt: skip
            switch = [*opened, *switch]
            self._netlink.transact(*switch)
        except OSError:
            self._end(Oath(mark, members))
            self.sweep()
            raise
        if old is not None:
            self._end(old)
        return Oath(mark, members)

    def release(self, slot_link: str, addresses: Sequence[Address], oath: Oath) -> None:
        """From this moment on none of the slot's packets pass. Raises OSError."""
        link = slot_link.encode().ljust(_NAME_BYTES, b"\0")
        self._netlink.transact(*_change(_DELETE, [
            ("sworn", [_element(link)]), *_sworn_to(addresses), ("live", [_element(struct.pack("=I", oath.mark))]),
        ]))  # fmt: skip
        self._end(oath)

    def _end(self, oath: Oath) -> None:
        with self._lock:
            members = {name: list(elements) for name, elements in oath.members.items()}
            for name, key in self._answers.pop(oath.mark, ()):
                members.setdefault(name, []).append(_element(key))
            self._void[oath.mark] = members

    def sweep(self) -> None:
        """Take out what was of contracts that are void. Raises OSError."""
        while (mark := next(iter(list(self._void)), None)) is not None:
            self._sweep(mark)

    def _sweep(self, mark: int) -> None:
        with self._sweeping:
            members = self._void.get(mark)
            if members is not None:
                self._remove(members)
                del self._void[mark]

    def answer(self, mark: int, answer: Answer) -> None:
        """Open an address to the contract for so many seconds from now, and longer where it was already.

        Raises OSError. An element goes by itself when its time is over.
        """
        number, address = struct.pack("=I", mark), answer.address.packed
        opened = [("answers", answer.direct), ("web", answer.web)]
        if answer.address.version == V6.version:
            opened = [(V6.network_set(V6.bits), answer.direct)]
        for name, ports in opened:
            if ports is None:
                self._open(mark, f"{name}_any", _answer(number, address, None), answer.ttl_s)
            for port in sorted(ports or ()):
                self._open(mark, name, _answer(number, address, port), answer.ttl_s)

    def _open(self, mark: int, name: str, key: bytes, ttl_s: float) -> None:
        with self._lock:
            opened = self._answers.get(mark)
            if opened is None:
                return  # another contract holds by now
            opened.add((name, key))
            self._put(name, key, ttl_s)

    def _put(self, name: str, key: bytes, ttl_s: float) -> None:
        timeout = attribute(_TIMEOUT, struct.pack(">Q", max(1000, int(ttl_s * 1000))))
        fresh = list(_change(_NEW, [(name, [_element(key, extra=timeout)])]))
        old = list(_change(_DELETE, [(name, [_element(key)])]))
        try:
            self._netlink.transact(*old, *fresh)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            self._netlink.transact(*fresh)

    def _remove(self, members: dict[str, list[bytes]]) -> None:
        for name, elements in members.items():
            try:
                self._removals.transact(*_change(_DELETE, [(name, elements)]))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                # Some have gone by themselves, as answers do; the others must go, too.
                for element in elements:
                    self._remove_one(name, element)

    def _remove_one(self, name: str, element: bytes) -> None:
        try:
            self._removals.transact(*_change(_DELETE, [(name, [element])]))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


def mask_of_slot(slot: int) -> tuple[int, int]:
    """The mark and mask by which all contracts of a slot are known, whenever they were sworn."""
    return _palindrome(slot * _PER_SLOT), _palindrome(0x10000 - _PER_SLOT)


def _palindrome(number: int) -> int:
    high, low = number >> 8, number & 0xFF
    return high << 24 | low << 16 | low << 8 | high


def _sworn_to(addresses: Sequence[Address], number: bytes = b"") -> list[tuple[str, list[bytes]]]:
    """Who a slot's addresses are answered for."""
    return [
        ("sworn_to" + family.suffix, [_element(address.packed, data=number)])
        for family in (V4, V6) for address in addresses if address.version == family.version
    ]  # fmt: skip


def _members(mark: int, contract: Compiled, *, carries_6: bool) -> Iterator[tuple[str, list[bytes]]]:
    """The members of each set that a contract is, encoded; sets without any are left out."""
    number = struct.pack("=I", mark)
    yield from _openings(V4, number, contract.openings)
    if carries_6:
        yield "carries_6", [_element(number)]
        yield from _openings(V6, number, contract.openings_6)
    for name, holds in (("opens_private", not contract.deny_private), ("opens_metadata", not contract.deny_metadata),
                        ("nameless", contract.deny_dns), ("proxied", contract.is_proxied)):  # fmt: skip
        if holds:
            yield name, [_element(number)]
    if contract.new_connections is not None:
        rate = contract.new_connections
        yield "own_opening", [_element(number, extra=_limit(rate, rate, _PACKETS))]
    if contract.connections is not None:
        chain = text(_VERDICT_CHAIN, count_chain(contract.connections))
        code = attribute(_VERDICT_CODE, struct.pack(">i", _JUMP))
        yield "counts", [_element(number, extra=nested(_DATA, nested(_DATA_VERDICT, code, chain)))]
    if contract.rate is not None:
        yield from _rates(number, contract.rate)


def _openings(family: Family, number: bytes, openings: Sequence[Opening]) -> Iterator[tuple[str, list[bytes]]]:
    ranges, networks = split(openings, family)
    if openings == (Opening(0, int(family.every.broadcast_address), 0, MAX_PORT),):
        yield f"opens_all{family.suffix}", [_element(number)]
    elif ranges:
        protocols = ((_ANY_PROTOCOL if one.all else _TCP_TO_UDP) for one in ranges)
        members = [
            _element(
                _opening(number, family.packed(one.first), first, one.first_port),
                end=_opening(number, family.packed(one.last), last, one.last_port),
            )
            for one, (first, last) in zip(ranges, protocols, strict=True)
        ]
        yield f"openings{family.suffix}", members
    for name, those in networks.items():
        yield name, [_element(_answer(number, family.packed(address), port)) for address, port in those]


def split(
    openings: Sequence[Opening], family: Family = V4
) -> tuple[list[Opening], dict[str, list[tuple[int, int | None]]]]:
    """What has to be a range, and the rest as networks with a port, or None for all of them, by the sets they go to."""
    ranges: list[Opening] = []
    networks: dict[str, list[tuple[int, int | None]]] = {}
    count = 0
    for one in openings:
        blocks = _blocks(one, family)
        count += len(blocks)
        if not blocks or count > MAX_OPENINGS:
            ranges.append(one)
            continue
        for length, address in blocks:
            name = family.network_set(length) + ("_any" if one.all else "")
            networks.setdefault(name, []).append((address, None if one.all else one.first_port))
    return ranges, networks


def _blocks(one: Opening, family: Family) -> list[tuple[int, int]]:
    """Networks of the lengths that have sets, which make up an opening; none where they can't, or are too many."""
    found: list[tuple[int, int]] = []
    if not (one.all or one.is_port):
        return []
    first, last = (ip_address(family.packed(number)) for number in (one.first, one.last))
    for network in summarize_address_range(first, last):
        length = next(length for length in family.lengths if length >= network.prefixlen)
        parts = 1 << length - network.prefixlen
        if network.prefixlen < family.lengths[0] or len(found) + parts > _MOST_BLOCKS:
            return []
        found += [(length, int(part.network_address)) for part in network.subnets(new_prefix=length)]
    return found


def _rates(number: bytes, rate: RateLimit) -> Iterator[tuple[str, list[bytes]]]:
    for name in ("own_sending", "own_receiving"):
        if rate.bytes_per_s:
            burst = max(rate.burst_bytes or rate.bytes_per_s // 5, _LEAST_BURST)
            yield name, [_element(number, extra=_limit(rate.bytes_per_s, min(burst, 2**32 - 1), _BYTES))]
        if rate.packets_per_s:
            burst = max(min(rate.packets_per_s // 5, 2**31), 5)
            yield f"{name}_packets", [_element(number, extra=_limit(rate.packets_per_s, burst, _PACKETS))]


def _opening(number: bytes, address: bytes, protocol: int, port: int) -> bytes:
    return number + address + struct.pack(">B3xH2x", protocol, min(port, MAX_PORT))


def _answer(number: bytes, address: bytes, port: int | None) -> bytes:
    return number + address + (b"" if port is None else struct.pack(">H2x", port))


def _limit(rate: int, burst: int, kind: int) -> bytes:
    """An expression that holds for what is over so many packets or bytes a second."""
    parts = attribute(_RATE, struct.pack(">Q", rate)) + attribute(_UNIT, struct.pack(">Q", 1))
    parts += attribute(_BURST, struct.pack(">I", burst)) + attribute(_TYPE, struct.pack(">I", kind))
    return _expression("limit", parts + attribute(_FLAGS, struct.pack(">I", _INVERTED)))


def _expression(name: str, data: bytes) -> bytes:
    return nested(_EXPRESSION, text(_EXPR_NAME, name), nested(_EXPR_DATA, data))


def _element(key: bytes, *, end: bytes = b"", data: bytes = b"", extra: bytes = b"") -> bytes:
    parts = [nested(_KEY, attribute(_VALUE, key))]
    if end:
        parts.append(nested(_KEY_END, attribute(_VALUE, end)))
    if data:
        parts.append(nested(_DATA, attribute(_VALUE, data)))
    return nested(_ELEMENT, *parts, extra)


def _change(kind: int, members: Iterable[tuple[str, list[bytes]]]) -> Iterator[Request]:
    for name, elements in members:
        for start in range(0, len(elements), _PER_MESSAGE):
            body = _HEADER + text(_TABLE, ROUTER_TABLE) + text(_SET, name)
            body += nested(_ELEMENTS, *elements[start : start + _PER_MESSAGE])
            yield Request(kind, CREATE if kind == _NEW else 0, body)
