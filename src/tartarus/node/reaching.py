"""Connections from the host to a sandbox's own loopback, over its guest's channel: it needs no network for them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tartarus.model.errors import InvalidState
from tartarus.model.states import State
from tartarus.node.networking import refuse_without_loopback

if TYPE_CHECKING:
    from tartarus.guest.channel import GuestChannel
    from tartarus.guest.ports import GuestPort
    from tartarus.model.sandbox import SandboxRecord
    from tartarus.node.networking import Line

MAX_CONNECTIONS = 256
"""At once, to all ports of one sandbox, published or asked for through the API."""


class Reachable:
    """The part of a `Sandbox` that can be connected to."""

    record: SandboxRecord
    channel: GuestChannel
    line: Line | None
    _connections: dict[object, tuple[int, GuestPort] | None]
    """None while one is being opened."""

    @contextlib.asynccontextmanager
    async def connection(self, port: int) -> AsyncIterator[GuestPort]:
        """A connection to a TCP port, as long as the context lasts; it ends when a new contract closes the port.

        Raises InvalidState when nothing listens, the contract does not expose the port, it is paused, or has too many,
        and Unsupported where the sandbox's loopback is not its own.
        """
        refuse_without_loopback(self.record.isolation)
        self._refuse_unexposed(port)
        if self.record.state is State.PAUSED:
            raise InvalidState("can't connect to a port of a sandbox that is paused", fix="resume it first")
        if len(self._connections) >= MAX_CONNECTIONS:
            raise InvalidState(
                "too many connections to this sandbox", why=f"it has {MAX_CONNECTIONS}", fix="close one, and try again"
            )
        key = object()
        self._connections[key] = None
        try:
            stream = await self.channel.open_port(port)
            try:
                self._refuse_unexposed(port)
                self._connections[key] = port, stream
                yield stream
            finally:
                stream.close()
        finally:
            del self._connections[key]

    def end_unexposed(self) -> None:
        """End what is connected to ports that its contract does not expose any more."""
        for one in list(self._connections.values()):
            if one is not None and not self._exposes(one[0]):
                one[1].close()

    def _exposes(self, port: int) -> bool:
        contract = self.record.spec.contract if self.line is None else self.line.contract
        return contract is None or contract.exposes(port)

    def _refuse_unexposed(self, port: int) -> None:
        if not self._exposes(port):
            raise InvalidState(
                f"port {port} of this sandbox is not exposed", why="its contract names those that are",
                fix="add it to exposed_ports",
            )  # fmt: skip
