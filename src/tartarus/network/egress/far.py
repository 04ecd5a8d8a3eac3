"""The server's side of an HTTP connection: plain, or secured by the proxy itself."""

from __future__ import annotations

import asyncio
import socket
import ssl

from tartarus.network.egress.connection import HEAD_S, PIECE, Broken, receive, send


class Far:
    """TCP to a server."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def receive(self) -> bytes:
        """What comes next; nothing at the end. Raises Broken."""
        return await receive(self._sock)

    async def send(self, data: bytes) -> None:
        """All of it. Raises Broken."""
        await send(self._sock, data)

    def close(self) -> None:
        """Safe to repeat."""
        self._sock.close()


class Secured(Far):
    """TLS to a server that has proved to be `name`."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str) -> None:
        super().__init__(sock)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=name)

    async def begin(self) -> None:
        """Shake hands. Raises Broken, also for a server that is somebody else."""
        async with asyncio.timeout(HEAD_S):
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    await self._flush()
                    await self._fill()
                except ssl.SSLError:
                    raise Broken from None
                else:
                    await self._flush()
                    return

    async def receive(self) -> bytes:
        """What comes next; nothing at an end that the server has said."""
        while True:
            try:
                return self._tls.read(PIECE)
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError:
                raise Broken from None

    async def send(self, data: bytes) -> None:
        """All of it."""
        try:
            self._tls.write(data)
        except ssl.SSLError:
            raise Broken from None
        await self._flush()

    async def _flush(self) -> None:
        if self._out.pending:
            await super().send(self._out.read())

    async def _fill(self) -> None:
        data = await super().receive()
        if not data:
            raise Broken
        self._in.write(data)
