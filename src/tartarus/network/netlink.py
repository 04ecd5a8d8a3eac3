"""Netlink, as far as network slots need it: requests that are acknowledged, dumps, and nothing hidden.

Our own and not pyroute2, because of where a socket is made: a netlink socket acts on the network namespace of the
thread that made it, for good. pyroute2 0.9 makes one more for each thread that uses its object, in whatever
namespace that thread happens to be, so that a request meant for a guest can change the host instead. It also takes
0.3 s to import and needs an event loop for each thread. What slots ask for is a handful of messages.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

REQUEST = 0x1
ACK = 0x4
EXCLUSIVE = 0x200
CREATE = 0x400
DUMP = 0x300

_ERROR = 2
_DONE = 3
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
# nfnetlink's own header: family, version, and in a batch's two ends whose it is.
_BATCH = struct.Struct(">BBH")
_BATCH_BEGIN, _BATCH_END = 16, 17
_NFTABLES = 10
_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_RECEIVE_BYTES = 256 * 1024
_TIMEOUT_S = 10.0
"""How long the kernel may take for an answer; it answers while it handles the request, so this is never waited for."""


class Request(NamedTuple):
    """One message to the kernel: its type, flags beside REQUEST, and its body with attributes."""

    kind: int
    flags: int
    body: bytes


class Message(NamedTuple):
    """One message from the kernel."""

    kind: int
    body: bytes


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes as netlink wants."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NESTED, b"".join(parts))


def text(kind: int, value: str) -> bytes:
    """An attribute that holds a string with its closing NUL."""
    return attribute(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """An attribute that holds a number in the host's byte order."""
    return attribute(kind, struct.pack("=I", value))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in `data`: type without its flag bits, and value. What is cut short ends them."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            return
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The messages in one datagram: type, sequence number, body."""
    while len(data) >= _HEADER.size:
        length, kind, _flags, sequence, _port = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            return
        yield kind, sequence, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


class NetlinkSocket:
    """Speaks for the network namespace of the thread that makes it; then any thread may use it."""

    def __init__(self, family: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = itertools.count(1)
        self._lock = threading.Lock()

    def do(self, *requests: Request, ignore: tuple[int, ...] = ()) -> None:
        """Have the kernel do each in order, in one exchange. Raises the first OSError that is not in `ignore`."""
        with self._lock:
            first = 0
            data = b""
            for request in requests:
                number = next(self._sequence)
                first = first or number
                data += _encode(request, REQUEST | ACK, number)
            self._socket.send(data)
            errors = [self._acknowledged(first + index) for index in range(len(requests))]
        for error in errors:
            if error and error not in ignore:
                raise OSError(error, os.strerror(error))

    def ask(self, request: Request) -> Message:
        """The one message that the kernel answers `request` with. Raises OSError."""
        with self._lock:
            number = next(self._sequence)
            self._socket.send(_encode(request, REQUEST, number))
            while True:
                for kind, sequence, body in messages(self._socket.recv(_RECEIVE_BYTES)):
                    if sequence != number:
                        continue
                    if kind == _ERROR:
                        error = -int(struct.unpack_from("=i", body)[0])
                        raise OSError(error, os.strerror(error))
                    return Message(kind, body)

    def dump(self, request: Request) -> list[Message]:
        """Everything the kernel lists for `request`. Raises OSError."""
        with self._lock:
            number = next(self._sequence)
            self._socket.send(_encode(request, REQUEST | DUMP, number))
            found: list[Message] = []
            while True:
                for kind, sequence, body in messages(self._socket.recv(_RECEIVE_BYTES)):
                    if sequence != number:
                        continue
                    if kind in {_DONE, _ERROR}:
                        error = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                        if error:
                            raise OSError(error, os.strerror(error))
                        return found
                    found.append(Message(kind, body))

    def transact(self, *requests: Request) -> None:
        """Have the packet filter do all of them at one moment, or none. Raises OSError, the first that failed."""
        with self._lock:
            first = next(self._sequence)
            data = _HEADER.pack(_HEADER.size + _BATCH.size, _BATCH_BEGIN, REQUEST, first, 0) + _BATCH.pack(
                0, 0, _NFTABLES
            )
            for request in requests:
                data += _encode(request, REQUEST | ACK, next(self._sequence))
            last = next(self._sequence)
            data += _HEADER.pack(_HEADER.size + _BATCH.size, _BATCH_END, REQUEST, last, 0) + _BATCH.pack(
                0, 0, _NFTABLES
            )
            self._socket.send(data)
            waited = set(range(first + 1, last))
            errors: dict[int, int] = {}
            while waited:
                for kind, sequence, body in messages(self._socket.recv(_RECEIVE_BYTES)):
                    if kind != _ERROR or not first <= sequence <= last:
                        continue
                    error = -int(struct.unpack_from("=i", body)[0])
                    if error:
                        errors[sequence] = error
                    waited.discard(sequence)
                    if error and sequence in {first, last}:
                        waited.clear()  # it was refused as a whole
        if errors:
            error = errors[min(errors)]
            raise OSError(error, os.strerror(error))

    def _acknowledged(self, number: int) -> int:
        while True:
            for kind, sequence, body in messages(self._socket.recv(_RECEIVE_BYTES)):
                if kind == _ERROR and sequence == number:
                    return -int(struct.unpack_from("=i", body)[0])

    def close(self) -> None:
        """Close it; safe to repeat."""
        self._socket.close()


class Events:
    """What the kernel announces to groups of one netlink family, in the namespace of the thread that makes it."""

    def __init__(self, family: int, groups: tuple[int, ...]) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, family
        )
        self._socket.bind((0, 0))
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        """For an event loop to wait on."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Take what has come since the last time, unread: that there was something is the news."""
        while True:
            try:
                self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more came than the queue holds; go on with the rest
                    raise

    def close(self) -> None:
        """Close it; safe to repeat."""
        self._socket.close()


def _encode(request: Request, flags: int, sequence: int) -> bytes:
    size = _HEADER.size + len(request.body)
    return _HEADER.pack(size, request.kind, request.flags | flags, sequence, 0) + request.body + bytes(-size % 4)
