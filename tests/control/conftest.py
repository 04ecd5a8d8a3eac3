"""A whole server in this process: real node, real store, real Unix socket, in a temporary state directory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.library import Library

from tartarus.control.api import Api
from tartarus.control.app import make_app
from tartarus.control.hangups import HangupWatcher
from tartarus.control.peers import PeerListener, listen
from tartarus.control.server import Server
from tartarus.model.errors import SandboxNotFound
from tartarus.model.sandbox import Reason
from tartarus.model.settings import Settings
from tartarus.node.service import Node
from tartarus.node.uploads import Uploads
from tartarus.store import SandboxStore
from tartarus.telemetry.metrics import Metrics


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Service:
    """What a test may look at behind the socket."""

    def __init__(self, settings: Settings, api: Api, listener: PeerListener, library: Library) -> None:
        self.settings = settings
        self.api = api
        self.library = library
        self.listener = listener

    def client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=str(self.settings.socket))
        return httpx.AsyncClient(transport=transport, base_url="http://tartarus", timeout=60)


@contextlib.contextmanager
def state_directory() -> Iterator[Path]:
    """A place that sandboxes' unprivileged users can pass through, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="tartarus-test-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@contextlib.asynccontextmanager
async def serving(**limits: Any) -> AsyncIterator[Service]:
    """A server for as long as the context lasts; `limits` are its uploads'."""
    with state_directory() as home:
        settings = msgspec.structs.replace(Settings.at(home), node_name="test")
        store = await SandboxStore.open(settings.database)
        metrics = Metrics(settings.node_name)
        node = Node(settings, store, metrics)
        await node.start()
        hangups = HangupWatcher()
        stop, ready = asyncio.Event(), asyncio.Event()
        uploads = Uploads(settings.cache_dir / "uploads", **limits)
        uploads.open()
        library = Library(uploads)
        api = Api(
            settings, store, node, metrics, hangups, uploads=uploads, modules=node.modules, templates=library.templates,
            snapshots=library.snapshots, policies=node.policies, audit=node.audit, started_at=time.time(), shut_down=stop.set,
        )  # fmt: skip
        listener = listen(settings.socket, frozenset({os.geteuid()}))

        async def drain() -> None:
            await node.stop(Reason.NODE_DRAIN)

        server = Server(make_app(api), stop=stop, drain=drain, grace_s=2)
        running = asyncio.create_task(server.run_on(listener, ready.set))
        await ready.wait()
        yield Service(settings, api, listener, library)
        stop.set()
        await running
        hangups.close()
        uploads.close()
        await store.close()


@pytest.fixture(scope="module")
async def shared(anyio_backend: str) -> AsyncIterator[Service]:
    async with serving() as service:
        yield service


@pytest.fixture
async def service(shared: Service) -> AsyncIterator[Service]:
    """The module's server, without a sandbox or a record before and after each test."""
    yield shared
    for record in await shared.api.store.alive():
        with contextlib.suppress(SandboxNotFound):  # it ended between the two looks
            await shared.api.node.live(record.tenant, record.id).kill(reason=Reason.USER_REQUEST)
    await shared.api.store.prune(time.time() + 1)
    shared.listener.allowed = frozenset({os.geteuid()})


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.client() as client:
        yield client
