"""What differs between IPv4 and IPv6 in the packet filter: both have the same sets and rules, in names of their own."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from tartarus.network.destinations import CLOSED, CLOSED_6, Network


class Family(NamedTuple):
    """`suffix`: of its sets' names. `header`, `kind`: its packets and addresses, as nft calls them.

    `lengths`: prefixes of networks that have sets of their own, the last for single addresses. Sets of ranges take the
    kernel long to change when they are long.
    """

    version: int
    suffix: str
    header: str
    kind: str
    bits: int
    lengths: tuple[int, ...]
    closed: dict[str, tuple[str, ...]]

    @property
    def every(self) -> Network:
        """All of its addresses."""
        return self.network(0, 0)

    def network(self, address: int, length: int) -> Network:
        """One network of its."""
        return IPv4Network((address, length)) if self.version == 4 else IPv6Network((address, length))

    def packed(self, address: int) -> bytes:
        """An address as packets have it."""
        return address.to_bytes(self.bits // 8, "big")

    def network_set(self, length: int) -> str:
        """The set of what contracts open at one port of such networks; with `_any`, whatever the port."""
        return ("answers" if length == self.lengths[-1] else f"net{length}") + self.suffix


V4 = Family(4, "", "ip", "ipv4_addr", 32, tuple(range(8, 33, 2)), CLOSED)
# Registries give out /20 to /32, sites have /48 to /64; what lies between a link and one address is rare.
V6 = Family(6, "_6", "ip6", "ipv6_addr", 128, (*range(20, 65, 4), 128), CLOSED_6)
FAMILIES = (V4, V6)
NEXT_HOP_6 = IPv6Address("fe80::1")
"""Who a slot sends IPv6 to: the router, on every slot's link."""
