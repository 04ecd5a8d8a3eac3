"""Network contracts (Styx): what one sandbox may reach, sworn when it starts. A change is a new contract.

Nothing is allowed that a contract does not name, and what it denies goes over what it allows. Some destinations stay
closed whatever it says: the host, other sandboxes, loopback, link-local, multicast and reserved addresses, and name
servers other than the node's.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import msgspec

from tartarus.model.checks import require
from tartarus.model.errors import InvalidRequest

MAX_PORT = 65535
HTTP_PORT, HTTPS_PORT = 80, 443
MAX_NETWORKS = 256
MAX_DOMAINS = 256
MAX_PORTS = 64
"""Of one grant; a contract has at most `MAX_GRANTS` of these."""
MAX_GRANTS = 256
MAX_PUBLISHED = 64
MAX_RATE = 10**12
_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_DOMAIN = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*\.?")
_MAX_NAME = 253
_AS_IN = "write it like 203.0.113.0/24, 2001:db8::/32, example.org or *.example.org"
_ONLY_DOMAINS = "leave out direct: networks are reached directly anyway"
_DIRECT = "/direct"

Network = IPv4Network | IPv6Network


class RateLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that may pass in each direction, in a second. `burst_bytes`: at once; a fifth of a second's if 0."""

    bytes_per_s: int = 0
    packets_per_s: int = 0
    burst_bytes: int = 0

    def __post_init__(self) -> None:
        for name, value in msgspec.structs.asdict(self).items():
            require(0 <= value <= MAX_RATE, f"rate_limit.{name} is out of range", f"use 0 (no limit) to {MAX_RATE}")
        slow = 0 < self.bytes_per_s < 1500
        require(not slow, f"rate_limit.bytes_per_s is {self.bytes_per_s}", "give at least 1500, which is one packet")


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One destination and its ports. Without ports it is all of them.

    A network is open to TCP and UDP, and to echo requests at all ports. A domain is reached through the egress proxy,
    as TLS or HTTP for that very name; `direct`: past it, with any protocol, and whatever else has its addresses.
    """

    to: str
    ports: tuple[int, ...] = ()
    direct: bool = False

    def __post_init__(self) -> None:
        check_ports(self.ports, f"the ports of {self.to}")
        if self.network is None:
            check_domain(self.to)
        require(not (self.direct and self.network is not None), f"{self.to} is no domain, and direct", _ONLY_DOMAINS)

    @property
    def network(self) -> Network | None:
        """The network it names; None when it names a domain. Raises InvalidRequest."""
        if "/" in self.to or ":" in self.to or self.to.replace(".", "").isdigit():
            return parse_network(self.to)
        return None


class Publish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A port of the sandbox's shown on the host at `address`. `port` 0 takes a free one."""

    guest: int
    port: int = 0
    address: str = "127.0.0.1"

    def __post_init__(self) -> None:
        check_ports((self.guest,), "publish")
        require(0 <= self.port <= MAX_PORT, f"publish: {self.port} is no port", "use 0 to 65535")
        try:
            ip_address(self.address)
        except ValueError:
            raise InvalidRequest(f"publish: {self.address!r} is no address", fix="use one like 127.0.0.1") from None


class Contract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of one contract; see docs/network.md.

    `allowed_cidrs` and `allowed_domains` are open at `allowed_ports`, at all ports when there are none; `grants` have
    ports of their own. `deny_private` closes private addresses and the host's neighbours, `deny_metadata` the metadata
    services of clouds: with either off, they still take a network that names them, and a policy that lets them be
    opened. `deny_dns`: names don't resolve. `exposed_ports`: which of its ports its owner may have carried to him;
    None is any.
    """

    allowed_cidrs: tuple[str, ...] = ()
    denied_cidrs: tuple[str, ...] = ()
    allowed_domains: tuple[str, ...] = ()
    allowed_ports: tuple[int, ...] = ()
    grants: tuple[Grant, ...] = ()
    deny_private: bool = True
    deny_metadata: bool = True
    deny_dns: bool = False
    rate_limit: RateLimit | None = None
    max_connections: int | None = None
    new_connections_per_s: int | None = None
    exposed_ports: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, most in (("allowed_cidrs", MAX_NETWORKS), ("denied_cidrs", MAX_NETWORKS),
                           ("allowed_domains", MAX_DOMAINS), ("grants", MAX_GRANTS)):  # fmt: skip
            count = len(getattr(self, name))
            require(count <= most, f"the contract's {name} has {count} members", f"use at most {most}")
        for text in (*self.allowed_cidrs, *self.denied_cidrs):
            parse_network(text)
        for text in self.allowed_domains:
            check_domain(text)
        check_ports(self.allowed_ports, "allowed_ports")
        check_ports(self.exposed_ports or (), "exposed_ports")
        for name in ("max_connections", "new_connections_per_s"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 10**6, f"the contract's {name} is {value}", "use 1 to 1000000")
        names = self.allowed_domains or any(grant.network is None for grant in self.grants)
        require(not (names and self.deny_dns), "the contract allows domains and denies DNS",
                "leave out deny_dns: a domain is opened when it is asked for")  # fmt: skip

    def networks(self) -> list[tuple[Network, tuple[int, ...]]]:
        """Every network that it allows, with its ports; what it denies is still in them."""
        found = [(parse_network(text), self.allowed_ports) for text in self.allowed_cidrs]
        return found + [(net, grant.ports) for grant in self.grants if (net := grant.network) is not None]

    def denied(self) -> list[Network]:
        """Every network that it denies."""
        return [parse_network(text) for text in self.denied_cidrs]

    def domains(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every domain that it allows, with its ports; ``*.`` for all below one."""
        found = [(normal(text), self.allowed_ports) for text in self.allowed_domains]
        return found + [(normal(grant.to), grant.ports) for grant in self.grants if grant.network is None]

    def direct_domains(self) -> list[tuple[str, tuple[int, ...]]]:
        """Those of `domains` that are reached past the egress proxy."""
        return [(normal(grant.to), grant.ports) for grant in self.grants if grant.direct]

    def exposes(self, port: int) -> bool:
        """Whether its owner may have that port of the sandbox's carried to him."""
        return self.exposed_ports is None or port in self.exposed_ports


