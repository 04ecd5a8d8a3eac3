"""How a contract's openings are taken apart for the packet filter's sets."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv4Network

from tartarus.model.contract import Contract, Grant
from tartarus.network.compiled import MAX_OPENINGS, Opening, compiled
from tartarus.network.oaths import split
from tartarus.network.rules import PREFIX_LENGTHS, network_set

LENGTHS = {network_set(length): length for length in PREFIX_LENGTHS}


def opens(ranges: list[Opening], networks: dict[str, list[tuple[int, int | None]]], address: int, port: int) -> bool:
    """As the rules look a packet up."""
    for name, members in networks.items():
        length = LENGTHS[name.removesuffix("_any")]
        if (address >> (32 - length) << (32 - length), None if name.endswith("_any") else port) in members:
            return True
    return any(one.first <= address <= one.last and one.first_port <= port <= one.last_port for one in ranges)


def test_the_sets_open_what_the_contract_does_and_nothing_else() -> None:
    chance = random.Random(5)
    for _ in range(200):
        grants = []
        for _ in range(chance.randrange(1, 5)):
            network = IPv4Network((chance.getrandbits(32), chance.randrange(4, 33)), strict=False)
            ports = tuple(sorted(chance.sample((22, 80, 81, 82, 443), chance.randrange(0, 4))))
            grants.append(Grant(str(network), ports))
        holes = [str(IPv4Network((chance.getrandbits(32), chance.randrange(8, 33)), strict=False))]
        contract = compiled(Contract(grants=tuple(grants), denied_cidrs=tuple(holes)))
        ranges, networks = split(contract.openings)
        ends = [end for one in contract.openings for end in (one.first - 1, one.first, one.last, one.last + 1)]
        for number in [*(end for end in ends if 0 <= end < 2**32), *(chance.getrandbits(32) for _ in range(20))]:
            for port in (22, 79, 80, 81, 82, 83, 443):
                assert opens(ranges, networks, number, port) == contract.allows(IPv4Address(number), port)


def test_what_would_be_too_many_members_stays_a_range() -> None:
    everything_but_one = compiled(Contract(grants=(Grant("0.0.0.0/0", (80,)),), denied_cidrs=("203.0.113.9/32",)))
    ranges, networks = split(everything_but_one.openings)
    assert len(ranges) == len(everything_but_one.openings)
    assert networks == {}
    many = compiled(Contract(grants=tuple(Grant(f"10.{number}.1.2/31", (80,)) for number in range(200))))
    ranges, networks = split(many.openings * 20)
    assert sum(map(len, networks.values())) <= MAX_OPENINGS
    assert ranges
