"""A shop on a test's Internet, and a guest that may reach it through the egress proxy."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

from tests.network.test_contracts import lookup
from tests.network.topology import PUBLIC, World, off
from tests.network.webs import Authority, WebServer, said, secured

from tartarus.network.compiled import Compiled
from tartarus.network.egress.messages import Carried
from tartarus.network.rules import PROXY_PORT
from tartarus.network.slot import Slot

SHOP = "shop.example"
GET = b"GET / HTTP/1.1\r\nHost: shop.example:8080\r\n\r\n"


class Stage:
    """A world with a shop at 443 and 80 of one address, which has other names, too; and a guest that is held to it."""

    def __init__(self, world: World, authority: Authority) -> None:
        self.world = world
        self.trust = authority.trusting()
        serving = authority.serving(SHOP, "evil.example", "other.example")
        self.secure = world.keep(WebServer(world.internet, 443, serving))
        self.plain = world.keep(WebServer(world.internet, 8080))
        self.guest = world.guest()
        world.names.answers |= {SHOP: [PUBLIC], "other.example": [PUBLIC], "evil.example": [PUBLIC]}
        self.carried: list[Carried] = []
        self.pool = world.pool()
        self.slot: Slot | None = None

    @contextlib.asynccontextmanager
    async def held(self, contract: Compiled) -> AsyncIterator[Slot]:
        slot = self.slot = self.guest.slot = await self.pool.take(contract)
        slot.told = self.carried.append
        try:
            await self.pool.attach(slot, self.guest.namespace)
            await off(lambda: lookup(self.guest, SHOP))
            yield slot
        finally:
            await self.pool.give_back(slot)
            await self.pool.close()

    async def tls(self, name: str | None, port: int = 443) -> bytes:
        return await off(lambda: self.guest.run(lambda: secured(PUBLIC, port, name, self.trust)))

    async def begun(self) -> socket.socket:
        """A connection to the shop that stands."""

        def begin() -> socket.socket:
            plain = socket.create_connection((PUBLIC, 443), timeout=5)
            return self.trust.wrap_socket(plain, server_hostname=SHOP)

        return await off(lambda: self.guest.run(begin))

    async def says(self, *pieces: bytes, port: int = 80, until: bytes = b"ok") -> bytes:
        return await off(lambda: self.guest.run(lambda: said(PUBLIC, port, *pieces, until=until)))

    async def asks(self, *pieces: bytes) -> bytes:
        assert self.slot is not None
        gateway = str(self.slot.gateway)
        return await off(lambda: self.guest.run(lambda: said(gateway, PROXY_PORT, *pieces)))


def asked(connection: socket.socket) -> bytes:
    """What comes back on a connection; nothing if it is dead."""
    with contextlib.suppress(OSError):
        connection.sendall(b"x")
        return connection.recv(1000)
    return b""
