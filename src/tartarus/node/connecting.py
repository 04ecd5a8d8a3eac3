"""The network of a build's steps: a slot for each, name resolution through the node, and the host's certificates."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from tartarus.images.paths import CA_BUNDLE
from tartarus.model.errors import GuestFailed, Unsupported
from tartarus.model.sandbox import Mount
from tartarus.network.certificates import ca_bundle
from tartarus.network.slot import Slot
from tartarus.node.networking import Networking
from tartarus.node.steps import Connect
from tartarus.runtimes.base import Guest

_NAMING = (
    "SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO",
)  # fmt: skip
"""Variables by which OpenSSL, pip, requests, curl, Node.js and git find certificates."""


class Connection(msgspec.Struct, frozen=True):
    """What a step needs to use the network: files to mount, variables, and what is done once its guest is there."""

    mounts: tuple[Mount, ...] = ()
    env: dict[str, str] = {}
    connect: Connect | None = None


class Connections:
    """Slots for build steps."""

    def __init__(self, networking: Networking) -> None:
        self._networking = networking
        self._slots = networking.slots

    @contextlib.asynccontextmanager
    async def connection(self, *, network: bool, certificates: bool) -> AsyncIterator[Connection]:
        """A step's connection, as long as the context lasts. Raises Unsupported where sandboxes can't have one."""
        mounts: list[Mount] = []
        env: dict[str, str] = {}
        if certificates:
            bundle = ca_bundle(os.environ)
            if bundle is None:
                raise Unsupported("this host has no certificates to show to a build", fix="install ca-certificates")
            mounts.append(self._networking.file("ca.crt", bundle, CA_BUNDLE))
            env = dict.fromkeys(_NAMING, CA_BUNDLE)
        if not network:
            yield Connection(tuple(mounts), env)
            return
        why = self._slots.unavailable()
        if why:
            raise Unsupported(
                "sandboxes can't have a network here", why=why, fix="run the daemon as root, or --network none"
            )
        slot = await self._slots.take()
        try:
            mounts.append(self._networking.file("resolv.conf", slot.resolv_conf, "/etc/resolv.conf"))
            yield Connection(tuple(mounts), env, self._connecting(slot))
        finally:
            await self._slots.give_back(slot)

    def _connecting(self, slot: Slot) -> Connect:
        async def connect(guest: Guest) -> Callable[[], Awaitable[None]]:
            if guest.pidfd < 0:
                raise GuestFailed("the sandbox ended before it was joined to the network")
            process = os.dup(guest.pidfd)
            try:
                await self._slots.attach(slot, process)
            finally:
                os.close(process)

            async def disconnect() -> None:
                await self._slots.give_back(slot)

            return disconnect

        return connect
