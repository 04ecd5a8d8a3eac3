"""The router: a network namespace of the daemon's own, between the sandboxes and the host.

Every slot's link ends here, under rules that nobody else's firewall tool touches, and it ends with the daemon: the
namespace lives by the daemon's open file alone, so a daemon that is killed takes every sandbox's network with it and
leaves nothing behind here.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path

from tartarus.model.errors import GuestFailed
from tartarus.network import namespace, nft, rules, taps
from tartarus.network.compiled import Compiled
from tartarus.network.destinations import HostNetworks
from tartarus.network.families import NEXT_HOP_6
from tartarus.network.links import End, Links, Traffic, address, neighbour, route, without_multicast
from tartarus.network.netlink import Request
from tartarus.network.oaths import Answer, Oath, Oaths, mask_of_slot
from tartarus.network.settings import NetworkSettings
from tartarus.network.tracking import Counted, Tracking

GUEST_LINK = "eth0"
DNS_PORT = 53
_WAITING = 1024
"""Connections that wait for the proxy, while another takes a dead one's place."""
# Above what a kernel numbers its own links with; in a guest any number is free but those of its few fallback links.
_FIRST_INDEX = 1000
_EVERYWHERE = IPv4Network("0.0.0.0/0")
_EVERYWHERE_6 = IPv6Network("::/0")
HOST_6, ROUTER_6 = IPv6Address("fe80::1"), IPv6Address("fe80::2")
"""To each other."""
LINK_6 = 64
_SYSCTL = Path("/proc/sys/net")
_IPV6 = _SYSCTL / "ipv6"
_SYSCTLS = {
    "ipv4/ip_forward": "1",
    # Answers only where a packet's source would be answered; the rules say the same of each slot.
    "ipv4/conf/all/rp_filter": "1",
    "ipv4/conf/default/rp_filter": "1",
    "ipv4/conf/all/accept_redirects": "0",
    "ipv4/conf/default/accept_redirects": "0",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
    "ipv4/conf/all/accept_source_route": "0",
    "ipv4/conf/default/accept_source_route": "0",
    # A refusal is told every time, so that nobody waits for a time limit.
    "ipv4/icmp_ratelimit": "0",
    # What was not seen to begin is not a connection.
    "netfilter/nf_conntrack_tcp_loose": "0",
    # A day by default (five, in fact), which is long for something that counts against a limit.
    "netfilter/nf_conntrack_tcp_timeout_established": "7200",
    "ipv6/icmp/ratelimit": "0",
    "ipv6/conf/all/forwarding": "1",
    "ipv6/conf/default/forwarding": "1",
    # No addresses but those that its links are given; who is no slot's and not the host gets as far as the rules.
    "ipv6/conf/all/disable_ipv6": "0",
    "ipv6/conf/default/disable_ipv6": "0",
    "ipv6/conf/all/accept_ra": "0",
    "ipv6/conf/default/accept_ra": "0",
    "ipv6/conf/all/accept_redirects": "0",
    "ipv6/conf/default/accept_redirects": "0",
    "ipv6/conf/all/addr_gen_mode": "1",
    "ipv6/conf/default/addr_gen_mode": "1",
}
# Of every slot's link alike: nobody else is on it, and so nobody has to be asked who has an address.
NEXT_HOP_HARDWARE, GUEST_HARDWARE = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


