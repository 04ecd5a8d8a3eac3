"""The name in a TLS ClientHello (RFC 8446, 6066), read from foreign bytes as they come: pure, and nothing else of it.

Whatever a server could understand differently from us is refused: two names, two extensions of a kind, a name that is
hidden, lengths that don't fit.
"""

from __future__ import annotations

from typing import NamedTuple

from tartarus.network.egress.heads import read_name
from tartarus.network.egress.refusal import Refusal

HANDSHAKE = 0x16
"""The first byte of TLS."""
_CHANGE_CIPHER_SPEC = 0x14
_CLIENT_HELLO, _SERVER_HELLO = 1, 2
_RECORD_HEADER, _HANDSHAKE_HEADER = 5, 4
_MOST_RECORD = 16384
MOST_HELLO = 64 * 1024
"""Bytes. Those with post-quantum keys take 2 KiB."""
_SERVER_NAME = 0
_HIDDEN = frozenset({0xFE0D, 0xFFCE})  # encrypted_client_hello, and the encrypted_server_name that it was drafted as
# A ServerHello with this for its random is a HelloRetryRequest: the client says hello once more.
_RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


class Message(NamedTuple):
    """A handshake message, and how many bytes of the stream it and what came before it took."""

    kind: int
    body: bytes
    taken: int


def server_name(stream: bytes) -> tuple[str, int] | None:
    """The name of the ClientHello that a stream begins with, and where it ends; None when more must come.

    Raises Refusal.
    """
    message = _first_message(stream)
    if message is None:
        return None
    if message.kind != _CLIENT_HELLO:
        raise Refusal("malformed")
    return _name_of(message.body), message.taken


def asks_again(stream: bytes) -> bool | None:
    """Whether a server's first bytes ask for another ClientHello; None when more must come."""
    try:
        message = _first_message(stream)
    except Refusal:
        return False  # an alert, or what is no TLS: the client will see
    if message is None:
        return None
    return message.kind == _SERVER_HELLO and message.body[2:34] == _RETRY


def _first_message(stream: bytes) -> Message | None:
    found = bytearray()
    at = 0
    while len(stream) >= at + _RECORD_HEADER:
        kind, major = stream[at], stream[at + 1]
        size = int.from_bytes(stream[at + 3 : at + 5])
        if major != 3 or not 0 < size <= _MOST_RECORD or len(found) > MOST_HELLO:
            raise Refusal("malformed")
        if len(stream) < at + _RECORD_HEADER + size:
            break
        record = stream[at + _RECORD_HEADER : at + _RECORD_HEADER + size]
        at += _RECORD_HEADER + size
        if kind == _CHANGE_CIPHER_SPEC and not found and record == b"\1":
            continue  # which a client may send before its second hello, for old middleboxes' sake
        if kind != HANDSHAKE:
            raise Refusal("malformed")
        found += record
        if len(found) >= _HANDSHAKE_HEADER:
            wanted = _HANDSHAKE_HEADER + int.from_bytes(found[1:4])
            if wanted > MOST_HELLO:
                raise Refusal("limit")
            if len(found) >= wanted:
                return Message(found[0], bytes(found[_HANDSHAKE_HEADER:wanted]), at)
    if len(stream) > MOST_HELLO:
        raise Refusal("limit")
    return None


class _Fields:
    """Lengths and what they count, in turn."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, count: int) -> bytes:
        if count > len(self.rest):
            raise Refusal("malformed")
        found, self.rest = self.rest[:count], self.rest[count:]
        return found

    def counted(self, width: int) -> bytes:
        return self.take(int.from_bytes(self.take(width)))


def _name_of(body: bytes) -> str:
    fields = _Fields(body)
    fields.take(2 + 32)  # version, random
    for width in (1, 2, 1):  # session, cipher suites, compression
        fields.counted(width)
    if not fields.rest:
        raise Refusal("no_name")
    extensions = _Fields(fields.counted(2))
    if fields.rest:
        raise Refusal("malformed")
    found: dict[int, bytes] = {}
    while extensions.rest:
        kind, content = int.from_bytes(extensions.take(2)), extensions.counted(2)
        if kind in found:
            raise Refusal("malformed")
        found[kind] = content
    if found.keys() & _HIDDEN:
        raise Refusal("ech")
    if _SERVER_NAME not in found:
        raise Refusal("no_name")
    listed = _Fields(found[_SERVER_NAME])
    names = _Fields(listed.counted(2))
    is_host, name = names.take(1) == b"\0", names.counted(2)
    if not is_host or names.rest or listed.rest:
        raise Refusal("malformed")
    return read_name(name)
