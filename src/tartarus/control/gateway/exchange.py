"""One request to a sandbox's port and its answer, on a connection of its own.

Framing is h11's, which is strict: an answer with two lengths, a line break in a field, or a head beyond its cap is no
answer. What the guest says before its answer (1xx) is dropped, and so is what it says after it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import anyio
import h11

from tartarus.control.api import ClientGone
from tartarus.control.cutting import whole_or_cut
from tartarus.control.gateway.fields import Fields, from_guest, to_guest
from tartarus.control.streaming import close_iterator
from tartarus.model.errors import InvalidRequest, PortFailed

if TYPE_CHECKING:
    from litestar.types import Receive, Scope, Send

    from tartarus.control.api import ApiRequest
    from tartarus.control.gateway.address import Address
    from tartarus.control.ports import PortStream, Sandbox

MAX_HEAD_BYTES = 64 * 1024
MAX_EARLY_ANSWERS = 16
ANSWER_S = 300.0
"""How long a guest may take to begin its answer."""
_MOST_STATUS = 599
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_WITHOUT_BODY = frozenset({204, 304})


class Forwarded:
    """The answer to one request, as an ASGI application that fetches it."""

    def __init__(self, request: ApiRequest, sandbox: Sandbox, address: Address) -> None:
        self._request = request
        self._sandbox = sandbox
        self._address = address
        self._begun = False
        self._leaving = anyio.CancelScope()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Ask, and pass the answer on as fast as it is taken. Raises what can still be told instead of an answer."""
        hangups = self._request.api.hangups
        with self._leaving, hangups.watching(self._request.peer.fd, self._leaving.cancel):
            async with self._sandbox.connection(self._address.port) as stream:
                await self._exchange(stream, receive, send)
            return
        if not self._begun:
            raise ClientGone("the client hung up")

    async def _exchange(self, stream: PortStream, receive: Receive, send: Send) -> None:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        asking = asyncio.create_task(self._ask(connection, stream, receive))
        try:
            async with asyncio.timeout(ANSWER_S):
                head = await self._head(connection, stream, asking)
            method, address = self._request.scope["method"], self._address
            fields = from_guest(
                head.headers, port=address.port, asked=address.path, prefix=address.prefix,
                has_body=head.status_code not in _WITHOUT_BODY,
            )  # fmt: skip
            self._begun = True
            await send({"type": "http.response.start", "status": head.status_code, "headers": fields})
            if method != "HEAD":
                await self._pass_on(whole_or_cut(self._request, _body(connection, stream, address.port)), send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            raise PortFailed(f"port {self._address.port} gave no answer within {ANSWER_S:g} s") from None
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _pass_on(self, pieces: AsyncIterator[bytes], send: Send) -> None:
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            await close_iterator(pieces)

    async def _ask(self, connection: h11.Connection, stream: PortStream, receive: Receive) -> None:
        """Send the request, its body as it comes."""
        method = self._request.scope["method"]
        fields, has_body = self._fields()
        try:
            head = connection.send(h11.Request(method=method, target=self._address.target, headers=fields))
        except h11.LocalProtocolError as error:
            raise InvalidRequest("the request can't be passed on", why=str(error)) from error
        await stream.write(head or b"")
        if has_body:
            try:
                async for piece in _received(receive):
                    await stream.write(connection.send(h11.Data(data=piece)) or b"")
            except ClientGone:
                self._leaving.cancel()
                raise
        await stream.write(connection.send(h11.EndOfMessage()) or b"")
        # From here on there is only one thing that the caller can say.
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leaving.cancel()

    def _fields(self) -> tuple[Fields, bool]:
        given = self._request.scope["headers"]
        passed = to_guest(
            given, host=self._address.host, prefix=self._address.prefix, scheme=self._request.scope["scheme"]
        )
        passed.append((b"connection", b"close"))
        lengths = [value for name, value in given if name.lower() == b"content-length"]
        if any(name.lower() == b"transfer-encoding" for name, _ in given):
            return [*passed, (b"transfer-encoding", b"chunked")], True
        return [*passed, *((b"content-length", value) for value in lengths)], bool(lengths)

    async def _head(self, connection: h11.Connection, stream: PortStream, asking: asyncio.Task[None]) -> h11.Response:
        """The answer's head. A request that could not be sent is what is raised, as soon as that is known."""
        answering = asyncio.create_task(_answer(connection, stream, self._address.port))
        try:
            await asyncio.wait({answering, asking}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done() and not answering.done():
                asking.result()
            return await answering
        finally:
            answering.cancel()


async def _answer(connection: h11.Connection, stream: PortStream, port: int) -> h11.Response:
    early = 0
    while True:
        event = await _next(connection, stream, port)
        if isinstance(event, h11.InformationalResponse) and early < MAX_EARLY_ANSWERS:
            early += 1
            continue
        if why := _unfit(event):
            raise PortFailed(f"port {port} gave no answer that can be passed on", why=why)
        assert isinstance(event, h11.Response)
        return event


def _unfit(event: h11.Event) -> str:
    """Why what h11 let pass is no answer for our own server to give."""
    if not isinstance(event, h11.Response):
        return "it said too much before its answer"
    if event.status_code > _MOST_STATUS:
        return f"it said status {event.status_code}"
    return "a control character in a field" if any(_CONTROL.search(value) for _, value in event.headers) else ""


async def _body(connection: h11.Connection, stream: PortStream, port: int) -> AsyncIterator[bytes]:
    while isinstance(event := await _next(connection, stream, port), h11.Data):
        yield bytes(event.data)


async def _next(connection: h11.Connection, stream: PortStream, port: int) -> h11.Event:
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await stream.read())
    except h11.RemoteProtocolError as error:
        raise PortFailed(f"port {port} gave no answer that can be passed on", why=str(error)) from error
    if not isinstance(event, h11.Event):
        raise PortFailed(f"port {port} gave no answer that can be passed on", why="it switched protocols")
    return event


async def _received(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone("the client left before its request was whole")
        if message["body"]:
            yield message["body"]
        if not message.get("more_body"):
            return
