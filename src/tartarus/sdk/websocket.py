"""The client's half of RFC 6455 framing, without any I/O; the sync and async streams share it.

Our own because of time: importing wsproto costs 31 ms and websockets 49 ms (Python 3.11, medians of 21),
this module 1 ms, and the command line pays it on every `tartarus run`. No extension is offered, so
frames carry plain payloads; only what a client needs is here.
"""

from __future__ import annotations

import os
from binascii import a2b_base64, b2a_base64

from tartarus.model.errors import DaemonUnavailable

try:
    from _sha1 import sha1  # type: ignore[import-not-found]  # the module hashlib itself falls back to: 2 ms less than loading OpenSSL
except ImportError:
    from hashlib import sha1

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
MAX_HEAD_BYTES = 64 * 1024
# The largest honest message is an event that repeats a 2 MiB command line, escaped as JSON.
MAX_MESSAGE_BYTES = 16 * 1024**2
_CONTINUATION = 0
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def new_key() -> bytes:
    """A fresh Sec-WebSocket-Key."""
    return b2a_base64(os.urandom(16), newline=False)


def accept_token(key: bytes) -> bytes:
    """What the server must answer to `key`, to show that it understood the handshake."""
    if len(a2b_base64(key)) != 16:
        raise ValueError("a WebSocket key is 16 bytes in base 64")
    return b2a_base64(sha1(key + _GUID).digest(), newline=False)  # noqa: S324 - RFC 6455 says so; no secret


def handshake(path: str, key: bytes, headers: tuple[tuple[str, str], ...] = ()) -> bytes:
    """The opening request for `path`."""
    extra = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return (
        f"GET {path} HTTP/1.1\r\nHost: tartarus\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode('ascii')}\r\n{extra}\r\n"
    ).encode("ascii")


def broken(why: str) -> DaemonUnavailable:
    """The error for bytes that no Tartarus daemon sends."""
    return DaemonUnavailable("the daemon's answer makes no sense", why=why, fix="is another program on its socket?")


class Head:
    """The status line and headers of the server's answer; `rest` is what came after them."""

    __slots__ = ("headers", "rest", "status")

    def __init__(self, status: int, headers: dict[str, str], rest: bytes) -> None:
        self.status = status
        self.headers = headers
        self.rest = rest

    @classmethod
    def parse(cls, data: bytes) -> Head | None:
        """Read the head of `data`, or None while it is incomplete."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise broken("its headers have no end")
            return None
        lines = data[:end].decode("latin-1").split("\r\n")
        version, _, status = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isascii() or not status[:3].isdigit():
            raise broken("it is not HTTP")
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon:
                raise broken("a header has no colon")
            headers[name.strip().lower()] = value.strip()
        return cls(int(status[:3]), headers, data[end + 4 :])


def check_upgrade(head: Head, key: bytes) -> None:
    """Raise unless `head` (a 101) really switches to WebSocket for `key`."""
    if head.headers.get("upgrade", "").lower() != "websocket":
        raise broken("it switched to another protocol")
    if head.headers.get("sec-websocket-accept", "").encode("latin-1") != accept_token(key):
        raise broken("its handshake answers another request")
    if head.headers.get("sec-websocket-extensions"):
        raise broken("it uses a WebSocket extension that nobody offered")


def _xor(data: bytes | memoryview, mask: bytes) -> bytes:
    size = len(data)
    pattern = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(pattern, "little")).to_bytes(size, "little")


def encode(opcode: int, payload: bytes | memoryview, mask: bytes | None = None) -> bytes:
    """One whole, masked frame. `mask`: 4 bytes, random unless given."""
    mask = os.urandom(4) if mask is None else mask
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65536:
        head = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8, "big")
    return head + mask + _xor(payload, mask)


class Decoder:
    """Turns the server's bytes into whole messages.

    `receive` returns ``(opcode, payload)`` pairs: TEXT and BINARY messages put together from their
    fragments, and control frames as they come. Payloads may be views of the bytes passed in.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._wanted = 2
        self._opcode = 0
        self._fragments: list[bytes] = []
        self._fragments_size = 0

    def receive(self, data: bytes) -> list[tuple[int, memoryview]]:
        """Decode `data`; raises DaemonUnavailable when it breaks the protocol or the size caps."""
        if self._held:
            self._held += data
            if len(self._held) < self._wanted:
                return []
            data = bytes(self._held)
            self._held = bytearray()
        view = memoryview(data)
        messages: list[tuple[int, memoryview]] = []
        position = 0
        while True:
            found = self._frame(view, position)
            if found is None:
                break
            position, first, payload = found
            message = self._assemble(first, payload)
            if message is not None:
                messages.append(message)
        if position < len(view):
            self._held += view[position:]
        return messages

    def _frame(self, view: memoryview, start: int) -> tuple[int, int, memoryview] | None:
        """The frame at `start` as (end, first byte, payload), or None while it is incomplete."""
        available = len(view) - start
        self._wanted = 2
        if available < 2:
            return None
        first, second = view[start], view[start + 1]
        if first & 0x70:
            raise broken("a frame uses a reserved bit")
        if second & 0x80:
            raise broken("a server's frame is masked")
        size, head = second, 2
        if size >= 126:
            head = 4 if size == 126 else 10
            self._wanted = head
            if available < head:
                return None
            size = int.from_bytes(view[start + 2 : start + head], "big")
        if first & 8 and (size > 125 or not first & 0x80):
            raise broken("a control frame is long or in parts")
        if size + self._fragments_size > MAX_MESSAGE_BYTES:
            raise broken(f"a message is over {MAX_MESSAGE_BYTES} bytes")
        self._wanted = head + size
        if available < head + size:
            return None
        return start + head + size, first, view[start + head : start + head + size]

    def _assemble(self, first: int, payload: memoryview) -> tuple[int, memoryview] | None:
        opcode, final = first & 15, first & 0x80
        if opcode in (CLOSE, PING, PONG):
            return opcode, payload
        if opcode not in (_CONTINUATION, TEXT, BINARY):
            raise broken(f"a frame has the unknown opcode {opcode}")
        if (opcode == _CONTINUATION) != bool(self._opcode):
            raise broken("a message's parts are out of order")
        if final and not self._opcode:
            return opcode, payload
        self._opcode = self._opcode or opcode
        self._fragments.append(bytes(payload))
        self._fragments_size += len(payload)
        if not final:
            return None
        whole = self._opcode, memoryview(b"".join(self._fragments))
        self._opcode, self._fragments, self._fragments_size = 0, [], 0
        return whole
