"""Attacks over the network and every kind of socket."""

from __future__ import annotations

import ctypes
import os
import socket
import struct

from tests.escape.arena import Arena, line_of
from tests.escape.attack import inside, shipped, staged
from tests.escape.kit import ESCAPED, WORLD, asked, call, outcome, told

from tartarus.model.sandbox import Isolation

_FAMILIES = range(64)
_ANSWER_S = 0.2


def _connect(family: int, address: object, kind: int = socket.SOCK_STREAM) -> str:
    def attempt() -> None:
        with socket.socket(family, kind) as sock:
            sock.settimeout(_ANSWER_S)
            sock.connect(address)  # type: ignore[arg-type]
            sock.sendall(b"x")

    return outcome(attempt)


@inside(
    "network/host-loopback",
    tries="connect to services on the host's loopback",
    container="ECONNREFUSED",
    process="EAFNOSUPPORT",
)
def host_loopback() -> dict[str, str]:
    ports = WORLD["ports"]
    found = {"TCP": _connect(socket.AF_INET, ("127.0.0.1", ports["tcp4"]))}
    found["TCP, any address"] = _connect(socket.AF_INET, ("0.0.0.0", ports["tcp4"]))
    found["TCP, other loopback address"] = _connect(socket.AF_INET, ("127.8.8.8", ports["tcp4"]))
    if "tcp6" in ports:
        found["TCP over IPv6"] = _connect(socket.AF_INET6, ("::1", ports["tcp6"]))
        found["TCP over mapped IPv6"] = _connect(socket.AF_INET6, ("::ffff:127.0.0.1", ports["tcp4"]))
    return found


@inside(
    "network/host-datagrams", tries="send datagrams to services on the host's loopback", container="unanswered|ECONNREFUSED",
    process="EAFNOSUPPORT",
)  # fmt: skip
def host_datagrams() -> str:
    def attempt() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("127.0.0.1", WORLD["ports"]["udp4"]))

    return outcome(attempt, succeeded="unanswered" if WORLD["level"] != "process" else ESCAPED)


@inside(
    "network/neighbour",
    tries="connect to the neighbour's services",
    container="ECONNREFUSED|ENOENT",
    process="EAFNOSUPPORT",
)
def neighbour() -> dict[str, str]:
    ports = WORLD["neighbour"]["ports"]
    found = {name: _connect(socket.AF_INET6 if name == "tcp6" else socket.AF_INET, ("::1" if name == "tcp6" else "127.0.0.1", port))
             for name, port in ports.items()}  # fmt: skip
    found["abstract"] = _connect(socket.AF_UNIX, "\0tartarus-neighbour")
    found["path"] = _connect(socket.AF_UNIX, WORLD["neighbour"]["home"] + "/neighbour.sock")
    return found


@inside(
    "network/outside", tries="reach cloud metadata, private networks, the internet and its names",
    container="ENETUNREACH|EACCES|EHOSTUNREACH", process="EAFNOSUPPORT",
)  # fmt: skip
def outside() -> dict[str, str]:
    addresses = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "10.0.0.1", "172.17.0.1", "192.168.0.1", "192.0.2.1",
                 "224.0.0.1", "255.255.255.255")  # fmt: skip
    found = {address: _connect(socket.AF_INET, (address, 80)) for address in addresses}
    for address in ("fd00:ec2::254", "2001:db8::1"):
        found[address] = _connect(socket.AF_INET6, (address, 80))
    found["name server"] = _connect(socket.AF_INET, ("10.0.0.53", 53), socket.SOCK_DGRAM)
    found["broadcast"] = _connect(socket.AF_INET, ("255.255.255.255", 67), socket.SOCK_DGRAM)
    return found


@inside(
    "network/raw", tries="send packets of its own making", container="EPERM|ESOCKTNOSUPPORT|EAFNOSUPPORT|EPROTONOSUPPORT",
    process="EAFNOSUPPORT",
)  # fmt: skip
def raw() -> dict[str, str]:
    kinds = {
        "IPv4": (2, 3, 255), "ICMP": (2, 3, 1), "IPv6": (10, 3, 255), "ICMPv6": (10, 3, 58), "packet": (17, 3, 0x0300),
        "packet datagram": (17, 2, 0x0300), "old packet": (2, 10, 0x0300), "raw with flags": (2, 3 | 0x80800, 6),
    }  # fmt: skip
    return {name: asked("socket", *arguments) for name, arguments in kinds.items()}


@inside(
    "network/ping",
    tries="send ICMP echo requests without privilege",
    container="EACCES|EPERM|ENETUNREACH",
    process="EAFNOSUPPORT",
)
def ping() -> dict[str, str]:
    return {name: asked("socket", family, 2, protocol) for name, family, protocol in (("IPv4", 2, 1), ("IPv6", 10, 58))}