class Router:
    """Made by `create`. Its methods block, on the kernel only, for a millisecond or so."""

    def __init__(
        self, file: int, networks: tuple[IPv4Network, IPv6Network], links: Links, removals: Links, tracking: Tracking,
        oaths: Oaths,
    ) -> None:  # fmt: skip
        self.namespace = file
        self.networks = networks
        network = networks[0]
        self.gateway = network[1]
        self.host_address = network[0]
        self._host = namespace.identity()
        self._links = links
        # The kernel answers a removal only after some 20 ms, when nothing on any processor uses the link any more.
        # Nobody else's request may wait behind that.
        self._removals = removals
        self._tracking = tracking
        self._oaths = oaths
        self._sworn: dict[int, Oath] = {}
        self._counted: set[int] = set()
        # Ours as well as the monitors': what a link carried is known until it is given back.
        self._taps: dict[int, int] = {}

    @classmethod
    def create(cls, networks: tuple[IPv4Network, IPv6Network], settings: NetworkSettings) -> Router:
        """A router with every rule and no link; slots have `networks`' addresses. Raises Unsupported, OSError."""
        file = namespace.create()
        try:

            def inside() -> tuple[Links, Links, Tracking, Oaths]:
                for name, value in _SYSCTLS.items():
                    _set(name, value)
                slots = {rules.slot_link(number): slot_addresses(networks, number) for number in range(settings.slots)}
                nft.apply(rules.router_table(slots, networks[0][1], networks, settings))
                return Links(), Links(), Tracking(), Oaths()

            return cls(file, networks, *namespace.run_in(file, inside))
        except BaseException:
            os.close(file)
            raise

    def connect(self, uplink: str, host_links: Links, mtu: int) -> None:
        """Join it to the host by a pair whose end there is called `uplink`; that end stays down. Raises OSError."""
        host_links.add_pair(End(uplink), End(rules.UPLINK), self.namespace, mtu)
        link = self._links.find(rules.UPLINK)
        assert link is not None
        way = route(_EVERYWHERE, link.ifindex, self.host_address)
        self._links.bring_up(link.ifindex)
        self._links.configure(link.ifindex, IPv4Interface((self.gateway, 31)), (way,))
        if _IPV6.exists():  # who tells a guest that a packet was refused
            self._links.configure(link.ifindex, IPv6Interface((self.networks[1][1], 128)))

    def connect_6(self, host_hardware: bytes) -> bytes:
        """Let what IPv6 slots send go to the host, whose end of the pair has that address; its own is returned.

        Raises OSError.
        """
        link = self._links.find(rules.UPLINK)
        if link is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), rules.UPLINK)
        ways = (neighbour(HOST_6, link.ifindex, host_hardware), route(_EVERYWHERE_6, link.ifindex, HOST_6))
        self._links.configure(link.ifindex, IPv6Interface((ROUTER_6, LINK_6)), ways)
        return link.hardware

    def wait_until_connected(self) -> None:
        """Wait until packets pass to the host, whose end of the pair was brought up. Raises OSError."""
        self._links.wait_until_working(rules.UPLINK)

    def know(self, networks: HostNetworks) -> None:
        """Close the host's own networks to every slot. Raises Unsupported."""
        change = rules.host_networks(rules.ROUTER_TABLE, networks)
        namespace.run_in(self.namespace, lambda: nft.apply(change))

    def swear(
        self, number: int, contract: Compiled, answers: Iterable[Answer] = (), *, carries_6: bool = False
    ) -> None:
        """Hold a slot to a contract, from one moment on; that of before is void then. Raises OSError, Unsupported.

        `carries_6`: whether it may have any packet of IPv6 carried.
        """
        limit = contract.connections
        if limit is not None and limit not in self._counted:
            namespace.run_in(self.namespace, lambda: nft.apply(rules.count_rules(limit)))
            self._counted.add(limit)
        mark, used = self._oaths.next_mark(number)
        if used:
            self._tracking.forget(mark)
        self._sworn[number] = self._oaths.swear(
            mark, rules.slot_link(number), slot_addresses(self.networks, number), contract, self._sworn.get(number),
            answers, carries_6=carries_6,
        )  # fmt: skip

    def answer(self, number: int, answer: Answer) -> None:
        """Open a domain's address to the slot's contract, if it has one. Raises OSError."""
        oath = self._sworn.get(number)
        if oath is not None:
            self._oaths.answer(oath.mark, answer)

    def release(self, number: int) -> None:
        """Nothing of a slot's passes any more. Safe to repeat. Raises OSError, and then its link is gone."""
        oath = self._sworn.get(number)
        if oath is None:
            return
        try:
            self._oaths.release(rules.slot_link(number), slot_addresses(self.networks, number), oath)
        except OSError:
            self._removals.remove(rules.slot_link(number))
            raise
        del self._sworn[number]

    def sweep(self) -> None:
        """Take out of the sets what was of contracts that are void. Raises OSError."""
        self._oaths.sweep()

    def attach(self, number: int, guest: int, mtu: int, *, with_6: bool = False) -> None:
        """Give the network namespace of `guest` (a pidfd, or the namespace's open file) the slot's link and address.

        Its address and routes come last, under rules that stand since before the guest was born; one of IPv6, too,
        `with_6`. Raises OSError, and GuestFailed for a guest that has no network namespace of its own.
        """
        index, (own, own_6) = _FIRST_INDEX + number, slot_addresses(self.networks, number)

        def inside() -> None:
            there = namespace.current()
            try:
                if namespace.identity(there) in {self._host, namespace.identity(self.namespace)}:
                    raise GuestFailed("the sandbox can't have a network", why="it has no network namespace of its own")
                near = End(rules.slot_link(number), index, NEXT_HOP_HARDWARE)
                self._links.add_pair(near, End(GUEST_LINK, _FIRST_INDEX, GUEST_HARDWARE), there, mtu)
            finally:
                os.close(there)
            links = Links()
            try:
                # Both ends work before the guest can use its own: of what it sends from the first moment on nothing
                # is lost, and nothing is sent twice. Without an address of IPv6 nothing is said in that at all.
                links.bring_up(_FIRST_INDEX, quiet=True)
                # IPv6 hears who is where only some time after a link came up, and who asks does so once a second.
                known = (route(IPv6Network(own_6), index), neighbour(own_6, index, GUEST_HARDWARE))
                # Nobody asks by multicast. The kernel keeps the routes for that of all links in one list, and goes
                # through all of it for each that comes up: 0.7 ms with 500.
                self._bring_up(number, settings_6=(without_multicast(index), *(known if with_6 else ())))
                links.wait_until_working(GUEST_LINK)
                gateway = route(IPv4Network(self.gateway), _FIRST_INDEX)
                world = route(_EVERYWHERE, _FIRST_INDEX, self.gateway)
                links.configure(_FIRST_INDEX, IPv4Interface((own, 32)), (gateway, world))
                if with_6:
                    self._give_6(links, IPv6Interface((own_6, 128)))
            finally:
                links.close()

        try:
            namespace.run_in(guest, inside)
        except BaseException:
            self.detach(number)
            raise

    def attach_tap(self, number: int, mtu: int, *, with_6: bool = False) -> int:
        """The slot's link as a tap, for a machine's monitor: an open file that is the caller's. Raises OSError.

        Its machine's kernel must be told the address, and can have no other; of IPv6 it asks who the router is.
        """
        index, name = _FIRST_INDEX + number, rules.slot_link(number)
        try:
            tap = self._taps[number] = namespace.run_in(self.namespace, lambda: taps.create(name, index))
            own_6 = slot_addresses(self.networks, number)[1]
            asked = (address(IPv6Interface((NEXT_HOP_6, 128)), index), route(IPv6Network(own_6), index))
            self._bring_up(number, mtu, asked if with_6 else ())
            return os.dup(tap)
        except BaseException:
            self.detach(number)
            raise

    def _bring_up(self, number: int, mtu: int = 0, settings_6: tuple[Request, ...] = ()) -> None:
        """A slot's link, with the way to its guest. What is not IPv6's own is not asked of a kernel without it."""
        index = _FIRST_INDEX + number
        way = route(IPv4Network(slot_addresses(self.networks, number)[0]), index)
        self._links.bring_up(index, mtu, (way, *settings_6), quiet=True)

    @staticmethod
    def _give_6(links: Links, own: IPv6Interface) -> None:
        """A guest's address of IPv6, by which its link begins to speak it."""
        known = neighbour(NEXT_HOP_6, _FIRST_INDEX, NEXT_HOP_HARDWARE)
        settings = (known, route(_EVERYWHERE_6, _FIRST_INDEX, NEXT_HOP_6))
        try:
            links.configure(_FIRST_INDEX, own, settings)
        except PermissionError:  # where the host has IPv6 off for new links
            _set(f"ipv6/conf/{GUEST_LINK}/disable_ipv6", "0")
            links.configure(_FIRST_INDEX, own, settings)

    def detach(self, number: int) -> Traffic | None:
        """Cut a slot's link, in whatever state it is, and forget its connections; what it carried, if it was there."""
        name = rules.slot_link(number)
        link = self._links.find(name)
        self._removals.remove(name)
        tap = self._taps.pop(number, None)
        if tap is not None:
            os.close(tap)
        # After the link, so that none is added any more.
        self._tracking.forget(*mask_of_slot(number))
        self._oaths.forgotten(number)
        return link.traffic if link is not None else None

    def traffic(self, number: int) -> Traffic | None:
        """What a slot's link carried, as the router sees it."""
        link = self._links.find(rules.slot_link(number))
        return link.traffic if link is not None else None

    def counted(self) -> Counted:
        """What the rules counted, of all slots, since the router was made."""
        return self._tracking.counted()

    def listen(self) -> tuple[socket.socket, socket.socket]:
        """Sockets for the resolver, UDP and a listening TCP one, at the gateway's address. After `connect`."""
        datagrams = self._bound(socket.SOCK_DGRAM, DNS_PORT)
        return datagrams, self._listening(DNS_PORT, 64)

    def listen_for_proxy(self) -> list[socket.socket]:
        """Sockets for the egress proxy: for those who ask it, and for what is led to it. After `connect`."""
        return [self._listening(port, _WAITING) for port in (rules.PROXY_PORT, rules.REDIRECTED_PORT)]

    def _listening(self, port: int, waiting: int) -> socket.socket:
        sock = self._bound(socket.SOCK_STREAM, port)
        sock.listen(waiting)
        return sock

    def _bound(self, kind: socket.SocketKind, port: int) -> socket.socket:
        def inside() -> socket.socket:
            sock = socket.socket(socket.AF_INET, kind)
            sock.setblocking(False)
            sock.bind((str(self.gateway), port))
            return sock

        return namespace.run_in(self.namespace, inside)

    def close(self) -> None:
        """End it: every link that ends in it goes, and every connection."""
        self._links.close()
        self._removals.close()
        self._tracking.close()
        self._oaths.close()
        for tap in self._taps.values():
            os.close(tap)
        self._taps.clear()
        os.close(self.namespace)


def slot_addresses(networks: tuple[IPv4Network, IPv6Network], number: int) -> tuple[IPv4Address, IPv6Address]:
    """The guest's of a slot: the first two of each network are for the way between the router and the host."""
    network, network_6 = networks
    return network[2 + number], network_6[2 + number]


def _set(name: str, value: str) -> None:
    try:
        (_SYSCTL / name).write_text(value, encoding="ascii")
    except FileNotFoundError:
        # A kernel without IPv6, or a setting that is newer than it. What we rely on is in the rules.
        if not name.startswith(("ipv6/", "netfilter/")):
            raise
