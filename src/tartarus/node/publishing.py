"""Ports of sandboxes shown on the host (``--publish``), carried over the guest's own channel: it needs no network.

What comes in at the host's side is one connection to the sandbox's loopback each, with flow control both ways.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

import msgspec
import structlog

from tartarus.guest.ports import GuestPort
from tartarus.model.contract import Publish
from tartarus.model.errors import InvalidRequest, TartarusError
from tartarus.node.sandbox import Sandbox

_log = structlog.get_logger("tartarus.node.publishing")
_CHUNK_BYTES = 64 * 1024
_ROOT = "uid-0"
_FIRST_UNPRIVILEGED = 1024
_BACKLOG = 64

Wake = Callable[[Sandbox], Awaitable[object]]


class Published:
    """One sandbox's published ports: taken by `bind`, served from `serve` on, given back by `close`."""

    def __init__(self, sockets: list[tuple[socket.socket, Publish]], wake: Wake) -> None:
        self._sockets = sockets
        self._wake = wake
        self._servers: list[asyncio.Server] = []
        self._carrying: set[asyncio.Task[None]] = set()

    @classmethod
    def bind(cls, tenant: str, wanted: tuple[Publish, ...], wake: Wake) -> Published:
        """Take the ports. Raises InvalidRequest for one that can't be had; none is taken then."""
        sockets: list[tuple[socket.socket, Publish]] = []
        try:
            sockets.extend(_bound(tenant, one) for one in wanted)  # one by one: what came before a failure is there
        except BaseException:
            for sock, _ in sockets:
                sock.close()
            raise
        return cls(sockets, wake)

    @property
    def ports(self) -> tuple[Publish, ...]:
        """What was taken, with the ports that were free."""
        return tuple(one for _, one in self._sockets)

    async def serve(self, sandbox: Sandbox) -> None:
        """Carry connections from now on."""
        for sock, one in self._sockets:
            self._servers.append(await asyncio.start_server(self._carry(sandbox, one.guest), sock=sock))

    def close(self) -> None:
        """Give the ports back and end every connection; safe to repeat."""
        for server in self._servers:
            server.close()
        for sock, _ in self._sockets:
            sock.close()
        for task in self._carrying:
            task.cancel()
        self._servers = []

    def _carry(
        self, sandbox: Sandbox, port: int
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._carrying.add(task)
            try:
                await self._wake(sandbox)
                async with sandbox.connection(port) as stream:
                    await carry(stream, reader, writer)
            except (TartarusError, OSError) as error:
                _log.info("published_connection_failed", sandbox=sandbox.record.id, port=port, error=str(error))
            except asyncio.CancelledError:
                pass  # the port was given back
            finally:
                self._carrying.discard(task)
                writer.transport.abort()

        return connected


async def carry(stream: GuestPort, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes both ways until both sides have ended, or one is gone."""

    async def inwards() -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await stream.write(data)
        stream.close_write()

    async def outwards() -> None:
        while data := await stream.read():
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(inwards())
            group.create_task(outwards())
    except* (TartarusError, OSError) as errors:
        raise errors.exceptions[0] from None
    with contextlib.suppress(OSError):
        await writer.drain()


def _bound(tenant: str, one: Publish) -> tuple[socket.socket, Publish]:
    if 0 < one.port < _FIRST_UNPRIVILEGED and tenant != _ROOT:
        raise InvalidRequest(
            f"port {one.port} can't be published", why="ports below 1024 are root's", fix="use 1024 or above"
        )
    address = ip_address(one.address)
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind((one.address, one.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise InvalidRequest(
            f"{one.address}:{one.port} can't be published", why=error.strerror or str(error), fix="use another port"
        ) from error
    return sock, msgspec.structs.replace(one, port=sock.getsockname()[1])