@inside(
    "network/families", tries="open a socket of every other family", container="EAFNOSUPPORT", process="EAFNOSUPPORT",
    note="Among them vsock (40), crypto (38), XDP (44), Bluetooth (31), CAN (29), TIPC (30), RDS (21), SMC (43), KCM (41).",
)  # fmt: skip
def families() -> dict[str, str]:
    allowed = {1, 2, 10, 16} if WORLD["level"] != "process" else set()
    found: dict[str, str] = {}
    for family in _FAMILIES:
        if family not in allowed:
            for kind in (1, 2, 3, 5):
                found[f"family {family} kind {kind}"] = asked("socket", family, kind, 0)
    return found


@inside(
    "network/protocols",
    tries="open sockets of rare protocols",
    container="EPROTONOSUPPORT|ESOCKTNOSUPPORT",
    process="EAFNOSUPPORT",
)
def protocols() -> dict[str, str]:
    kinds = {
        "SCTP": (1, 132), "SCTP sequenced": (5, 132), "DCCP": (6, 33), "UDP-Lite": (2, 136), "MPTCP": (1, 262), "L2TP": (2, 115),
        "SMC": (1, 256), "IGMP": (2, 2), "GRE": (2, 47), "reliable": (4, 0), "any TCP number": (1, 255),
    }  # fmt: skip
    return {f"{name} over {family}": asked("socket", family, kind, protocol)
            for name, (kind, protocol) in kinds.items() for family in (2, 10)}  # fmt: skip


@inside(
    "network/netlink", tries="talk to the kernel over netlink: firewall, audit, crypto, events, SELinux, SCSI",
    container="EPROTONOSUPPORT", process="EAFNOSUPPORT",
)  # fmt: skip
def netlink() -> dict[str, str]:
    return {f"protocol {protocol}": asked("socket", 16, 3, protocol) for protocol in range(1, 32)}


