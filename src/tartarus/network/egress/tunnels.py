"""TLS that passes as it is once its name is known, and tunnels that a CONNECT asked for."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable

from tartarus.network.egress import hello
from tartarus.network.egress.connection import BODY_IDLE_S, HEAD_S, IDLE_S, Broken, Connection, dial, receive, send
from tartarus.network.egress.refusal import Refusal
from tartarus.network.egress.relay import Relay

_MOST_LINE = 8192
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]*")


async def carry_tls(connection: Connection, first: bytes) -> None:
    """TLS that was led here: by its own name, and to the address that it was on its way to. Raises Refusal, Broken."""
    assert connection.port is not None
    name, first = await _hello(connection, first)
    verdict = await connection.judged("tls", name, connection.port)
    far = await dial(verdict.addresses, connection.port)
    with far:
        await _tls(connection, far, name, first)


async def open_tunnel(
    connection: Connection, name: str, port: int, stands: Callable[[], Awaitable[None]], first: bytes
) -> bytes:
    """What was asked for by CONNECT; `stands` says that it is there. Raises Refusal, Broken.

    Whatever is spoken in it; but if that is TLS, it is for that very name. If it is HTTP, it is given back: all that
    was said so far.
    """
    verdict = await connection.judged("tunnel", name, port)
    far = await dial(verdict.addresses, port)
    with far:
        await stands()
        if name in verdict.addresses:  # an address, which its contract opens whatever is there
            await _relay(connection, far, first)
            return b""
        while not first and await _who_speaks(connection.sock, far) is connection.sock:
            first = await connection.receive()
            if not first:
                return b""
        if first[:1] == bytes([hello.HANDSHAKE]):
            said, first = await _hello(connection, first)
            if said != name:
                raise Refusal("mismatch")
            await _tls(connection, far, name, first)
            return b""
        while first:
            http = is_http(first)
            if http:
                connection.address = far.getpeername()[0]
                return first
            if http is False:
                break
            first += await _more(connection)
        await _relay(connection, far, first)
        return b""


def is_http(said: bytes) -> bool | None:
    """Whether that is how a request begins, as far as any server could take it for one; None if more must come."""
    line, newline, _ = said.lstrip(b"\r\n").partition(b"\n")
    method = _METHOD.match(line)
    assert method is not None
    rest = line[method.end() :]
    if rest and rest[:1] not in b" \t":
        return False  # no method, for anybody
    if newline or len(line) > _MOST_LINE:
        return b"HTTP/" in line.upper() or method[0].upper() == b"GET"
    return None


async def _more(connection: Connection) -> bytes:
    async with asyncio.timeout(HEAD_S):
        data = await connection.receive()
    if not data:
        raise Broken
    return data


async def _hello(connection: Connection, said: bytes) -> tuple[str, bytes]:
    """The name of a hello that begins with `said`, and all that came of it."""
    async with asyncio.timeout(HEAD_S):
        while (found := hello.server_name(said)) is None:
            data = await connection.receive()
            if not data:
                raise Broken
            said += data
    return found[0], said


async def _tls(connection: Connection, far: socket.socket, name: str, first: bytes) -> None:
    await _pass_on(connection, far, first)
    # A server may ask for another hello, and then that is the one which counts.
    answer = b""
    async with asyncio.timeout(BODY_IDLE_S):
        while (again := hello.asks_again(answer)) is None:
            data = await receive(far)
            if not data:
                return
            answer += data
            connection.received += len(data)
            await connection.send(data)
    if again:
        said, second = await _hello(connection, b"")
        if said != name:
            raise Refusal("mismatch")
        await _pass_on(connection, far, second)
    await _relay(connection, far, b"")


async def _pass_on(connection: Connection, far: socket.socket, data: bytes) -> None:
    await send(far, data)
    connection.sent += len(data)


async def _relay(connection: Connection, far: socket.socket, first: bytes) -> None:
    if first:
        await _pass_on(connection, far, first)
    relay = Relay(connection.sock, far)
    try:
        await relay.run(IDLE_S)
    finally:
        connection.sent += relay.sent
        connection.received += relay.received


async def _who_speaks(near: socket.socket, far: socket.socket) -> socket.socket:
    """Whichever of the two has something to say first."""
    loop = asyncio.get_running_loop()
    speaks: asyncio.Future[socket.socket] = loop.create_future()

    def heard(sock: socket.socket) -> None:
        if not speaks.done():
            speaks.set_result(sock)

    for sock in (near, far):
        loop.add_reader(sock, heard, sock)
    try:
        async with asyncio.timeout(IDLE_S):
            return await speaks
    finally:
        for sock in (near, far):
            loop.remove_reader(sock)
