"""uvicorn's WebSocket protocol with a short way for output: one copy and one system call per message.

The general way builds each frame in a buffer of its own and copies it three times, which costs more than
the rest of the stream together. A server's frames are neither masked nor fragmented, so their header is
all there is to make.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, cast

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    from asyncio import BaseTransport, WriteTransport

    from uvicorn._types import ASGISendEvent

# What may lie in our own buffer for a slow client, on top of its socket's.
HIGH_WATER_BYTES = 512 * 1024
_BINARY = 0x82  # final frame, binary
_SMALL = struct.Struct(">BB")
_MEDIUM = struct.Struct(">BBH")
_LARGE = struct.Struct(">BBQ")


def header(length: int) -> bytes:
    """The header of an unmasked, unfragmented binary frame; see RFC 6455, section 5.2."""
    if length < 126:
        return _SMALL.pack(_BINARY, length)
    if length < 65536:
        return _MEDIUM.pack(_BINARY, 126, length)
    return _LARGE.pack(_BINARY, 127, length)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class StreamProtocol(WebSocketsSansIOProtocol):
    """Sends ``{"type": "websocket.send", "parts": (a, b, …)}`` as one binary message."""

    def connection_made(self, transport: BaseTransport) -> None:
        """Let more be buffered than asyncio's 64 KiB: less than one message would be a stop after each."""
        super().connection_made(transport)
        cast("WriteTransport", transport).set_write_buffer_limits(high=HIGH_WATER_BYTES)

    def send_receive_event_to_app(self) -> None:
        """Pass a whole message on. Text that is not UTF-8 arrives as bytes, which no handler takes for a request.

        uvicorn would log a traceback for it, and fail when more follows.
        """
        if self.curr_msg_data_type == "text" and not _is_utf8(b"".join(self.frames)):
            self.curr_msg_data_type = "bytes"
        super().send_receive_event_to_app()

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message, waiting while the client is slow. Raises ClientDisconnected when it is gone."""
        parts = cast("tuple[bytes, ...] | None", message.get("parts"))
        if parts is None:
            await super().send(message)
            if message["type"] == "websocket.http.response.body":
                self.handshake_complete = True  # refused is complete, too: uvicorn would complain that it is not
            return
        if not self.writable.is_set():
            await self.writable.wait()
        if self.close_sent or self.transport.is_closing():
            raise ClientDisconnected
        self.transport.write(b"".join((header(sum(map(len, parts))), *parts)))
