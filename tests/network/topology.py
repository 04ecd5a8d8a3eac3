"""A small world of network namespaces: a host with two networks, and an Internet behind one of them.

    guest …… [slots] host ── eth0 198.51.100.10 ── 198.51.100.1 internet: 203.0.113.80, 10.9.9.9, 169.254.169.254 …
                      └──── eth1 192.0.2.10 ────── 192.0.2.50 lan

Every address of the Internet answers, the private ones too: the host has a way there, and only rules stand between.
A test's guests are namespaces in which the test is root, so they can do more than any sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tests.network.servers import NAME_SERVER, NameServer, Server, Sniffer, family_of

from tartarus.model.contract import OPEN, Contract
from tartarus.network import namespace
from tartarus.network.compiled import compiled
from tartarus.network.links import End, Links, route
from tartarus.network.pool import SlotPool
from tartarus.network.settings import NetworkSettings
from tartarus.network.slot import Slot
from tartarus.node.egress import launch

PUBLIC = "203.0.113.80"
HOST = "198.51.100.10"
ROUTER_OF_THE_HOST = "198.51.100.1"
NEIGHBOUR = "192.0.2.50"
PRIVATE = ("10.9.9.9", "172.16.9.9", "192.168.77.7", "100.64.1.1")
METADATA = ("169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200")
PUBLIC_6 = "2001:db8:80::80"
HOST_6 = "2001:db8:10::10"
ROUTER_OF_THE_HOST_6 = "2001:db8:10::1"
NEIGHBOUR_6 = "2001:db8:20::50"
PRIVATE_6 = ("fd12:3456::1", "fec0::9")
METADATA_6 = ("fd00:ec2::254", "fd20:ce::254")
RESERVED_6 = ("64:ff9b::a09:909", "2002:a09:909::1", "64:ff9b:1::a09:909")
INTERNET_6 = (PUBLIC_6, *PRIVATE_6, *METADATA_6, *RESERVED_6)
INTERNET = (PUBLIC, NAME_SERVER, *PRIVATE, *METADATA, "198.18.0.5", "192.0.0.9", "240.0.0.5")
PORT = 80
EVERYWHERE = IPv4Network("0.0.0.0/0")
T = TypeVar("T")


class _Closes(Protocol):
    def close(self) -> None: ...


Closing = TypeVar("Closing", bound=_Closes)


class Guest:
    """A sandbox's network namespace, with a slot or without."""

    def __init__(self) -> None:
        self.namespace = namespace.create()
        self.slot: Slot | None = None
        self.hardware: bytes | None = None

    def run(self, work: Callable[[], T]) -> T:
        return namespace.run_in(self.namespace, work)

    def ask(self, address: str, port: int = PORT, patience_s: float = 5.0) -> str:
        """What a TCP server there says; or the error's name."""

        def connect() -> str:
            try:
                with socket.create_connection((address, port), timeout=patience_s) as connection:
                    return connection.recv(100).decode()
            except OSError as error:
                return type(error).__name__ if error.errno is None else os.strerror(error.errno)

        return self.run(connect)

    def send(self, address: str, port: int, data: bytes) -> str:
        """Send a datagram, as far as the kernel lets it go; the error, if there is one at once."""

        def datagram() -> str:
            with socket.socket(family_of(address), socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                try:
                    sock.sendto(data, (address, port))
                except OSError as error:
                    return str(error)
                return ""

        return self.run(datagram)

    def exchange(self, address: str, port: int, data: bytes, patience_s: float = 3.0) -> bytes:
        """The datagram that answers one; nothing if none comes, or it is refused."""

        def both() -> bytes:
            with socket.socket(family_of(address), socket.SOCK_DGRAM) as sock:
                sock.settimeout(patience_s)
                try:
                    sock.connect((address, port))
                    sock.send(data)
                    return sock.recv(65536)
                except OSError:
                    return b""

        return self.run(both)

    def shell(self, *command: str) -> str:
        return self.run(lambda: subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.namespace)
        self.namespace = -1


class World:
    """All of it. `run` is where the code under test runs: in the host."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.host, self.internet, self.lan = namespace.create(), namespace.create(), namespace.create()
        self.marks = (f"mark-{number}-{os.urandom(6).hex()}".encode() for number in itertools.count())
        self._closing = contextlib.ExitStack()
        for file in (self.host, self.internet, self.lan):
            self._closing.callback(os.close, file)
        namespace.run_in(self.host, self._build_host)
        namespace.run_in(self.internet, lambda: _far("198.51.100.1/24", [f"{address}/32" for address in INTERNET]))
        namespace.run_in(self.lan, lambda: _far(f"{NEIGHBOUR}/24", [], "192.0.2.10"))
        namespace.run_in(self.host, lambda: _wait_for_links("eth0", "eth1"))
        for where in (self.internet, self.lan):
            namespace.run_in(where, lambda: _wait_for_links("wan0"))
        self.serve(self.internet)
        self.serve(self.internet, kind=socket.SOCK_DGRAM, address=PUBLIC)
        self.serve(self.internet, 853)
        self.serve(self.lan)
        self.serve(self.host, 8080)
        self.host_datagrams = self.serve(self.host, 8081, socket.SOCK_DGRAM)
        self.names = NameServer(self.internet, {"public.example": [PUBLIC]})
        self._closing.callback(self.names.close)

    def _build_host(self) -> None:
        links = Links()
        links.add_pair(End("eth0", 10), End("wan0", 10), self.internet, 1500)
        links.add_pair(End("eth1", 11), End("wan0", 10), self.lan, 1500)
        # As a host is that never forwarded anything: a new namespace may have taken over what this machine does.
        for path in Path("/proc/sys/net/ipv4/conf").glob("*/forwarding"):
            path.write_text("0")
        links.bring_up(1)
        way = route(EVERYWHERE, 10, IPv4Address(ROUTER_OF_THE_HOST))
        links.bring_up(10)
        links.configure(10, IPv4Interface(f"{HOST}/24"), (way,))
        links.bring_up(11)
        links.configure(11, IPv4Interface("192.0.2.10/24"))
        links.close()

    def join_ipv6(self, *, default_route: bool = True) -> None:
        """Give all of it IPv6 as well; every address of the Internet answers."""

        def run(where: int, *commands: str) -> None:
            def work() -> None:
                for command in commands:
                    subprocess.run(command.split(), check=True, timeout=20)

            namespace.run_in(where, work)

        add = "ip address add {}/{} dev {} nodad"
        run(self.internet, add.format(ROUTER_OF_THE_HOST_6, 64, "wan0"),
            *(add.format(address, 128, "lo") for address in INTERNET_6))  # fmt: skip
        run(self.lan, add.format(NEIGHBOUR_6, 64, "wan0"), "ip -6 route add default via 2001:db8:20::10")
        run(self.host, add.format(HOST_6, 64, "eth0"), add.format("2001:db8:20::10", 64, "eth1"))
        if default_route:
            run(self.host, f"ip -6 route add default via {ROUTER_OF_THE_HOST_6}")
        self.serve(self.internet, address="::")
        self.serve(self.internet, kind=socket.SOCK_DGRAM, address=PUBLIC_6)
        self.serve(self.lan, address="::")
        self.serve(self.host, 8080, address="::")

    def join_family_of(self, address: str) -> None:
        """Give it IPv6, if that address is one."""
        if ":" in address:
            self.join_ipv6()

    def serve(self, where: int, port: int = PORT, kind: int = socket.SOCK_STREAM, address: str = "0.0.0.0") -> Server:
        server = Server(where, port, kind, address)
        self._closing.callback(server.close)
        return server

    def sniff(self, where: int) -> Sniffer:
        sniffer = Sniffer(where)
        self._closing.callback(sniffer.close)
        return sniffer

    def keep(self, server: Closing) -> Closing:
        """Close it at the end."""
        self._closing.callback(server.close)
        return server

    def mark(self) -> bytes:
        return next(self.marks)

    def guest(self) -> Guest:
        guest = Guest()
        self._closing.callback(guest.close)
        return guest

    def in_host(self, work: Callable[[], T]) -> T:
        return namespace.run_in(self.host, work)

    def run(self, scenario: Callable[[], Awaitable[T]]) -> T:
        async def main() -> T:
            return await scenario()

        return self.in_host(lambda: asyncio.run(main()))

    def shell(self, *command: str) -> str:
        return self.in_host(
            lambda: subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        )

    def forwarding(self, link: str) -> str:
        return self.in_host(lambda: Path(f"/proc/sys/net/ipv4/conf/{link}/forwarding").read_text().strip())

    def forwarding_6(self, name: str = "all/forwarding") -> str:
        """A setting of the host's for IPv6; `force_forwarding` forwards from one link."""
        return self.in_host(lambda: Path(f"/proc/sys/net/ipv6/conf/{name}").read_text().strip())

    def pool(self, **settings: Any) -> SlotPool:
        return SlotPool(self.state_dir, NetworkSettings(name_servers=(NAME_SERVER,), **settings), launch)

    def traces(self) -> list[str]:
        """What a network of ours has left in the host."""
        links = [name for name in self.in_host(_link_names) if name not in {"lo", "eth0", "eth1"}]
        tables = [line for line in self.shell("nft", "list", "tables").splitlines() if "tartarus" in line]
        open_links = [link for link in ("eth0", "eth1", "all") if self.forwarding(link) != "0"]
        names = ("all/forwarding", "default/forwarding", "eth0/forwarding", "eth0/force_forwarding",
                 "eth1/force_forwarding", "all/force_forwarding")  # fmt: skip
        open_links += [name for name in names if self.forwarding_6(name) != "0"]
        everywhere = self.shell("ip", "route") + self.shell("ip", "-6", "route")
        routes = [line for line in everywhere.splitlines() if " eth" not in line]
        ledger = ["ledger"] if (self.state_dir / "network.json").exists() else []
        return links + tables + open_links + routes + ledger

    def close(self) -> None:
        self._closing.close()


@contextlib.contextmanager
def world(state_dir: Path) -> Iterator[World]:
    made = World(state_dir)
    try:
        yield made
    finally:
        made.close()


@contextlib.asynccontextmanager
async def joined(pool: SlotPool, *guests: Guest, contract: Contract = OPEN) -> Any:
    """Guests on the network, each held to that contract, and off it again."""
    try:
        for guest in guests:
            guest.slot = await pool.take(compiled(contract))
            await pool.attach(guest.slot, guest.namespace)
        yield pool
    finally:
        for guest in guests:
            if guest.slot is not None:
                await pool.give_back(guest.slot)
        await pool.close()


def written(address: str) -> str:
    """An address as a grant has it before its ports."""
    return f"[{address}]" if ":" in address else address


async def off(work: Callable[[], T]) -> T:
    """Run a guest's blocking work beside the loop, which serves names meanwhile."""
    return await asyncio.to_thread(work)


def _far(own: str, others: list[str], gateway: str | None = None) -> None:
    links = Links()
    links.bring_up(1)
    ways = (route(EVERYWHERE, 10, IPv4Address(gateway)),) if gateway else ()
    links.bring_up(10)
    links.configure(10, IPv4Interface(own), ways)
    for address in others:
        subprocess.run(["ip", "address", "add", address, "dev", "lo"], check=True, timeout=20)
    links.close()


def _wait_for_links(*names: str) -> None:
    links = Links()
    for name in names:
        links.wait_until_working(name)
    links.close()


def _link_names() -> list[str]:
    links = Links()
    try:
        return [link.name for link in links.all()]
    finally:
        links.close()
