"""What the egress proxy and the daemon tell each other, one packet each: the proxy asks, and the daemon decides."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Generic, Literal, TypeVar

import msgspec

MOST_PACKET = 64 * 1024
_MOST_UNSENT = 10_000
_AT_ONCE = 64
Kind = Literal["tls", "http", "tunnel", ""]
T = TypeVar("T")


class Credential(msgspec.Struct, frozen=True):
    """A header that the proxy adds, on a connection that it secures itself; `port` is where."""

    port: int
    header: str
    value: str

    def __repr__(self) -> str:
        return "Credential(…)"


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """May that slot reach `name` at `port`? `address`: where it was on its way to; if it is not, it is looked up.

    `live`: it was told so before, under another contract perhaps; `address` is then where it is connected to.
    """

    number: int
    slot: str
    kind: Kind
    name: str
    port: int
    address: str = ""
    live: bool = False


class Verdict(msgspec.Struct, frozen=True, tag="verdict"):
    """`refused`: why not. `addresses`: where it is, any of them. `credential`: what is added to its requests."""

    number: int
    refused: str = ""
    addresses: tuple[str, ...] = ()
    credential: Credential | None = None


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """End that slot's connections: it is another's from now on, or nobody's."""

    number: int
    slot: str


class Review(msgspec.Struct, frozen=True, tag="review"):
    """Ask again for each of that slot's connections, and end those that are refused now."""

    number: int
    slot: str


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """A `Forget` or `Review` is done."""

    number: int


class Carried(msgspec.Struct, frozen=True, tag="carried"):
    """A connection that has ended. `refused`: why, where it was; `sent`, `received`: bytes, as the sandbox sees it.

    `credential`: whether one was added.
    """

    slot: str
    kind: Kind
    name: str
    port: int
    address: str
    sent: int
    received: int
    refused: str
    duration_us: int
    credential: bool = False


FromProxy = Ask | Settled | Carried
FromDaemon = Verdict | Forget | Review


class Link(Generic[T]):
    """One end of the socket between them. `heard` is called with each message, `ended` once when the other end went."""

    def __init__(
        self, sock: socket.socket, kind: type[T], heard: Callable[[T], None], ended: Callable[[], None]
    ) -> None:
        self._sock = sock
        self._decode = msgspec.json.Decoder(kind).decode
        self._heard = heard
        self._ended = ended
        self._unsent: deque[bytes] = deque()
        self._loop = asyncio.get_running_loop()
        self._open = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def tell(self, message: msgspec.Struct) -> None:
        """Send it, in its turn. Too many that the other end does not take end the link."""
        if not self._open:
            return
        self._unsent.append(msgspec.json.encode(message))
        if len(self._unsent) == 1:
            self._send()
        if len(self._unsent) > _MOST_UNSENT:
            self.close()

    def close(self) -> None:
        """Safe to repeat."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._ended()

    def _send(self) -> None:
        try:
            while self._unsent:
                self._sock.send(self._unsent[0])
                self._unsent.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._send)
            return
        except OSError:
            self.close()
            return
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._open:
                return
            try:
                packet = self._sock.recv(MOST_PACKET)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            try:
                message = self._decode(packet) if packet else None
            except msgspec.MsgspecError:
                message = None
            if message is None:
                self.close()
                return
            self._heard(message)
