"""One connection of a sandbox's that the egress proxy carries, or does not."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

from tartarus.network.egress.messages import Ask, Carried, Kind, Verdict
from tartarus.network.egress.refusal import Refusal

HEAD_S = 10.0
"""All of a hello or a request's head must have come by then."""
IDLE_S = 3600.0
BODY_IDLE_S = 120.0
_DIAL_S = 10.0
PIECE = 256 * 1024
_MOST_TO_CLOSE = 64 * 1024
Asking = Callable[[Ask], Awaitable[Verdict]]
Telling = Callable[[Carried], None]


class Broken(Exception):
    """One of the two ends went, or took too long."""


class Connection:
    """`address` and `port`: where it was led here from; empty and None where the proxy itself was asked."""

    def __init__(
        self, sock: socket.socket, slot: str, address: str, port: int | None, ask: Asking, tell: Telling
    ) -> None:
        self.sock = sock
        self.slot = slot
        self.address = address
        self.port = port
        self.task: asyncio.Task[None] | None = None
        self.asked: Ask | None = None
        self.reaches: tuple[str, ...] = ()
        """The addresses, of which it has one, that `asked` was let to."""
        self.sent = self.received = 0
        self.has_credential = False
        self._ask = ask
        self._tell = tell
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()

    async def receive(self, most: int = PIECE) -> bytes:
        """What the sandbox says next; nothing at its end. Raises Broken."""
        return await receive(self.sock, most)

    async def send(self, data: bytes) -> None:
        """Tell it something. Raises Broken."""
        await send(self.sock, data)

    async def judged(self, kind: Kind, name: str, port: int) -> Verdict:
        """Whether it may reach that. Raises Refusal."""
        self.said_all()  # of what it reached before
        self.reaches = ()
        self.asked = Ask(0, self.slot, kind, name, port, self.address)
        verdict = await self._ask(self.asked)
        if verdict.refused:
            raise Refusal(verdict.refused)
        self.reaches = verdict.addresses
        return verdict

    def said_all(self, refused: str = "") -> None:
        """Report what was carried, or why not, once."""
        asked, self.asked = self.asked, None
        if asked is None and not refused:
            return
        asked = asked or Ask(0, self.slot, "", "", self.port or 0, self.address)
        lasted_us = int((time.monotonic() - self._began) * 1e6)
        self._tell(Carried(self.slot, asked.kind, asked.name, asked.port, asked.address, self.sent, self.received,
                           refused, lasted_us, self.has_credential))  # fmt: skip
        self.sent = self.received = 0
        self.has_credential = False
        self._began = time.monotonic()

    async def close(self, *, at_once: bool) -> None:
        """End it; so that the last words get there, unless it is to be at once."""
        try:
            if at_once:
                return
            self.sock.shutdown(socket.SHUT_WR)
            # What was sent and not read would make the kernel take them back.
            async with asyncio.timeout(1.0):
                left = _MOST_TO_CLOSE
                while left > 0 and (data := await self._loop.sock_recv(self.sock, left)):
                    left -= len(data)
        except (OSError, TimeoutError):
            pass
        finally:
            self.sock.close()


async def dial(addresses: Sequence[str], port: int) -> socket.socket:
    """A connection to the first address that takes one. Raises Broken."""
    loop = asyncio.get_running_loop()
    for address in addresses:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(_DIAL_S):
                await loop.sock_connect(sock, (address, port))
        except (OSError, TimeoutError):
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise Broken


async def receive(sock: socket.socket, most: int = PIECE) -> bytes:
    """What comes next; nothing at the end. Raises Broken."""
    try:
        return await asyncio.get_running_loop().sock_recv(sock, most)
    except OSError:
        raise Broken from None


async def send(sock: socket.socket, data: bytes) -> None:
    """All of it. Raises Broken."""
    try:
        async with asyncio.timeout(BODY_IDLE_S):
            await asyncio.get_running_loop().sock_sendall(sock, data)
    except (OSError, TimeoutError):
        raise Broken from None