@inside("network/routes", tries="make network devices, addresses and routes", container="EPERM", process="EAFNOSUPPORT")
def routes() -> dict[str, str]:
    def request(kind: int, body: bytes) -> str:
        def attempt() -> None:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
                sock.settimeout(2)
                # NLM_F_REQUEST, ACK, CREATE, EXCL
                sock.send(struct.pack("<IHHII", 16 + len(body), kind, 0x605, 1, 0) + body)
                answer = sock.recv(4096)
                number = struct.unpack_from("<i", answer, 16)[0]
                if number:
                    raise OSError(-number, "refused")

        return outcome(attempt)

    link = (
        struct.pack("<BxHiII", 0, 0, 0, 0, 0) + struct.pack("<HH", 16, 18) + struct.pack("<HH6sxx", 10, 1, b"dummy\0")
    )
    address = struct.pack("<BBBBI", 2, 24, 0, 0, 1) + struct.pack("<HH4s", 8, 2, b"\x0a\0\0\x02")
    route = struct.pack("<BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 1, 0) + struct.pack("<HHI", 8, 4, 1)
    return {"device": request(16, link), "address": request(20, address), "route": request(24, route)}


@inside(
    "network/devices", tries="find a network device that leads out, and set up loopback anew", container="only loopback|EPERM",
    process="EAFNOSUPPORT",
)  # fmt: skip
def devices() -> dict[str, str]:
    def control(request: int, body: bytes) -> str:
        def attempt() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                call("ioctl", sock.fileno(), request, body)

        return outcome(attempt)

    answer, found = told(socket.if_nameindex, succeeded="only loopback")
    names = {name for _, name in found or ()}
    tunnels = {"lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"}
    return {
        "names": ESCAPED if names - tunnels else answer,
        "down": control(0x8914, struct.pack("16sH22x", b"lo", 0)),
        "address": control(0x8916, struct.pack("16sHH4s16x", b"lo", 2, 0, b"\x0a\0\0\x01")),
        "bridge": control(0x89A0, b"mine\0" + bytes(27)),
        "route": control(0x890B, bytes(120)),
        "queue length": control(0x8943, struct.pack("16si20x", b"lo", 1)),
    }


@inside(
    "network/abstract", tries="connect to the host's sockets in the abstract namespace", container="ECONNREFUSED",
    process="EAFNOSUPPORT|EPERM",
)  # fmt: skip
def abstract() -> dict[str, str]:
    return {
        "stream": _connect(socket.AF_UNIX, WORLD["abstract"]),
        "datagram": _connect(socket.AF_UNIX, WORLD["abstract"], socket.SOCK_DGRAM),
    }


@inside(
    "network/path-sockets", tries="connect to the host's sockets in the file system, such as Docker's and the daemon's own",
    container="ENOENT", process="EAFNOSUPPORT|EPERM",
)  # fmt: skip
def path_sockets() -> dict[str, str]:
    found = {path: _connect(socket.AF_UNIX, path) for path in WORLD["sockets"]}
    found["datagram"] = _connect(socket.AF_UNIX, WORLD["datagram"], socket.SOCK_DGRAM)
    os.symlink(WORLD["sockets"][0], "door")
    found["by symlink"] = _connect(socket.AF_UNIX, "door")
    return found


@inside(
    "network/paired-sockets", tries="reach the host's sockets from one end of a pair, which needs no socket call",
    container="ENOENT|EISCONN|ECONNREFUSED|ENOTCONN|quiet|EINVAL", process="EPERM|EISCONN|ESOCKTNOSUPPORT|quiet",
    note="Quiet: the address was ignored, because the pair is connected; the doors then show that nobody came.",
)  # fmt: skip
def paired_sockets() -> dict[str, str]:
    found = {}
    for name, kind in (("stream", 1), ("datagram", 2), ("sequenced", 5)):
        fds = (ctypes.c_int * 2)()
        answer = asked("socketpair", 1, kind, 0, fds)
        if answer != ESCAPED:
            found[name] = answer
            continue
        # The other end stays open, or sending would fail for another reason.
        first, second = (socket.socket(fileno=fd) for fd in fds)
        for target in (WORLD["sockets"][0], WORLD["datagram"], WORLD["abstract"]):
            found[f"{name}: connect {target!r}"] = outcome(first.connect, target)
            found[f"{name}: send to {target!r}"] = outcome(first.sendto, b"x", target, succeeded="quiet")
            found[f"{name}: message to {target!r}"] = outcome(first.sendmsg, [b"x"], [], 0, target, succeeded="quiet")
        first.close()
        second.close()
    return found


@inside(
    "network/other-pairs", tries="make pairs of sockets of other families", container="EAFNOSUPPORT|ESOCKTNOSUPPORT",
    process="EAFNOSUPPORT|ESOCKTNOSUPPORT",
)  # fmt: skip
def other_pairs() -> dict[str, str]:
    return {f"family {family}": asked("socketpair", family, 1, 0, bytes(8)) for family in _FAMILIES if family != 1}


@inside(
    "network/options", tries="attach filters, firewalls and other protocols to sockets",
    container="EPERM|ENOPROTOOPT|EACCES|EINVAL|ENODEV|ENOENT", process="EAFNOSUPPORT",
)  # fmt: skip
def options() -> dict[str, str]:
    accept_all = struct.pack("<HBBI", 6, 0, 0, 0xFFFFFFFF)
    kept = ctypes.create_string_buffer(accept_all, len(accept_all))
    address = ctypes.addressof(kept)
    filter_ = struct.pack("<HxxxxxxQ", 1, address)

    def option(kind: int, level: int, name: int, value: bytes, family: int = 2) -> str:
        def attempt() -> None:
            with socket.socket(family, kind) as sock:
                sock.setsockopt(level, name, value)

        return outcome(attempt)

    number = struct.pack("<i", 1)
    return {
        "filter": option(2, 1, 26, filter_),
        "bpf": option(2, 1, 50, number),
        "filter for a group": option(2, 1, 51, filter_),
        "bpf for a group": option(2, 1, 52, number),
        "kernel TLS": option(1, 6, 31, b"tls"),
        "TCP repair": option(1, 6, 19, number),
        "congestion control module": option(1, 6, 13, b"no-such-module"),
        "mark": option(2, 1, 36, number),
        "force a buffer": option(2, 1, 33, number),
        "debug": option(2, 1, 1, number),
        "transparent": option(2, 0, 19, number),
        "IPv4 firewall": option(2, 0, 64, bytes(96)),
        "IPv4 counters": option(2, 0, 65, bytes(96)),
        "ARP firewall": option(2, 0, 96, bytes(96)),
        "bridge firewall": option(2, 0, 128, bytes(96)),
        "IPv6 firewall": option(2, 41, 64, bytes(96), 10),
    }


def _serve() -> None:
    server = socket.create_server(("0.0.0.0", 0))
    os.write(1, b"%d\n" % server.getsockname()[1])
    server.settimeout(20)
    server.accept()


@staged("network/serve", tries="offer a service that the host or a neighbour can reach", container="unreachable")
async def serve(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await arena.sandbox(level)
    port = int(await line_of(await arena.start(sandbox, shipped(_serve) + "\n_serve()\n")))
    found = {}
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as client:
            found[address] = outcome(client.connect, (address, port)).replace("ECONNREFUSED", "unreachable")
    await sandbox.kill()
    return found
