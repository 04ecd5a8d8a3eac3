"""Which destinations a sandbox may not reach, and why: pure decisions about addresses, no input or output.

Not in these lists on purpose: the networks of RFC 5737 that are reserved for documentation. Nobody routes them on the
Internet, so closing them protects nothing, and laboratories (our own tests among them) use them as its stand-in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses, ip_network
from typing import NamedTuple

from tartarus.network.links import ANYCAST, LOCAL, UNICAST, Route

# In the order in which they are tried: the first that holds names the reason.
CLOSED: dict[str, tuple[str, ...]] = {
    "metadata": (
        "169.254.169.254/32",  # AWS, Azure, Google, OpenStack, Oracle and most others
        "169.254.170.2/32",  # AWS ECS task credentials
        "169.254.170.23/32",  # AWS EKS pod identity
        "168.63.129.16/32",  # Azure's WireServer; a public address
        "100.100.100.200/32",  # Alibaba
        "192.0.0.192/32",  # Oracle, formerly
    ),
    "link_local": ("169.254.0.0/16",),  # RFC 3927
    "loopback": ("127.0.0.0/8",),
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),  # RFC 1918, RFC 6598
    "multicast": ("224.0.0.0/4",),
    # "This network", IETF protocol assignments, 6to4 relays, benchmarking, class E with the broadcast address: see
    # IANA's IPv4 Special-Purpose Address Registry.
    "reserved": ("0.0.0.0/8", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4"),
}

# The same for IPv6, by the same reasons: what IANA's registry has as not globally reachable, and all that wraps an IPv4
# address, which would have to be judged as that one.
CLOSED_6: dict[str, tuple[str, ...]] = {
    "metadata": (
        "fd00:ec2::254/128",  # AWS
        "fd00:ec2::23/128",  # AWS EKS pod identity
        "fd20:ce::254/128",  # Google
        "fd00:c1::a9fe:a9fe/128",  # Oracle
        "fd00:42::42/128",  # Scaleway
        "fe80::a9fe:a9fe/128",  # OpenStack
    ),
    "link_local": ("fe80::/10",),
    "loopback": ("::1/128",),
    "private": ("fc00::/7", "fec0::/10"),  # RFC 4193, RFC 3879
    "multicast": ("ff00::/8",),
    # Unspecified and IPv4-compatible, IPv4-mapped, NAT64 (RFC 6052, 8215), discard-only, IETF protocol assignments with
    # Teredo, 6to4, segment routing's identifiers.
    "reserved": (
        "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2002::/16", "5f00::/16",
    ),
}  # fmt: skip

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
_NETWORKS = {
    version: {reason: tuple(ip_network(text) for text in texts) for reason, texts in closed.items()}
    for version, closed in ((4, CLOSED), (6, CLOSED_6))
}
# A route for half of all addresses (0.0.0.0/1), as VPNs lay over the default route, is a way out, not a neighbourhood.
_SHORTEST_NEIGHBOURHOOD = 8


class HostNetworks(NamedTuple):
    """What this host is part of: its own addresses, and what it reaches without a gateway, or as a gateway."""

    host: tuple[Network, ...] = ()
    neighbours: tuple[Network, ...] = ()

    @classmethod
    def of(cls, routes: Iterable[Route], *, except_links: Sequence[int] = ()) -> HostNetworks:
        """From the host's routes; those through `except_links` (ours) are left out."""
        host: list[Network] = []
        neighbours: list[Network] = []
        for route in routes:
            if set(route.interfaces) & set(except_links):
                continue
            if route.kind in {LOCAL, ANYCAST}:
                host.append(route.destination)
            elif route.kind == UNICAST:
                neighbours += [ip_network(gateway) for gateway in route.gateways]
                if route.direct and route.destination.prefixlen >= _SHORTEST_NEIGHBOURHOOD:
                    neighbours.append(route.destination)
        return cls(_joined(host), _joined(neighbours))

    def refuses(self, address: Address) -> str:
        """The reason why no sandbox may reach `address`, or nothing."""
        closed = _NETWORKS[address.version].items()
        for reason, networks in (("host", self.host), *closed, ("neighbour", self.neighbours)):
            if any(address in network for network in networks):
                return reason
        return ""


def closed_whole(network: Network) -> str:
    """The reason why no address of a network is open, whatever contracts name; nothing if some may be.

    Contracts can open what is ``private`` or ``metadata``.
    """
    for reason, networks in _NETWORKS[network.version].items():
        if any(network.network_address in one and network.broadcast_address in one for one in networks):
            return reason
    return ""


def _joined(networks: list[Network]) -> tuple[Network, ...]:
    of_4 = [network for network in networks if isinstance(network, IPv4Network)]
    of_6 = [network for network in networks if isinstance(network, IPv6Network)]
    return (*collapse_addresses(of_4), *collapse_addresses(of_6))


def ways_out(routes: Iterable[Route], *, except_links: Sequence[int] = ()) -> set[int]:
    """The links through which packets leave for the world: those of default routes and of routes with gateways."""
    found: set[int] = set()
    for route in routes:
        if route.kind == UNICAST and (route.gateways or route.destination.prefixlen < _SHORTEST_NEIGHBOURHOOD):
            found |= set(route.interfaces)
    return found - set(except_links)


def free_range(
    ranges: Iterable[Network], prefix: int, routes: Iterable[Route], avoid: Iterable[Address]
) -> Network | None:
    """The first network of length `prefix` in `ranges` that overlaps no route but the widest, and has no `avoid`."""
    taken = [route.destination for route in routes if route.destination.prefixlen >= _SHORTEST_NEIGHBOURHOOD]
    avoided = list(avoid)
    for wide in ranges:
        blocking = [network for network in taken if network.overlaps(wide)]
        for network in wide.subnets(new_prefix=prefix):
            if any(network.overlaps(other) for other in blocking) or any(address in network for address in avoided):
                continue
            return network
    return None
