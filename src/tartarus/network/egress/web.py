"""HTTP/1, read and written anew in both directions: a request reaches the server that it names, and as one request."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable

import h11

from tartarus.network.egress import heads
from tartarus.network.egress.connection import BODY_IDLE_S, HEAD_S, Broken, Connection, dial
from tartarus.network.egress.far import Far, Secured
from tartarus.network.egress.messages import Credential, Verdict
from tartarus.network.egress.refusal import REASONS, Refusal
from tartarus.network.egress.tunnels import open_tunnel

_MOST_HEAD = 32 * 1024
_KEPT_S = 60.0
_LEAST_SECRET = 8
"""Bytes; what is shorter is found everywhere."""
_TUNNEL_STANDS = b"HTTP/1.1 200 Connection established\r\n\r\n"
_STATUS = {"malformed": 400, "limit": 431, "unresolved": 502, "protocol": 505}
_ENDS = frozenset({h11.DONE, h11.MUST_CLOSE, h11.CLOSED})


class Web:
    """A connection on which HTTP is spoken, from its first bytes to its end."""

    def __init__(self, connection: Connection, context: ssl.SSLContext) -> None:
        self._connection = connection
        self._context = context
        self._near = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD)
        self._far: Far | None = None
        self._there = h11.Connection(h11.CLIENT)
        self._reached: tuple[str, int] | None = None
        self._verdict = Verdict(0)
        self._in_tunnel = False

    async def carry(self, first: bytes) -> None:
        """Request after request, that begin with `first`. Raises Refusal (the sandbox was told), Broken."""
        try:
            while first:
                self._near.receive_data(first)
                first = await self._carry_all()
        except Refusal as error:
            await self._tell(_STATUS.get(error.reason, 403), f"refused by the egress proxy: {REASONS[error.reason]}")
            raise
        except h11.LocalProtocolError:
            raise Refusal("malformed") from None
        except Broken:
            await self._tell(502, "the server did not answer, or not in HTTP")
            raise
        finally:
            self._leave()

    async def _carry_all(self) -> bytes:
        """Until the end; but what a tunnel turns out to be HTTP is given back."""
        patience_s = HEAD_S
        while True:
            request = await self._request(patience_s)
            if request is None:
                return b""
            target = heads.target_of(request, self._connection.port)
            if request.method == b"CONNECT":
                return await self._tunnel(target)
            await self._exchange(request, target)
            if self._near.our_state is not h11.DONE or self._near.their_state is not h11.DONE:
                return b""
            self._near.start_next_cycle()
            patience_s = _KEPT_S

    async def _request(self, patience_s: float) -> h11.Request | None:
        async with asyncio.timeout(patience_s):
            event = await _next(self._near, self._connection.receive)
        if not isinstance(event, h11.Request):
            return None
        if len(event.target) + sum(len(name) + len(value) for name, value in event.headers) > _MOST_HEAD:
            raise Refusal("limit")  # it came in one piece
        return event

    async def _tunnel(self, target: heads.Target) -> bytes:
        self._leave()
        trailing, _ = self._near.trailing_data

        async def stands() -> None:
            self._in_tunnel = True
            await self._connection.send(_TUNNEL_STANDS)

        back = await open_tunnel(self._connection, target.name, target.port, stands, trailing)
        if back:
            self._in_tunnel = False
            self._connection.port = target.port
            self._near = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD)
        return back

    async def _exchange(self, request: h11.Request, target: heads.Target) -> None:
        if self._reached != target[:2] or self._there.our_state is not h11.IDLE:
            await self._reach(request, target)
        credential = self._verdict.credential
        headers = _asking(request, target, credential)
        there, far, connection = self._there, self._far, self._connection
        assert far is not None
        head = there.send(h11.Request(method=request.method, target=target.path, headers=headers))
        await far.send(head or b"")
        connection.sent += len(head or b"")
        body = asyncio.create_task(self._body(far))
        answer = asyncio.create_task(self._answer(far, credential))
        try:
            await asyncio.wait((body, answer), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                body.result()  # what can't be sent is not waited for
            await answer
        finally:
            for task in (body, answer):
                task.cancel()
            await asyncio.gather(body, answer, return_exceptions=True)
        if there.our_state is h11.DONE and there.their_state is h11.DONE:
            there.start_next_cycle()
        else:
            self._leave()

    async def _reach(self, request: h11.Request, target: heads.Target) -> None:
        self._leave()
        verdict = await self._connection.judged("http", target.name, target.port)
        credential = verdict.credential
        if credential is None and heads.is_secure(request):
            raise Refusal("protocol")  # which would be ours to secure; that is done where a credential is added
        sock = await dial(verdict.addresses, target.port if credential is None else credential.port)
        self._far = Far(sock)
        if credential is not None:
            secured = Secured(sock, self._context, target.name)
            await secured.begin()
            self._far = secured
            self._connection.has_credential = True
        self._there = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD)
        self._reached, self._verdict = target[:2], verdict

    def _leave(self) -> None:
        if self._far is not None:
            self._far.close()
        self._far, self._reached = None, None

    async def _body(self, far: Far) -> None:
        """What the sandbox sends after its head."""
        while True:
            async with asyncio.timeout(BODY_IDLE_S):
                event = await _next(self._near, self._connection.receive)
            if not isinstance(event, h11.Data | h11.EndOfMessage):
                raise Broken
            event = event if isinstance(event, h11.Data) else h11.EndOfMessage()  # without what trails it
            data = self._there.send(event) or b""
            await far.send(data)
            self._connection.sent += len(data)
            if isinstance(event, h11.EndOfMessage):
                return

    async def _answer(self, far: Far, credential: Credential | None) -> None:
        """What the server says to one request."""
        watch = _Watch(credential)
        while True:
            async with asyncio.timeout(BODY_IDLE_S if self._near.their_state in _ENDS else None):
                event = await _next(self._there, far.receive)
            if isinstance(event, h11.InformationalResponse | h11.Response):
                if event.status_code == 101:
                    raise Broken  # nobody asked for another protocol
                headers = heads.forwarded(event.headers, body=False)
                for name, value in headers:
                    watch.see(b"%b: %b\n" % (name, value))
                watch.see(bytes(event.reason) + b"\n")
                kind = type(event)
                told: h11.Event = kind(status_code=event.status_code, reason=event.reason, headers=headers)
            elif isinstance(event, h11.Data):
                watch.see(event.data)
                told = h11.Data(data=event.data)
            elif isinstance(event, h11.EndOfMessage):
                told = h11.EndOfMessage()
            else:
                raise Broken
            try:
                data = self._near.send(told) or b""
            except h11.LocalProtocolError:
                raise Broken from None
            await self._connection.send(data)
            self._connection.received += len(data)
            if isinstance(event, h11.EndOfMessage):
                return

    async def _tell(self, status: int, words: str) -> None:
        """A word of our own, where one can still be said."""
        if self._in_tunnel or self._near.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        text = f"tartarus: {words}\n".encode()
        headers = [("content-type", "text/plain"), ("content-length", str(len(text))), ("connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError, Broken):
            data = self._near.send(h11.Response(status_code=status, headers=headers)) or b""
            data += self._near.send(h11.Data(data=text)) or b""
            await self._connection.send(data)


def _asking(request: h11.Request, target: heads.Target, credential: Credential | None) -> heads.Headers:
    headers = heads.forwarded(request.headers, body=True)
    standing = (80, 443) if credential is not None else (80,)
    host = target.name if target.port in standing else f"{target.name}:{target.port}"
    headers = [(b"host", host.encode()), *heads.without(headers, b"host")]
    if credential is None:
        return headers
    name = credential.header.lower().encode()
    # Not compressed, so that it is seen if the credential comes back.
    added = [(name, credential.value.encode("latin-1")), (b"accept-encoding", b"identity")]
    return [*heads.without(headers, name, b"accept-encoding"), *added]


async def _next(end: h11.Connection, receive: Callable[[], Awaitable[bytes]]) -> object:
    """The next thing that one end says."""
    try:
        while (event := end.next_event()) is h11.NEED_DATA:
            end.receive_data(await receive())
    except h11.RemoteProtocolError as error:
        if end.our_role is h11.CLIENT:
            raise Broken from None
        raise Refusal("limit" if error.error_status_hint == 431 else "malformed") from None
    return event


class _Watch:
    """Looks for a credential in what comes back, piece by piece."""

    def __init__(self, credential: Credential | None) -> None:
        value = b"" if credential is None else credential.value.encode("latin-1")
        # Without the word before it ("Bearer"), which a server may leave out.
        self._wanted = value.rpartition(b" ")[2]
        if len(self._wanted) < _LEAST_SECRET:
            self._wanted = b""
        self._last = b""

    def see(self, piece: bytes | bytearray) -> None:
        """Raises Refusal."""
        if not self._wanted:
            return
        seen = self._last + piece
        if self._wanted in seen:
            raise Refusal("credential")
        self._last = seen[-(len(self._wanted) - 1) :] if len(self._wanted) > 1 else b""
