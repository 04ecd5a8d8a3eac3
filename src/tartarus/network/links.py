"""Links, addresses and routes of one network namespace (rtnetlink, see rtnetlink(7))."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_address
from typing import NamedTuple

from tartarus.network.netlink import (
    CREATE,
    EXCLUSIVE,
    NETLINK_ROUTE,
    NetlinkSocket,
    Request,
    attribute,
    attributes,
    nested,
    text,
    u32,
)

_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR = 20
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWNEIGH = 28
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_IFF_UP = 1

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_STATS64, _IFLA_NET_NS_FD = 1, 3, 4, 18, 23, 28
_IFLA_OPERSTATE, _IF_OPER_UP = 16, 6
_IFLA_AF_SPEC, _INET6_ADDR_GEN_MODE, _ADDR_GEN_NONE = 26, 8, b"\1"
_INFO_KIND, _INFO_DATA = 1, 2
_VETH_INFO_PEER = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_NDA_DST, _NDA_LLADDR = 1, 2
_PERMANENT = 0x80
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_MULTIPATH, _RTA_VIA = 1, 4, 5, 9, 18

_TABLE_MAIN, _TABLE_LOCAL = 254, 255
_PROTOCOL_STATIC = 4
# The kernel tells nobody but waiting readers of events; the wait is for one turn of its worker.
_LOOK_EVERY_S = 0.0001
_WORKING_S = 1.0
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
UNICAST = 1
LOCAL = 2
ANYCAST = 4
"""An address that is this host's, together with others."""
_CACHED = 0x200  # RTM_F_CLONED: an exception, not a route
_NO_DETECTION = 0x02
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface


class Route(NamedTuple):
    """A route of any table. `kind` is UNICAST, LOCAL or another of rtnetlink(7)'s types.

    `direct`: whoever is there is reached without a gateway.
    """

    destination: Network
    kind: int
    gateways: tuple[Address, ...]
    interfaces: tuple[int, ...]
    direct: bool


class Traffic(NamedTuple):
    """What a link carried so far, as seen from its own side."""

    received_packets: int
    sent_packets: int
    received_bytes: int
    sent_bytes: int


class Link(NamedTuple):
    """A link as the kernel lists it; `mtu` in bytes. `working`: it is up, and so is the other end.

    `hardware`: its address for neighbours.
    """

    name: str
    ifindex: int
    mtu: int
    working: bool
    traffic: Traffic
    hardware: bytes


class End(NamedTuple):
    """One end of a pair to be made; the kernel chooses index and hardware address where they are empty."""

    name: str
    ifindex: int = 0
    hardware: bytes = b""


class Links:
    """The links of the network namespace of the thread that makes this; any thread may use it then."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE)

    def close(self) -> None:
        """Close it; safe to repeat."""
        self._netlink.close()

    def add_pair(self, near: End, far: End, far_namespace: int, mtu: int) -> None:
        """A veth pair, both ends down: `near` here, `far` in the namespace of that open file. Raises OSError."""
        there = _end(far, mtu) + u32(_IFLA_NET_NS_FD, far_namespace)
        info = nested(_IFLA_LINKINFO, text(_INFO_KIND, "veth"), nested(_INFO_DATA, attribute(_VETH_INFO_PEER, there)))
        self._netlink.do(Request(_NEWLINK, CREATE | EXCLUSIVE, _end(near, mtu) + info))

    def remove(self, name: str) -> bool:
        """Remove a link, and the other end of its pair; False if there is none of that name."""
        try:
            self._netlink.do(Request(_DELLINK, 0, _link(0) + text(_IFLA_IFNAME, name)))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return False
        return True

    def find(self, name: str) -> Link | None:
        """The link of that name, if there is one."""
        try:
            message = self._netlink.ask(Request(_GETLINK, 0, _link(0) + text(_IFLA_IFNAME, name)))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return None
        return _parse_link(message.body)

    def all(self) -> list[Link]:
        """Every link."""
        return [_parse_link(message.body) for message in self._netlink.dump(Request(_GETLINK, 0, _link(0)))]

    def bring_up(self, index: int, mtu: int = 0, settings: tuple[Request, ...] = (), *, quiet: bool = False) -> None:
        """Bring a link up, with that MTU in bytes unless it is 0, and then change `settings` of it. Raises OSError.

        `quiet`: it makes up no address of IPv6, so that it says nothing in that before it is given one.
        """
        requests = [Request(_NEWLINK, 0, _link(index, up=True) + (u32(_IFLA_MTU, mtu) if mtu else b"")), *settings]
        if quiet:
            mode = attribute(_INET6_ADDR_GEN_MODE, _ADDR_GEN_NONE)
            body = _link(index) + nested(_IFLA_AF_SPEC, nested(socket.AF_INET6, mode))
            requests.insert(0, Request(_NEWLINK, 0, body))
        # The kernel has no IPv6, or not for this link.
        self._netlink.do(*requests, ignore=(errno.EAFNOSUPPORT, errno.ESRCH) if quiet else ())

    def configure(self, index: int, own: Interface | None = None, settings: tuple[Request, ...] = ()) -> None:
        """Give a link that is up an address, and then add `settings` (`route`, `neighbour`). Raises OSError."""
        self._netlink.do(*([] if own is None else [address(own, index)]), *settings)

    def wait_until_working(self, name: str) -> None:
        """Wait until a link that is up carries packets. Raises OSError after a second.

        The kernel's own worker sets up its queue, soon after the other end came up. Until then what is sent is lost,
        and who sends a first packet tries again only after a second.
        """
        deadline = time.monotonic() + _WORKING_S
        while True:
            link = self.find(name)
            if link is not None and link.working:
                return
            if link is None or time.monotonic() > deadline:
                raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN), name)
            time.sleep(_LOOK_EVERY_S)

    def routes(self) -> list[Route]:
        """Every route of every table, of both families."""
        found: list[Route] = []
        for family in _FAMILIES.values():
            body = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
            parsed = (_parse_route(message.body) for message in self._netlink.dump(Request(_GETROUTE, 0, body)))
            found += [route for route in parsed if route is not None]
        return found


def address(own: Interface, index: int) -> Request:
    """The request for an address. One of IPv6 is good at once: nobody is asked whether he has it, too."""
    family, flags = _FAMILIES[own.version], 0 if own.version == 4 else _NO_DETECTION
    scope = _SCOPE_LINK if own.version == 6 and own.is_link_local else _SCOPE_UNIVERSE
    body = _ADDRESS.pack(family, own.network.prefixlen, flags, scope, index)
    body += attribute(_IFA_LOCAL, own.packed) + attribute(_IFA_ADDRESS, own.packed)
    return Request(_NEWADDR, CREATE | EXCLUSIVE, body)


def route(destination: Network, index: int, gateway: Address | None = None) -> Request:
    """The request for a route through a link: directly, or through a gateway there."""
    family = _FAMILIES[destination.version]
    scope = _SCOPE_LINK if gateway is None and destination.version == 4 else _SCOPE_UNIVERSE
    body = _ROUTE.pack(family, destination.prefixlen, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, scope, UNICAST, 0)
    body += attribute(_RTA_DST, destination.network_address.packed) if destination.prefixlen else b""
    body += u32(_RTA_OIF, index)
    body += attribute(_RTA_GATEWAY, gateway.packed) if gateway is not None else b""
    return Request(_NEWROUTE, CREATE | EXCLUSIVE, body)


def without_multicast(index: int) -> Request:
    """The request to take away the route that the kernel makes for IPv6's multicast through a link that comes up."""
    body = _ROUTE.pack(socket.AF_INET6, 8, 0, 0, _TABLE_LOCAL, 0, _SCOPE_UNIVERSE, 0, 0)
    return Request(_DELROUTE, 0, body + attribute(_RTA_DST, IPv6Address("ff00::").packed) + u32(_RTA_OIF, index))


