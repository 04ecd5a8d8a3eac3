"""What an administrator may choose about sandboxes' networks."""

from __future__ import annotations

from ipaddress import IPv4Network

import msgspec

from tartarus.model.errors import InvalidRequest

_MOST_SLOTS = 4096
# Two for the way between the host and the router, and the last one unused as habit has it.
_NOT_SLOTS = 4


class NetworkSettings(msgspec.Struct, frozen=True):
    """Limits and places of one daemon's network slots.

    `slots`: how many sandboxes may have a network at once. `ranges`: private IPv4 networks that the slots' addresses
    may come from; the first free piece that collides with no route and no DNS server of the host is taken.
    `connections`: how many may be open at once in one slot. `new_connections`: how many more each second, with
    `burst` at once. `dns_queries`: for each slot each second. `dns_in_flight`: unanswered ones of one slot.
    `name_servers`: whom the node's resolver asks; empty: the host's own, as its resolv.conf says.
    """

    slots: int = 512
    # Pieces that cloud networks, container engines and home routers rarely give out.
    ranges: tuple[str, ...] = ("10.201.0.0/16", "172.29.0.0/16", "10.77.0.0/16", "192.168.240.0/20", "100.111.0.0/16")
    connections: int = 1024
    new_connections: int = 200
    burst: int = 400
    dns_queries: int = 50
    dns_in_flight: int = 32
    name_servers: tuple[str, ...] = ()

    @property
    def prefix_length(self) -> int:
        """Of the smallest network that has an address for every slot."""
        return 32 - (self.slots + _NOT_SLOTS - 1).bit_length()

    def networks(self) -> list[IPv4Network]:
        """`ranges` as networks. Raises InvalidRequest for one that is malformed, not private or too small."""
        found = []
        for text in self.ranges:
            try:
                network = IPv4Network(text)
            except ValueError as error:
                raise _refused(f"the network range {text!r} is not an IPv4 network", str(error)) from error
            if not any(network.subnet_of(private) for private in _PRIVATE):
                raise _refused(f"the network range {text} is not private", "it would shadow somebody's addresses")
            if network.prefixlen > self.prefix_length:
                raise _refused(
                    f"the network range {text} is too small", f"{self.slots} slots take a /{self.prefix_length}"
                )
            found.append(network)
        return found

    def check(self) -> None:
        """Raise InvalidRequest unless every value is in its range."""
        numbers = {
            "slots": (self.slots, _MOST_SLOTS), "connections": (self.connections, 65536),
            "new_connections": (self.new_connections, 100_000), "burst": (self.burst, 100_000),
            "dns_queries": (self.dns_queries, 100_000), "dns_in_flight": (self.dns_in_flight, 1024),
        }  # fmt: skip
        for name, (value, most) in numbers.items():
            if not 1 <= value <= most:
                raise _refused(f"the network setting {name} is {value}", f"it may be 1 to {most}")
        self.networks()


_PRIVATE = tuple(IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))


def _refused(what: str, why: str) -> InvalidRequest:
    return InvalidRequest(what, why=why, fix="change the daemon's network settings")
