"""A WebSocket between a caller and a sandbox's port, message by message: each side's protocol ends here.

Framing towards the guest is the websockets library's, without extensions. A message is at most as long as any other on
the API, and while one side does not read, the other is not read either.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

import anyio
import msgspec
from uvicorn.protocols.utils import ClientDisconnected
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import EXTERNAL_CLOSE_CODES, Close, CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN, Event
from websockets.uri import WebSocketURI

from tartarus.control.auditing import noted_socket
from tartarus.control.gateway.address import Address
from tartarus.control.gateway.exchange import ANSWER_S
from tartarus.control.gateway.fields import Fields, from_guest, to_guest
from tartarus.control.problems import MEDIA_TYPE, as_tartarus_error, problem_of
from tartarus.control.server import MAX_MESSAGE_BYTES
from tartarus.model.errors import PortFailed

if TYPE_CHECKING:
    from litestar.types.asgi_types import WebSocketSendEvent

    from tartarus.control.api import ApiSocket
    from tartarus.control.ports import PortStream


async def converse(socket: ApiSocket, sandbox_id: str, port: int) -> None:
    """Connect to the port, and carry messages until either side ends it; what is refused is a problem document."""
    try:
        address = Address.of(socket.scope, sandbox_id, port)
        sandbox = await noted_socket(socket, "port.connect", sandbox_id, summary=f"port {port}")
        with anyio.CancelScope() as leaving, socket.api.hangups.watching(socket.peer.fd, leaving.cancel):
            async with sandbox.connection(port) as stream:
                talk = _Conversation(socket, stream, address)
                refusal = await talk.open()
                if refusal is None:
                    await talk.carry()
                else:
                    await _refuse(socket, *refusal)
    except ClientDisconnected:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, this answer is the only one there will be
        problem = problem_of(as_tartarus_error(error))
        fields = [(b"content-type", MEDIA_TYPE.encode())]
        with contextlib.suppress(ClientDisconnected, RuntimeError):  # what was begun can't be refused any more
            await _refuse(socket, problem.status, fields, msgspec.json.encode(problem))


async def _refuse(socket: ApiSocket, status: int, fields: Fields, body: bytes) -> None:
    """Answer the handshake with what is no WebSocket."""
    await _send(socket, {"type": "websocket.http.response.start", "status": status, "headers": fields})
    await _send(socket, {"type": "websocket.http.response.body", "body": body})


async def _send(socket: ApiSocket, message: dict[str, Any]) -> None:
    await socket.send(cast("WebSocketSendEvent", message))


class _Conversation:
    """The guest's half is `_guest`, which makes bytes and takes them, and does neither itself."""

    def __init__(self, socket: ApiSocket, stream: PortStream, address: Address) -> None:
        self._socket = socket
        self._stream = stream
        self._address = address
        path, _, query = address.target.partition("?")
        offered: list[Any] = socket.scope["subprotocols"]
        uri = WebSocketURI(secure=False, host="localhost", port=address.port, path=path, query=query)
        self._guest = ClientProtocol(uri, subprotocols=offered or None, max_size=MAX_MESSAGE_BYTES)
        self._sending = asyncio.Lock()
        self._message = bytearray()
        self._is_text = False
        self._early: list[Event] = []  # what came with the handshake

    async def open(self) -> tuple[int, Fields, bytes] | None:
        """Shake hands with the guest, then the caller; what the guest said instead, if it did. Raises PortFailed."""
        request = self._guest.connect()
        for name, value in to_guest(
            self._socket.scope["headers"], host=self._address.host, prefix=self._address.prefix, scheme="http"
        ):
            if name != b"host":
                request.headers[name.decode("latin-1")] = value.decode("latin-1")
        self._guest.send_request(request)
        try:
            async with asyncio.timeout(ANSWER_S):
                response = await self._response()
        except TimeoutError:
            raise PortFailed(f"port {self._address.port} gave no answer within {ANSWER_S:g} s") from None
        if isinstance(self._guest.handshake_exc, InvalidStatus):
            fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.raw_items()]
            passed = from_guest(
                fields, port=self._address.port, asked=self._address.path, prefix=self._address.prefix, has_body=False
            )
            return min(max(response.status_code, 200), 599), passed, bytes(response.body or b"")
        if self._guest.handshake_exc is not None:
            raise self._failed(str(self._guest.handshake_exc))
        await self._socket.accept(
            subprotocols=self._guest.subprotocol, headers={"tartarus-port": str(self._address.port)}
        )
        return None

    async def carry(self) -> None:
        """Messages both ways, until one side has ended the conversation."""
        ways = {asyncio.create_task(self._inwards()), asyncio.create_task(self._outwards())}
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in done:
                way.result()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _response(self) -> Response:
        while True:
            await self._flush()
            await self._take()
            events = self._guest.events_received()
            if events and isinstance(events[0], Response):
                self._early = events[1:]
                return events[0]
            if self._guest.handshake_exc is not None:
                raise self._failed(str(self._guest.handshake_exc))

    async def _inwards(self) -> None:
        while True:
            message: Any = await self._socket.receive()
            if self._guest.state is not OPEN:  # it has ended the conversation; what is said now is for nobody
                return None
            if message["type"] != "websocket.receive":
                code = message.get("code", CloseCode.GOING_AWAY)
                self._guest.send_close(code if _may_be_sent(code) else CloseCode.GOING_AWAY)
                return await self._flush()
            text = message.get("text")
            if text is None:
                self._guest.send_binary(message["bytes"])
            else:
                self._guest.send_text(text.encode())
            await self._flush()

    async def _outwards(self) -> None:
        events = self._early
        while True:
            for event in events:
                if isinstance(event, Frame) and not await self._passed_on(event):
                    return None
            if self._guest.parser_exc is not None or self._guest.close_expected():
                await self._flush()
                return await self._end(self._guest.close_sent)
            await self._take()
            await self._flush()
            events = self._guest.events_received()

    async def _passed_on(self, frame: Frame) -> bool:
        """Whether the conversation goes on."""
        if frame.opcode is Opcode.CLOSE:
            await self._end(self._guest.close_rcvd)
            return False
        if frame.opcode not in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            return True
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        self._message += frame.data
        if not frame.fin:
            return True
        data, self._message = bytes(self._message), bytearray()
        if not self._is_text:
            await _send(self._socket, {"type": "websocket.send", "parts": (data,)})
            return True
        try:
            await _send(self._socket, {"type": "websocket.send", "text": data.decode()})
        except UnicodeDecodeError:
            await self._end(Close(CloseCode.INVALID_DATA, "text that is not UTF-8"))
            return False
        return True

    async def _end(self, close: Close | None) -> None:
        if close is None or close.code == CloseCode.NO_STATUS_RCVD:
            close = Close(CloseCode.NORMAL_CLOSURE if close else CloseCode.BAD_GATEWAY, "")
        code = close.code if _may_be_sent(close.code) else CloseCode.BAD_GATEWAY
        await self._socket.close(code=code, reason=close.reason)

    async def _take(self) -> None:
        data = await self._stream.read()
        if data:
            self._guest.receive_data(data)
        else:
            self._guest.receive_eof()

    async def _flush(self) -> None:
        async with self._sending:
            for data in self._guest.data_to_send():
                if data:
                    await self._stream.write(data)

    def _failed(self, why: str) -> PortFailed:
        return PortFailed(f"port {self._address.port} opened no WebSocket that can be passed on", why=why)


def _may_be_sent(code: int) -> bool:
    return code in EXTERNAL_CLOSE_CODES or 3000 <= code < 5000