def neighbour(address: Address, index: int, hardware: bytes) -> Request:
    """The request to know for good who has an address on a link: nobody is asked, and nobody can say otherwise."""
    body = _NEIGHBOUR.pack(_FAMILIES[address.version], index, _PERMANENT, 0, 0)
    body += attribute(_NDA_DST, address.packed) + attribute(_NDA_LLADDR, hardware)
    return Request(_NEWNEIGH, CREATE, body)


def _link(index: int, *, up: bool = False) -> bytes:
    return _LINK.pack(socket.AF_UNSPEC, 0, index, _IFF_UP if up else 0, _IFF_UP if up else 0)


def _end(end: End, mtu: int) -> bytes:
    body = _link(end.ifindex) + text(_IFLA_IFNAME, end.name) + u32(_IFLA_MTU, mtu)
    return body + (attribute(_IFLA_ADDRESS, end.hardware) if end.hardware else b"")


def _parse_link(body: bytes) -> Link:
    index = _LINK.unpack_from(body)[2]
    values = dict(attributes(body[_LINK.size :]))
    traffic = Traffic(*struct.unpack_from("=4Q", values.get(_IFLA_STATS64, bytes(32))))
    mtu = struct.unpack("=I", values[_IFLA_MTU])[0]
    working = values.get(_IFLA_OPERSTATE) == bytes([_IF_OPER_UP])
    return Link(
        values[_IFLA_IFNAME].rstrip(b"\0").decode(), index, mtu, working, traffic, values.get(_IFLA_ADDRESS, b"")
    )


def _parse_route(body: bytes) -> Route | None:
    family, prefix, *_, kind, flags = _ROUTE.unpack_from(body)
    if family not in _FAMILIES.values() or flags & _CACHED:
        return None
    made: type[Network] = IPv4Network if family == socket.AF_INET else IPv6Network
    destination = bytes(4 if family == socket.AF_INET else 16)
    gateways: list[Address] = []
    interfaces: list[int] = []
    direct = True
    for name, value in attributes(body[_ROUTE.size :]):
        if name == _RTA_DST:
            destination = value
        elif name == _RTA_GATEWAY:
            gateways.append(ip_address(value))
        elif name == _RTA_OIF:
            interfaces.append(struct.unpack("=I", value)[0])
        elif name == _RTA_VIA:
            direct = False  # a gateway of the other family
        elif name == _RTA_MULTIPATH:
            hops = _parse_hops(value)
            gateways += [gateway for _, gateway in hops if gateway is not None]
            interfaces += [index for index, _ in hops]
    network = made((destination, prefix))
    return Route(network, kind, tuple(gateways), tuple(interfaces), direct and not gateways)


def _parse_hops(data: bytes) -> list[tuple[int, Address | None]]:
    hops = []
    while len(data) >= 8:
        length, _flags, _weight, index = struct.unpack_from("=HBBi", data)
        if not 8 <= length <= len(data):
            break
        gateway = next((ip_address(value) for kind, value in attributes(data[8:length]) if kind == _RTA_GATEWAY), None)
        hops.append((index, gateway))
        data = data[(length + 3) & ~3 :]
    return hops
