"""The channel of a machine whose monitor offers vsock behind a Unix socket, as Firecracker and Cloud Hypervisor do.

The host connects, says `CONNECT port`, and is told `OK port` once the guest took the connection; from then on it is
the agent's. Monitors break connections whenever a machine is saved or restored, so a relay stands between: whoever
holds the channel's other end does not notice when another connection takes the place of a broken one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from tartarus.model.errors import GuestFailed
from tartarus.runtimes.microvm.home import Home

PORT = 1024
"""Where the agent listens in the guest (`tartarus.channel=vsock:1024`)."""
CONNECT_TIMEOUT_S = 10.0
_ANSWER_MAX = 32
_RETRY_S = 0.02
_ATTEMPT_S = 2.0
_CHUNK = 256 * 1024


async def connect(home: Home, name: str, port: int = PORT, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
    """A connection to a port in the guest; tried again while nobody listens there yet. Raises GuestFailed."""
    why = "nobody listens there"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    sock = home.connect(name)
                except OSError as error:
                    why = error.strerror or str(error)
                else:
                    try:
                        async with asyncio.timeout(_ATTEMPT_S):
                            if await _handshake(sock, port):
                                return sock
                    except TimeoutError:
                        why = "the guest does not answer"
                    except OSError as error:
                        why = error.strerror or str(error)
                    except BaseException:
                        sock.close()
                        raise
                    sock.close()
                await asyncio.sleep(_RETRY_S)
    except TimeoutError:
        raise GuestFailed("a machine's agent can't be reached", why=why) from None


async def _handshake(sock: socket.socket, port: int) -> bool:
    """Whether somebody took the connection. Reads byte by byte: what comes after the line is the guest's."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"CONNECT %d\n" % port)
    line = b""
    while not line.endswith(b"\n"):
        piece = await loop.sock_recv(sock, 1)
        if not piece:
            return False
        line += piece
        if len(line) > _ANSWER_MAX:
            break
    if line.startswith(b"OK ") and line[3:-1].isdigit() and line.endswith(b"\n"):
        return True
    raise GuestFailed("a monitor misbehaves", why=f"it answers a connection with {line[:_ANSWER_MAX]!r}")


class Relay:
    """Carries bytes between one end of a socket pair and, one after the other, connections to the guest."""

    def __init__(self, ours: socket.socket) -> None:
        ours.setblocking(False)
        self._ours = ours
        self._guest: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def attached(self) -> bool:
        """Whether a connection to the guest is there."""
        return self._guest is not None

    def attach(self, guest: socket.socket) -> None:
        """Carry bytes over this connection from now on. When the guest closes it, the channel closes."""
        assert self._guest is None
        guest.setblocking(False)
        self._guest = guest
        self._tasks = [
            asyncio.create_task(self._pump(guest, self._ours)),
            asyncio.create_task(self._pump(self._ours, guest)),
        ]

    async def detach(self) -> None:
        """The connection is about to break: let go of it, and keep the channel for another."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._guest is not None:
            self._guest.close()
            self._guest = None

    def close(self) -> None:
        """End it; the channel's other end sees that it closed."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        for sock in (self._guest, self._ours):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        asyncio.get_running_loop().call_soon(self._let_go)

    def _let_go(self) -> None:
        # After the cancelled tasks took their sockets out of the loop.
        self._ours.close()
        if self._guest is not None:
            self._guest.close()

    async def _pump(self, source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while piece := await loop.sock_recv(source, _CHUNK):
                await loop.sock_sendall(target, piece)
        except OSError:
            pass
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
