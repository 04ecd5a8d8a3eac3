"""What the host itself gets: one link, one table of rules, and forwarding where it was off. All of it is put back."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from base64 import b32encode
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path

import msgspec

from tartarus.model.errors import NoSpace
from tartarus.network import forwarding, nft, rules, wall
from tartarus.network.compiled import Compiled
from tartarus.network.destinations import Address, HostNetworks, free_range, ways_out
from tartarus.network.families import V4, V6
from tartarus.network.ledger import Changes, Ledger
from tartarus.network.links import Links, Route, neighbour, route
from tartarus.network.router import HOST_6, LINK_6, ROUTER_6, Router
from tartarus.network.settings import NetworkSettings

_CONF = Path("/proc/sys/net/ipv4/conf")
_CONF_6 = Path("/proc/sys/net/ipv6/conf")
_DEFAULT_MTU = 1500
_SUBNET = 64
# Others can't be written into a rule as they are; links with such names stay closed.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.@+-]{1,15}")


class Host:
    """The host's side of one daemon's network. Its methods block; what they change is in the ledger before."""

    def __init__(self, state_dir: Path) -> None:
        # Names that can't meet those of a daemon with another state directory.
        digest = hashlib.sha256(os.fsencode(state_dir.absolute())).digest()
        tag = b32encode(digest)[:6].decode().lower()
        self.uplink = f"{rules.UPLINK_PREFIX}{tag}"
        self.table = f"tartarus_{tag}"
        self.networks = HostNetworks()
        self._ledger = Ledger(state_dir)
        self._lock: int | None = None
        self._changes: Changes | None = None
        self._links: Links | None = None
        # RFC 4193: 40 bits that nobody else has.
        self._site = IPv6Network((b"\xfd" + digest[-5:] + bytes(10), 48))
        self._ranges: tuple[IPv4Network, IPv6Network] | None = None
        self.why_not_6 = "no network of this host's was looked at yet"
        self._carries_6 = False
        self._fitting = threading.RLock()
        self._installed = ("", "")
        self._let: tuple[frozenset[IPv4Address], frozenset[IPv4Address]] = (frozenset(), frozenset())
        self._letting = threading.Lock()

    @property
    def links(self) -> Links:
        """The host's links; while it is open."""
        assert self._links is not None
        return self._links

    def clean(self) -> bool:
        """Put back what a killed daemon left, if one did. Raises InvalidState while another is at work."""
        if self._ledger.read() is None:
            return False
        self._lock = self._ledger.lock()
        self.close()
        return True

    def reserve(
        self, settings: NetworkSettings, name_servers: Iterable[IPv4Address]
    ) -> tuple[IPv4Network, IPv6Network]:
        """Clean up, write down what will be changed, and find addresses. Raises InvalidState, NoSpace, OSError."""
        self._lock = self._ledger.lock()
        self._undo()
        self._links = Links()
        routes = self._links.routes()
        found = free_range(settings.networks(), settings.prefix_length, _of(routes, 4), name_servers)
        found_6 = free_range([self._site], _SUBNET, _of(routes, 6), ())
        if not isinstance(found, IPv4Network) or not isinstance(found_6, IPv6Network):
            raise NoSpace(
                "no addresses are left for sandboxes' networks",
                why=f"the host has routes for all of {', '.join(settings.ranges)}",
                fix="choose another private range in the daemon's network settings",
            )
        self._ranges = (found, found_6)
        self._changes = Changes.here(self.table, self.uplink)
        self._ledger.write(self._changes)
        return self._ranges

    def mtu(self) -> int:
        """The least MTU in bytes of the ways out, so that packets need no cutting on the way."""
        ways = ways_out(self.links.routes())
        return min((link.mtu for link in self.links.all() if link.ifindex in ways), default=_DEFAULT_MTU)

    def connect(self, router: Router, mtu: int) -> None:
        """Join the router to the host, rules first. Raises Unsupported, OSError."""
        assert self._ranges is not None
        self.follow(router)
        router.connect(self.uplink, self.links, mtu)
        _write(_CONF_6 / self.uplink / "disable_ipv6", "1")
        for name, value in (("accept_redirects", "0"), ("send_redirects", "0"), ("accept_source_route", "0"),
                            ("rp_filter", "1"), ("forwarding", "1")):  # fmt: skip
            _write(_CONF / self.uplink / name, value)
        uplink = self.links.find(self.uplink)
        assert uplink is not None
        way = route(self._ranges[0], uplink.ifindex, router.gateway)
        self.links.bring_up(uplink.ifindex)
        self.links.configure(uplink.ifindex, IPv4Interface((router.host_address, 31)), (way,))
        router.wait_until_connected()
        self.follow(router)

    def carry_6(self, router: Router, contract: Compiled, *, has_address: bool) -> str:
        """Have the host carry IPv6 from now on, if a contract opens some of it to a slot that has an address of it.

        Returns why no packet of it passes; nothing if some do. Raises as `follow`.
        """
        if not contract.opens_6:
            return "the contract opens nothing of it"
        with self._fitting:
            if not self.why_not_6 and not has_address:
                return "the host could not carry it yet when the sandbox began"
            if not self.why_not_6 and not self._carries_6:
                self._carries_6 = True
                self.follow(router)
            return self.why_not_6

    def _connect_6(self, router: Router) -> None:
        """The way to the router and back, if it is not there yet, and forwards still. Raises OSError."""
        assert self._ranges is not None
        fresh = forwarding.read(f"{self.uplink}/disable_ipv6") == "1"
        forwarding.prepare(self.uplink)
        uplink = self.links.find(self.uplink)
        if fresh and uplink is not None:
            known = neighbour(ROUTER_6, uplink.ifindex, router.connect_6(uplink.hardware))
            way = route(self._ranges[1], uplink.ifindex, ROUTER_6)
            self.links.configure(uplink.ifindex, IPv6Interface((HOST_6, LINK_6)), (known, way))

    def let(self, address: IPv4Address, *, private: bool, metadata: bool) -> None:
        """Open to a slot, or close, what lies behind these doors; the router has doors of its own.

        Raises Unsupported, OSError.
        """
        with self._letting:
            wanted = tuple(
                those | {address} if opens else those - {address}
                for those, opens in zip(self._let, (private, metadata), strict=True)
            )
            if wanted != self._let:
                self._let = (wanted[0], wanted[1])
                nft.apply(self._openings(), self._lock)

    def _openings(self) -> str:
        """With the router's own address: what a slot may reach through the egress proxy comes from there."""
        assert self._ranges is not None
        network, network_6 = self._ranges
        opened = []
        for those in self._let:
            twins = {network_6[int(address) - int(network[0])] for address in those}
            opened.append(those | twins | {network[1]} if those else frozenset())
        return wall.host_openings(self.table, *opened)

    def follow(self, router: Router) -> bool:
        """Make the rules fit the host's routes and links of now, and stand; whether anything had to be changed.

        Raises Unsupported, OSError; then the rules may not stand, and the caller must `cut`.
        """
        with self._fitting:
            routes = self.links.routes()
            uplink = self.links.find(self.uplink)
            ours = [uplink.ifindex] if uplink is not None else []
            networks = HostNetworks.of(routes, except_links=ours)
            wanted = self._ways_to_open(_of(routes, 4), ours)
            wanted_6 = self._settings_6(_of(routes, 6), ours)
            changed = False
            if networks != self.networks:
                router.know(networks)
                self.networks = networks
                changed = True
            changed = self._stand(wanted, wanted_6) or changed
            self._forward_6(wanted_6, router)
            return changed

    def _settings_6(self, routes: list[Route], ours: list[int]) -> forwarding.Settings:
        """What has to be changed for IPv6, once a contract opens some of it."""
        assert self._changes is not None
        before = self._changes.settings_6
        self.why_not_6 = forwarding.why_not(routes, self.mtu())
        if self.why_not_6 or not self._carries_6:
            return before
        return forwarding.wanted(self._plain_names(ways_out(routes, except_links=ours)), before)

    def _forward_6(self, settings: forwarding.Settings, router: Router) -> None:
        """After the rules that hold it: a host that does not let itself be changed has no IPv6 for sandboxes."""
        if self.why_not_6 or not self._carries_6:
            return
        try:
            self._connect_6(router)
            forwarding.apply(settings)
        except OSError as error:
            self.why_not_6 = f"this host can't be made to forward it: {error}"

    def _plain_names(self, ways: set[int]) -> list[str]:
        return [link.name for link in self.links.all() if link.ifindex in ways and _PLAIN_NAME.fullmatch(link.name)]

    def _ways_to_open(self, routes: list[Route], ours: list[int]) -> tuple[str, ...]:
        """The links that must forward because of us. Whoever turns on forwarding for the whole host answers for it.

        A daemon beside us closes at its end what it opened before us. That is an event, and then we open it.
        """
        assert self._changes is not None
        if _read(_CONF / "all" / "forwarding") == "1":
            return ()
        names = self._plain_names(ways_out(routes, except_links=ours))
        closed = [name for name in names if _read(_CONF / name / "forwarding") == "0"]
        return tuple(sorted({*self._changes.opened, *closed}))

    def _stand(self, wanted: tuple[str, ...], wanted_6: forwarding.Settings) -> bool:
        """Have the table be as it should; the ledger first, then the rules, then the forwarding."""
        assert self._changes is not None
        assert self._ranges is not None
        guard_all = forwarding.forwards_all(wanted_6)
        text = wall.host_table(self.table, self.uplink, self._ranges, guard_all=guard_all)
        change = rules.replace(self.table, text) + rules.host_networks(self.table, self.networks)
        change += wall.opened(self.table, wanted, V4) + wall.opened(self.table, forwarding.guarded(wanted_6), V6)
        if (wanted, wanted_6) != (self._changes.opened, self._changes.settings_6):
            self._changes = msgspec.structs.replace(self._changes, opened=wanted, settings_6=wanted_6)
            self._ledger.write(self._changes)
        with self._letting:  # or what a slot was denied meanwhile would be put back
            change += self._openings()
            changed = self._installed != (change, nft.listing(self.table))
            if changed:
                nft.apply(change, self._lock)
                self._installed = (change, nft.listing(self.table))
        for name in wanted:
            _write(_CONF / name / "forwarding", "1")
        return changed

    def refuses(self, address: Address, contract: Compiled) -> str:
        """The reason why a slot with that contract may not reach `address`, whatever it names; nothing if it may."""
        if contract.denies(address):
            return "denied"
        reason = self.networks.refuses(address)
        if reason in {"private", "neighbour"} and not contract.deny_private:
            return ""
        return "" if reason == "metadata" and not contract.deny_metadata else reason

    def cut(self) -> None:
        """Take every sandbox off the network at once."""
        self.links.remove(self.uplink)

    def obstacles(self) -> list[str]:
        """Other programs' rules that refuse what they don't know, ours included; each in words, with what to do."""
        return nft.foreign_refusals(nft.as_json("list", "ruleset"), self.table, self.uplink)

    def close(self) -> None:
        """Put everything back. Safe to repeat, and in whatever state it is."""
        if self._links is not None:
            self._links.close()
            self._links = None
        if self._lock is not None:
            try:
                self._undo()
            finally:
                os.close(self._lock)
                self._lock = None
        self._changes = None
        self._installed = ("", "")
        self._let = (frozenset(), frozenset())
        self._carries_6 = False
        self.networks = HostNetworks()  # which the next router must be told of

    def _undo(self) -> None:
        changes = self._ledger.read()
        if changes is None:
            return
        if changes.is_here():
            links = Links()
            try:
                links.remove(changes.uplink)
            finally:
                links.close()
            # Closed again before the rules go that stood in for that.
            if _read(_CONF / "all" / "forwarding") == "0":
                for name in changes.opened:
                    _write(_CONF / name / "forwarding", "0")
            forwarding.undo(changes.settings_6)
            nft.apply(rules.remove(changes.table), self._lock)
        self._ledger.clear()


def _of(routes: Iterable[Route], version: int) -> list[Route]:
    return [route for route in routes if route.destination.version == version]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""  # the link has gone


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value, encoding="ascii")
    except FileNotFoundError:
        return  # the link has gone, or the kernel has no IPv6
