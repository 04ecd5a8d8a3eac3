"""A connection to a TCP port inside a guest, carried over its channel with flow control both ways."""

from __future__ import annotations

import asyncio
import os
from collections import deque

from tartarus.guest.connection import Signal, Stream, fail, settle
from tartarus.guest.protocol import INPUT_WINDOW, MAX_DATA, U32, BadFrame, Reader, ToGuest, ToHost
from tartarus.guest.session import Session
from tartarus.model.errors import InvalidState, TartarusError


class GuestPort(Stream):
    """Like a socket: bytes in, bytes out, each direction with its own end."""

    __slots__ = (
        "_allowed",
        "_connected",
        "_consumed",
        "_ended",
        "_lost",
        "_more",
        "_over",
        "_pieces",
        "_port",
        "_room",
        "_sendable",
        "_session",
        "_write_closed",
    )

    def __init__(self, connection: Session, port: int) -> None:
        super().__init__(connection)
        self._session = connection
        self._port = port
        self._connected: asyncio.Future[None] = connection.loop.create_future()
        self._pieces: deque[bytes] = deque()
        self._more = Signal(connection.loop)
        self._room = Signal(connection.loop)
        self._allowed = self._sendable = INPUT_WINDOW
        self._consumed = 0
        self._ended = self._over = self._write_closed = False
        self._lost: TartarusError | None = None

    async def connected(self) -> None:
        """Wait for the connection. Raises InvalidState when nothing listens."""
        await asyncio.shield(self._connected)

    async def read(self) -> bytes:
        """The next bytes; b"" when the sandbox's side has ended."""
        while not self._pieces or self._session.is_quiet:
            if self._session.is_quiet:
                await self._session.flowing()
                continue
            if self._lost is not None:
                raise self._lost
            if self._ended:
                return b""
            await self._more.wait()
        piece = self._pieces.popleft()
        self._consumed += len(piece)
        if self._consumed * 4 >= INPUT_WINDOW and not self._over:
            self._allowed += self._consumed
            self.connection.send(ToGuest.CREDIT, self.id, U32.pack(self._consumed))
            self._consumed = 0
        return piece

    async def write(self, data: bytes) -> None:
        """Send bytes; returns when all are on their way. What the sandbox no longer reads is dropped."""
        if self._write_closed:
            raise InvalidState("this end of the connection is closed for writing")
        view = memoryview(data)
        while view and not self._over:
            if not self._sendable:
                await self._room.wait()
                continue
            if self._session.is_quiet:
                await self._session.flowing(asked=True)
                continue
            piece = view[: min(self._sendable, MAX_DATA)]
            self._sendable -= len(piece)
            self.connection.send(ToGuest.FORWARD_DATA, self.id, piece)
            view = view[len(piece) :]
        if self._lost is not None:
            raise self._lost

    def close_write(self) -> None:
        """Nothing more will be sent."""
        if not self._write_closed and not self._over:
            self.connection.send(ToGuest.FORWARD_EOF, self.id)
        self._write_closed = True

    def close(self) -> None:
        """End the connection in both directions."""
        self.connection.cancel(self)
        self._finish(None)

    def on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        """Take bytes, a grant, or an end."""
        if kind == ToHost.FORWARD_DATA and self._connected.done() and not self._ended:
            self._allowed -= len(payload)
            if self._allowed < 0:
                raise BadFrame("more bytes of a port than were granted")
            if payload:
                self._pieces.append(payload)
                self._more.wake()
        elif kind == ToHost.STDIN_CREDIT:
            self._sendable += U32.unpack(payload)[0]
            if self._sendable > INPUT_WINDOW:
                raise BadFrame("the guest grants more than its window")
            self._room.wake()
        elif kind == ToHost.FORWARD_EOF:
            self._ended = True
            self._more.wake()
        elif kind == ToHost.RESULT and not flags and not payload:
            if self._connected.done():
                self._finish(None)
            settle(self._connected, None)
        elif kind == ToHost.ERROR:
            reader = Reader(payload)
            (number,) = reader.take(U32)
            error = InvalidState(
                f"can't connect to port {self._port} in the sandbox",
                why=os.strerror(number & 0xFFFF),
                fix="start a server there first",
            )
            fail(self._connected, error)
            self._finish(error)
        else:
            super().on_frame(kind, flags, payload)

    def on_lost(self, error: TartarusError) -> None:
        """The guest is gone."""
        fail(self._connected, error)
        self._finish(error)

    def allowances(self) -> tuple[int, int]:
        """Where its flow control stands."""
        return self._allowed, self._sendable

    def _finish(self, error: TartarusError | None) -> None:
        self.connection.forget(self)
        self._ended = self._over = True
        self._lost = self._lost or error
        self._more.wake()
        self._room.wake()
