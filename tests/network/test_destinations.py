"""Which destinations are closed, from a host's routes; and which piece of the private ranges is free."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.network.destinations import CLOSED, HostNetworks, free_range, ways_out
from tartarus.network.links import LOCAL, UNICAST, Route


def route(destination: str, *gateways: str, kind: int = UNICAST, through: int = 2, direct: bool | None = None) -> Route:
    hops = tuple(IPv4Address(gateway) for gateway in gateways)
    return Route(IPv4Network(destination), kind, hops, (through,), not gateways if direct is None else direct)


def test_neighbours_are_what_is_reached_without_a_gateway_and_the_gateways() -> None:
    found = HostNetworks.of(
        [
            route("0.0.0.0/0", "198.51.100.1"),
            route("198.51.100.0/24", through=2),
            route("203.0.113.7/32", "192.0.2.1"),
            route("198.51.100.10/32", kind=LOCAL),
            route("127.0.0.0/8", kind=LOCAL, through=1),
            route("198.51.100.255/32", kind=3),  # broadcast
            route("10.201.0.0/22", through=7),
            route("8.8.8.0/24", direct=False),  # through an IPv6 gateway
        ],
        except_links=[7],
    )
    assert [str(network) for network in found.host] == ["127.0.0.0/8", "198.51.100.10/32"]
    assert [str(network) for network in found.neighbours] == ["192.0.2.1/32", "198.51.100.0/24"]


def test_a_split_default_route_is_a_way_out_and_no_neighbourhood() -> None:
    """As VPNs lay it: two halves of the world, directly through a tunnel."""
    routes = [route("0.0.0.0/1", through=5), route("128.0.0.0/1", through=5), route("10.8.0.0/24", through=5)]
    assert [str(network) for network in HostNetworks.of(routes).neighbours] == ["10.8.0.0/24"]
    assert ways_out(routes) == {5}


def test_ways_out_are_default_routes_and_gateways() -> None:
    routes = [
        route("0.0.0.0/0", "198.51.100.1", through=2),
        route("203.0.113.0/24", "192.0.2.1", through=3),
        route("192.0.2.0/24", through=4),
        route("10.201.0.0/22", "10.201.0.1", through=7),
        route("198.51.100.10/32", kind=LOCAL, through=1),
    ]
    assert ways_out(routes, except_links=[7]) == {2, 3}


def test_a_reason_is_named() -> None:
    networks = HostNetworks((IPv4Network("198.51.100.10/32"),), (IPv4Network("198.51.100.0/24"),))
    reasons = {
        "198.51.100.10": "host", "198.51.100.11": "neighbour", "10.1.1.1": "private", "169.254.169.254": "metadata",
        "169.254.1.1": "link_local", "127.0.0.53": "loopback", "239.1.1.1": "multicast", "255.255.255.255": "reserved",
        "0.0.0.0": "reserved", "203.0.113.80": "", "8.8.8.8": "",
    }  # fmt: skip
    assert {text: networks.refuses(IPv4Address(text)) for text in reasons} == reasons


_networks = st.builds(
    lambda number, prefix: IPv4Network((number, prefix), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
)


@settings(deadline=None)
@given(st.lists(_networks, max_size=12), st.lists(st.ip_addresses(v=4), max_size=3))
def test_a_free_range_collides_with_nothing(taken: list[IPv4Network], avoid: list[IPv4Address]) -> None:
    wide = IPv4Network("10.201.0.0/16")
    found = free_range([wide], 22, [Route(network, UNICAST, (), (2,), True) for network in taken], avoid)
    if found is None:
        return
    assert isinstance(found, IPv4Network)
    assert found.subnet_of(wide)
    assert not any(found.overlaps(network) for network in taken if network.prefixlen >= 8)
    assert not any(address in found for address in avoid)


def test_metadata_servers_are_told_from_other_private_ones() -> None:
    assert next(iter(CLOSED)) == "metadata"