class NetworkState(msgspec.Struct, frozen=True):
    """A live sandbox's network. Without one, `contract` is None.

    `counters`: packets refused (``refused_REASON``), questions (``dns_…``), connections `opened`, packets and bytes
    sent and received. `published`: its ports that the host shows. `address_6`: of IPv6, where the host can carry that;
    `why_not_6`: why no packet of it passes, if none does.
    """

    contract: Contract | None = None
    address: str = ""
    counters: dict[str, int] = {}
    published: tuple[Publish, ...] = ()
    address_6: str = ""
    why_not_6: str = ""


def parse_network(text: str) -> Network:
    """A network, or one address. Raises InvalidRequest."""
    try:
        return ip_network(text)
    except ValueError as error:
        raise InvalidRequest(f"{text!r} is no network", why=str(error), fix=_AS_IN) from None


def check_domain(text: str) -> None:
    """Refuse what is no domain, in the letters that DNS has."""
    plain = text.lower()
    good = bool(_DOMAIN.fullmatch(plain)) and len(plain) <= _MAX_NAME and "." in plain.removeprefix("*.").rstrip(".")
    require(good, f"{text!r} is no domain that can be allowed", _AS_IN)


def normal(domain: str) -> str:
    """A domain as names are compared: small letters, no dot at its end."""
    return domain.lower().rstrip(".")


def check_ports(ports: tuple[int, ...], what: str) -> None:
    """Refuse numbers that are no ports, and more of them than a grant may have."""
    require(len(ports) <= MAX_PORTS, f"{what}: {len(ports)} are too many", f"use at most {MAX_PORTS}, or none for all")
    for port in ports:
        require(0 < port <= MAX_PORT, f"{what}: {port} is no port", "use 1 to 65535")


def parse_allow(text: str) -> Grant:
    """Read ``example.org:443``, ``203.0.113.0/24:80,443``, ``[2001:db8::/32]:443``; all ports if none is given.

    With ``/direct`` at the end (``git.example.org:22/direct``) a domain is reached past the egress proxy.
    """
    whole, direct = text, text.endswith(_DIRECT)
    text = text.removesuffix(_DIRECT)
    if text.startswith("["):
        to, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise _not_allowed(whole)
        ports = rest[1:]
    elif text.count(":") > 1:  # IPv6 without ports
        to, ports = text, ""
    else:
        to, colon, ports = text.partition(":")
        if colon and not ports:
            raise _not_allowed(whole)
    try:
        return Grant(to=to, ports=tuple(int(port) for port in ports.split(",")) if ports else (), direct=direct)
    except ValueError:
        raise _not_allowed(whole) from None


def parse_publish(text: str) -> Publish:
    """Read ``[IP:]HOST:GUEST``, as in ``8080:80``; HOST 0 takes a free port."""
    where, _, guest = text.rpartition(":")
    address, _, port = where.rpartition(":")
    address = address.removeprefix("[").removesuffix("]")
    if not (guest.isdecimal() and port.isdecimal() and guest.isascii() and port.isascii()):
        raise InvalidRequest(f"{text!r} publishes no port", fix="write it like 8080:80 or 127.0.0.1:8080:80")
    return Publish(guest=int(guest), port=int(port), address=address or "127.0.0.1")


def _not_allowed(text: str) -> InvalidRequest:
    return InvalidRequest(f"{text!r} allows nothing", fix="write it like example.org:443 or 203.0.113.0/24:80,443")


OPEN = Contract(allowed_cidrs=("0.0.0.0/0", "::/0"))
"""What `network: open` swears: every public address."""
