"""The network link of a guest that is restored: handed to its kernel as runsc's commands hand one to a new guest."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Any

from tartarus.network import namespace
from tartarus.network.links import Network
from tartarus.network.router import GUEST_LINK, NEXT_HOP_HARDWARE
from tartarus.runtimes.base import Wire

_GET_HARDWARE, _SET_ADDRESS = 0x8927, 0x8916
_NO_IPV6 = Path(f"/proc/sys/net/ipv6/conf/{GUEST_LINK}/disable_ipv6")
_EVERYTHING = 3  # ETH_P_ALL
_SET_BUFFERS = (32, 33)  # SO_SNDBUFFORCE, SO_RCVBUFFORCE: more than others may ask for, as runsc does
_BUFFER_BYTES = 4 * 1024 * 1024
_REQUEST = struct.Struct("16sHH4s16x")


def take_over(wire: Wire, before: Sequence[str] = ()) -> tuple[int, dict[str, Any]]:
    """A socket for all packets of the link in `wire`'s namespace, the caller's, and what its guest's kernel is told.

    This host's kernel gives the addresses up there, so that it answers nothing in the guest's place. `before`: further
    addresses that the guest has on it for a moment. Nothing comes by them: the router lets only the wire's own pass.
    Raises OSError.
    """

    def inside() -> tuple[socket.socket, bytes]:
        name = GUEST_LINK.encode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asked:
            hardware = fcntl.ioctl(asked, _GET_HARDWARE, _REQUEST.pack(name, 0, 0, bytes(4)))[18:24]
            # The routes go with the last address.
            fcntl.ioctl(asked, _SET_ADDRESS, _REQUEST.pack(name, socket.AF_INET, 0, bytes(4)))
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            _NO_IPV6.write_text("1", encoding="ascii")
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC), hardware

    packets, hardware = namespace.run_in(wire.file, inside)
    try:
        for option in _SET_BUFFERS:
            packets.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        packets.bind((GUEST_LINK, _EVERYTHING))
    except BaseException:
        packets.close()
        raise
    return packets.detach(), _description(wire, hardware, before)


def _description(wire: Wire, hardware: bytes, before: Sequence[str]) -> dict[str, Any]:
    # The first of a family is what new connections come from.
    own = [ip_address(one) for one in (*wire.addresses, *before)]
    addresses = [{"Address": str(one), "PrefixLen": one.max_prefixlen} for one in own]
    next_hop = base64.b64encode(NEXT_HOP_HARDWARE).decode()
    link = {
        "Name": GUEST_LINK,
        "MTU": wire.mtu,
        "Addresses": addresses,
        "Routes": [{"Destination": _network(IPv4Network(wire.gateway)), "Gateway": ""}],
        "Neighbors": [{"IP": str(one), "HardwareAddr": next_hop} for one in (wire.gateway, wire.gateway_6) if one],
        "RXChecksumOffload": True,  # packets of this host's own have no checksum yet
        "LinkAddress": base64.b64encode(hardware).decode(),
        "NumChannels": 1,
    }
    described: dict[str, Any] = {
        "FDBasedLinks": [link],
        "Defaultv4Gateway": _default(IPv4Network((0, 0)), str(wire.gateway)),
        # When it is saved its connections end; else it could not be saved while there is one.
        "DisconnectOk": True,
    }
    if any(one.version == 6 for one in own):
        described["Defaultv6Gateway"] = _default(IPv6Network((0, 0)), str(wire.gateway_6))
    return described


def _default(everywhere: Network, gateway: str) -> dict[str, Any]:
    return {"Route": {"Destination": _network(everywhere), "Gateway": gateway}, "Name": GUEST_LINK}


def _network(network: Network) -> dict[str, str]:
    return {"IP": str(network.network_address), "Mask": base64.b64encode(network.netmask.packed).decode()}
