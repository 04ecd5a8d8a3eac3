"""How a contract's openings are taken apart for the packet filter's sets."""

from __future__ import annotations

import random
from ipaddress import ip_address, ip_network

import pytest

from tartarus.model.contract import Contract, Grant
from tartarus.network.compiled import MAX_OPENINGS, Opening, compiled
from tartarus.network.families import FAMILIES, Family
from tartarus.network.oaths import split


def opens(
    family: Family, ranges: list[Opening], networks: dict[str, list[tuple[int, int | None]]], address: int, port: int
) -> bool:
    """As the rules look a packet up."""
    lengths = {family.network_set(length): length for length in family.lengths}
    for name, members in networks.items():
        rest = family.bits - lengths[name.removesuffix("_any")]
        if (address >> rest << rest, None if name.endswith("_any") else port) in members:
            return True
    return any(one.first <= address <= one.last and one.first_port <= port <= one.last_port for one in ranges)


@pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6"])
def test_the_sets_open_what_the_contract_does_and_nothing_else(family: Family) -> None:
    chance = random.Random(5)
    most = 2**family.bits

    def network(shortest: int) -> str:
        length = chance.randrange(shortest, family.bits + 1)
        return str(ip_network((family.packed(chance.getrandbits(family.bits)), length), strict=False))

    for _ in range(200):
        grants = []
        for _ in range(chance.randrange(1, 5)):
            ports = tuple(sorted(chance.sample((22, 80, 81, 82, 443), chance.randrange(0, 4))))
            grants.append(Grant(network(4), ports))
        contract = compiled(Contract(grants=tuple(grants), denied_cidrs=(network(8),)))
        openings = contract.openings_6 if family.suffix else contract.openings
        ranges, networks = split(openings, family)
        ends = [end for one in openings for end in (one.first - 1, one.first, one.last, one.last + 1)]
        for number in [
            *(end for end in ends if 0 <= end < most),
            *(chance.getrandbits(family.bits) for _ in range(20)),
        ]:
            for port in (22, 79, 80, 81, 82, 83, 443):
                expected = contract.allows(ip_address(family.packed(number)), port)
                assert opens(family, ranges, networks, number, port) == expected


def test_what_would_be_too_many_members_stays_a_range() -> None:
    everything_but_one = compiled(Contract(grants=(Grant("0.0.0.0/0", (80,)),), denied_cidrs=("203.0.113.9/32",)))
    ranges, networks = split(everything_but_one.openings)
    assert len(ranges) == len(everything_but_one.openings)
    assert networks == {}
    many = compiled(Contract(grants=tuple(Grant(f"10.{number}.1.2/31", (80,)) for number in range(200))))
    ranges, networks = split(many.openings * 20)
    assert sum(map(len, networks.values())) <= MAX_OPENINGS
    assert ranges
