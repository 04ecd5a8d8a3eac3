"""What the router's packet filter has counted, and its memory of connections (nfnetlink, see linux/netfilter/*.h)."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from tartarus.network.links import Traffic
from tartarus.network.netlink import NETLINK_NETFILTER, NetlinkSocket, Request, attribute, attributes, text
from tartarus.network.rules import OPENED_SET, REASONS, REFUSED_SET, ROUTER_TABLE, slot_link

_NFPROTO_INET = 1
_HEADER = struct.Struct(">BBH")  # family, version, resource

_NFTABLES = 10 << 8
_GETSETELEM = _NFTABLES | 13
_ELEM_TABLE, _ELEM_SET, _ELEM_LIST = 1, 2, 3
_LIST_ELEM = 1
_KEY, _EXPRESSION = 1, 7
_VALUE = 1
_EXPR_NAME, _EXPR_DATA = 1, 2
_COUNTER_PACKETS = 2

_CONNTRACK = 1 << 8
_CT_DELETE = _CONNTRACK | 2
_CTA_MARK, _CTA_MARK_MASK = 8, 21

_NAME_BYTES = 16  # IFNAMSIZ, the first part of every key


class Counted(NamedTuple):
    """Packets of each (link, reason) that were refused, and each link's connections that were opened."""

    refused: dict[tuple[str, str], int]
    opened: dict[str, int]


class Tracking:
    """The packet filter of the network namespace of the thread that makes this; any thread may use it then."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)

    def close(self) -> None:
        """Close it; safe to repeat."""
        self._netlink.close()

    def counted(self) -> Counted:
        """Everything counted since the table was installed. Raises OSError."""
        refused = {}
        for key, packets in self._elements(REFUSED_SET):
            mark = struct.unpack_from("=I", key, _NAME_BYTES)[0]
            refused[_name(key), REASONS[mark - 1]] = packets
        return Counted(refused, {_name(key): packets for key, packets in self._elements(OPENED_SET)})

    def forget(self, mark: int, mask: int = 0xFFFFFFFF) -> None:
        """Forget every connection with that mark (by `mask`): nothing of it passes any more. Raises OSError."""
        body = _HEADER.pack(socket.AF_UNSPEC, 0, 0)
        body += attribute(_CTA_MARK, struct.pack(">I", mark)) + attribute(_CTA_MARK_MASK, struct.pack(">I", mask))
        self._netlink.do(Request(_CT_DELETE, 0, body))

    def _elements(self, name: str) -> list[tuple[bytes, int]]:
        body = _HEADER.pack(_NFPROTO_INET, 0, 0) + text(_ELEM_TABLE, ROUTER_TABLE) + text(_ELEM_SET, name)
        found = []
        for message in self._netlink.dump(Request(_GETSETELEM, 0, body)):
            for kind, value in attributes(message.body[_HEADER.size :]):
                if kind == _ELEM_LIST:
                    found += [_element(element) for inner, element in attributes(value) if inner == _LIST_ELEM]
        return found


def _element(data: bytes) -> tuple[bytes, int]:
    key, packets = b"", 0
    for kind, value in attributes(data):
        if kind == _KEY:
            key = dict(attributes(value))[_VALUE]
        elif kind == _EXPRESSION:
            packets = _packets(value)
    return key, packets


def _packets(expression: bytes) -> int:
    parts = dict(attributes(expression))
    if parts.get(_EXPR_NAME) != b"counter\0":
        return 0
    return int(struct.unpack(">Q", dict(attributes(parts[_EXPR_DATA]))[_COUNTER_PACKETS])[0])


def _name(key: bytes) -> str:
    return key[:_NAME_BYTES].rstrip(b"\0").decode()


def of_slot(number: int, counted: Counted) -> dict[str, int]:
    """A slot's part, by the names that people see."""
    link = slot_link(number)
    found = {f"refused_{reason}": packets for (name, reason), packets in counted.refused.items() if name == link}
    return found | {"opened": counted.opened.get(link, 0)}


def traffic_of(traffic: Traffic | None) -> dict[str, int]:
    """Named from the sandbox's side of the link, which is the other one."""
    if traffic is None:
        return {}
    return {
        "sent_packets": traffic.received_packets, "sent_bytes": traffic.received_bytes,
        "received_packets": traffic.sent_packets, "received_bytes": traffic.sent_bytes,
    }  # fmt: skip
