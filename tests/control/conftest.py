"""A whole server on a real Unix socket, in this process, over a store in a temporary directory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tartarus.control.api import Api
from tartarus.control.app import make_app
from tartarus.control.hangups import HangupWatcher
from tartarus.control.peers import PeerListener, listen
from tartarus.control.server import Server
from tartarus.model.sandbox import Reason
from tartarus.model.settings import Settings
from tartarus.store import SandboxStore
from tartarus.telemetry.metrics import Metrics

from .double import HostNode


class Service:
    """What a test may look at behind the socket."""

    def __init__(
        self, settings: Settings, api: Api, node: HostNode, listener: PeerListener, stop: asyncio.Event
    ) -> None:
        self.settings = settings
        self.listener = listener
        self.api = api
        self.node = node
        self.stop = stop

    def client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=str(self.settings.socket))
        return httpx.AsyncClient(transport=transport, base_url="http://tartarus", timeout=20)


@pytest.fixture
async def service(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Service]:
    settings = Settings.at(tmp_path / "home")
    store = await SandboxStore.open(settings.database)
    metrics = Metrics("test")
    node = HostNode(store, metrics)
    hangups = HangupWatcher()
    stop = asyncio.Event()
    ready = asyncio.Event()
    api = Api(settings, store, node, metrics, hangups, started_at=time.time(), shut_down=stop.set)
    listener = listen(settings.socket, frozenset({os.geteuid()}))

    async def drain() -> None:
        await node.stop(Reason.NODE_DRAIN)

    server = Server(make_app(api), stop=stop, drain=drain, grace_s=2)
    serving = asyncio.create_task(server.run_on(listener, ready.set))
    await ready.wait()
    yield Service(settings, api, node, listener, stop)
    stop.set()
    await serving
    hangups.close()
    await store.close()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.client() as client:
        yield client
