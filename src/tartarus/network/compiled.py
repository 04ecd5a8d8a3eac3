"""A contract as the packet filter takes it: ranges of addresses and ports that don't overlap, and who else is open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import msgspec

from tartarus.model.contract import MAX_PORT, Contract, Network, RateLimit, normal
from tartarus.model.errors import InvalidRequest
from tartarus.network.destinations import Address

MAX_OPENINGS = 4096
"""Ranges of one contract, which many networks with many ports multiply to."""
_Ports = frozenset[int] | None  # None is all of them


class Opening(NamedTuple):
    """Addresses from `first` to `last`, at those ports. `all`: whatever the protocol."""

    first: int
    last: int
    first_port: int
    last_port: int

    @property
    def all(self) -> bool:
        """Every port, and echo requests."""
        return (self.first_port, self.last_port) == (0, MAX_PORT)

    @property
    def is_port(self) -> bool:
        """One port, no range."""
        return self.first_port == self.last_port


class Names(msgspec.Struct, frozen=True):
    """Domains and their ports: by their own name, and those above all that are below them."""

    exact: dict[str, _Ports]
    below: dict[str, _Ports]

    @classmethod
    def of(cls, domains: Iterable[tuple[str, tuple[int, ...]]]) -> Names:
        """Joined, where one is named several times."""
        exact: dict[str, list[_Ports]] = {}
        below: dict[str, list[_Ports]] = {}
        for name, ports in domains:
            kind, key = (below, name[2:]) if name.startswith("*.") else (exact, name)
            kind.setdefault(key, []).append(_set(ports))
        return cls(*({name: _union(found) for name, found in kind.items()} for kind in (exact, below)))

    def ports_of(self, name: str) -> _Ports:
        """At which ports a name is open; the empty set for one that is not."""
        wanted = normal(name)
        found: list[_Ports] = [self.exact[wanted]] if wanted in self.exact else []
        while "." in wanted:
            wanted = wanted.partition(".")[2]
            if wanted in self.below:
                found.append(self.below[wanted])
        return _union(found)


class Compiled(msgspec.Struct, frozen=True):
    """What is set in the packet filter for one contract, and what the resolver needs of it."""

    contract: Contract
    openings: tuple[Opening, ...]
    openings_6: tuple[Opening, ...]
    names: Names
    direct: Names
    every_name: bool
    deny_private: bool
    deny_metadata: bool
    deny_dns: bool
    rate: RateLimit | None
    connections: int | None
    new_connections: int | None

    def ports_of(self, name: str) -> _Ports:
        """At which ports a domain's addresses are opened; the empty set for one that is not allowed."""
        return self.names.ports_of(name)

    @property
    def is_proxied(self) -> bool:
        """Whether it has domains, which are reached through the egress proxy."""
        return bool(self.names.exact or self.names.below)

    @property
    def opens_6(self) -> bool:
        """Whether it could let any packet of IPv6 pass."""
        return bool(self.openings_6 or self.direct.exact or self.direct.below)

    def denies(self, address: Address) -> bool:
        """Whether the contract denies it by name."""
        return any(address in network for network in self.contract.denied() if network.version == address.version)

    def allows(self, address: Address, port: int) -> bool:
        """Whether its networks open that address and port, of TCP or UDP; domains don't count here."""
        number = int(address)
        openings = self.openings if address.version == 4 else self.openings_6
        return any(one.first <= number <= one.last and one.first_port <= port <= one.last_port for one in openings)


def compiled(contract: Contract) -> Compiled:
    """Work a contract out. Raises InvalidRequest when it comes to too many ranges."""
    openings = {version: tuple(_openings(contract, version)) for version in (4, 6)}
    if sum(map(len, openings.values())) > MAX_OPENINGS:
        raise InvalidRequest(
            "the contract is too long", why=f"its networks and ports come to more than {MAX_OPENINGS} ranges",
            fix="use fewer networks, or fewer ports",
        )  # fmt: skip
    return Compiled(
        contract, openings[4], openings[6],
        names=Names.of(contract.domains()), direct=Names.of(contract.direct_domains()),
        # A question is a message too: only who may send to everybody anyway may ask for every name.
        every_name=any(net.prefixlen == 0 for net, _ in contract.networks()),
        deny_private=contract.deny_private, deny_metadata=contract.deny_metadata,
        deny_dns=contract.deny_dns, rate=contract.rate_limit, connections=contract.max_connections,
        new_connections=contract.new_connections_per_s,
    )  # fmt: skip


def _openings(contract: Contract, version: int) -> Iterator[Opening]:
    """Sweep over the ends of all networks: between two of them everything is the same."""
    allowed = [(net, _set(ports)) for net, ports in contract.networks() if net.version == version]
    denied = [net for net in contract.denied() if net.version == version]
    ends = sorted({end for net in (*(net for net, _ in allowed), *denied) for end in _ends(net)})
    last: tuple[int, int, _Ports] | None = None
    for first, after in pairwise(ends):
        ports: _Ports = frozenset()
        if not any(_holds(net, first) for net in denied):
            ports = _union(ports for net, ports in allowed if _holds(net, first))
        if last is not None and last[2] == ports and last[1] == first:
            last = (last[0], after, ports)
            continue
        if last is not None:
            yield from _ranges(*last)
        last = (first, after, ports)
    if last is not None:
        yield from _ranges(*last)


def _ranges(first: int, after: int, ports: _Ports) -> Iterator[Opening]:
    if ports is None:
        yield Opening(first, after - 1, 0, MAX_PORT)
        return
    start = previous = -1
    for port in sorted(ports):
        if port != previous + 1 or start < 0:
            if start >= 0:
                yield Opening(first, after - 1, start, previous)
            start = port
        previous = port
    if start >= 0:
        yield Opening(first, after - 1, start, previous)


def _ends(network: Network) -> tuple[int, int]:
    return int(network.network_address), int(network.broadcast_address) + 1


def _holds(network: Network, number: int) -> bool:
    first, after = _ends(network)
    return first <= number < after


def _set(ports: tuple[int, ...]) -> _Ports:
    return frozenset(ports) if ports else None


def _union(found: Iterable[_Ports]) -> _Ports:
    ports: frozenset[int] = frozenset()
    for one in found:
        if one is None:
            return None
        ports |= one
    return ports
