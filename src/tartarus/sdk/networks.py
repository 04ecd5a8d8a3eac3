"""The short forms of what a sandbox may reach and of what it shows: ``--network``, ``--allow``, ``--publish``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from tartarus.model.contract import OPEN, Contract, NetworkState, Publish, parse_allow, parse_publish
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Network, SandboxRecord
from tartarus.sdk import network_calls
from tartarus.sdk.http import target

if TYPE_CHECKING:
    from tartarus.sdk.async_client import AsyncClient
    from tartarus.sdk.client import Client


class PortAddress(msgspec.Struct, frozen=True):
    """Where a sandbox's port is to be found through the API, for HTTP clients that can use a Unix socket.

    Attributes:
        url: what its paths are added to; it ends with a slash.
        websocket_url: the same for WebSockets.
        socket: the path of the daemon's socket, which the URLs' host stands for.
    """

    url: str
    websocket_url: str
    socket: str


def _address(record: SandboxRecord, port: int, socket: str) -> PortAddress:
    if not 0 < port < 65536:
        raise InvalidRequest(f"{port} is no port", fix="ports are 1 to 65535")
    path = target("sandboxes", record.id, "ports", str(port))
    return PortAddress(f"http://tartarus{path}/", f"ws://tartarus{path}/", socket)


class Networked:
    """The part of a `Sandbox` that is about its network."""

    _record: SandboxRecord
    _client: Client

    def network(self) -> NetworkState:
        """The contract it is held to, and what its network did."""
        return self._client.transport.call(network_calls.state(self._record.id))

    def swear(self, contract: Contract) -> NetworkState:
        """Hold it to another contract, from one moment on; what that does not open any more ends then."""
        return self._client.transport.call(network_calls.swear(self._record.id, contract))

    def port(self, port: int) -> PortAddress:
        """Where what it serves on that port of its loopback is to be found; it takes no network.

        ``httpx.Client(transport=httpx.HTTPTransport(uds=address.socket), base_url=address.url)`` asks it.
        """
        return _address(self._record, port, self._client.transport.places.socket)


class AsyncNetworked:
    """The part of an `AsyncSandbox` that is about its network."""

    _record: SandboxRecord
    _client: AsyncClient

    async def network(self) -> NetworkState:
        """The contract it is held to, and what its network did."""
        return await self._client.transport.call(network_calls.state(self._record.id))

    async def swear(self, contract: Contract) -> NetworkState:
        """Hold it to another contract, from one moment on; what that does not open any more ends then."""
        return await self._client.transport.call(network_calls.swear(self._record.id, contract))

    def port(self, port: int) -> PortAddress:
        """Where what it serves on that port of its loopback is to be found; it takes no network.

        ``httpx.Client(transport=httpx.HTTPTransport(uds=address.socket), base_url=address.url)`` asks it.
        """
        return _address(self._record, port, self._client.transport.places.socket)


def network_fields(network: str | Contract, allow: Sequence[str]) -> tuple[Network, Contract | None]:
    """The mode, and the contract if there is one. Raises InvalidRequest."""
    grants = tuple(parse_allow(text) for text in allow)
    if isinstance(network, Contract):
        return Network.CONTRACT, msgspec.structs.replace(network, grants=(*network.grants, *grants))
    if network not in {"none", "open"}:
        raise InvalidRequest(f"{network!r} is no network", fix="use none, open, or a Contract")
    if not grants:
        return Network(network), None
    base = OPEN if network == "open" else Contract()
    return Network.CONTRACT, msgspec.structs.replace(base, grants=grants)


def network_words(network: str, allow: Sequence[str]) -> tuple[Network, Contract | None]:
    """The same for ``--network`` and ``--allow``, where a network may also be a contract's file."""
    return network_fields(network if network in {"none", "open"} else read_contract(network), allow)


def sworn(network: str, allow: Sequence[str]) -> Contract:
    """A contract to swear, from the same words."""
    mode, contract = network_words(network, allow)
    return contract or (OPEN if mode is Network.OPEN else Contract())


def published(one: str | int | Publish) -> Publish:
    """One port to show: a number is that port on both sides. Raises InvalidRequest."""
    if isinstance(one, Publish):
        return one
    return Publish(guest=one, port=one) if isinstance(one, int) else parse_publish(one)


def publish_fields(text: str) -> dict[str, Any]:
    """What ``--publish`` says, as JSON. Raises InvalidRequest."""
    return msgspec.structs.asdict(parse_publish(text))


def read_contract(path: str) -> Contract:
    """A contract from a file (YAML or JSON). Raises InvalidRequest with the line, and FileFailed."""
    from tartarus.model.structured_yaml import MAX_FILE_BYTES, StructReader
    from tartarus.sdk.wholefile import read_whole

    reader = StructReader(path, Contract, see="see docs/network.md for every key", holds="one contract")
    return reader.read(read_whole(path, MAX_FILE_BYTES))
