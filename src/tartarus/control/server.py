"""uvicorn on our own socket: no access log, no periodic wake-up, and a stop that lets streams finish."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from tartarus import __version__
from tartarus.control.cutting import CuttableProtocol
from tartarus.control.framing import StreamProtocol

if TYPE_CHECKING:
    import socket

    from litestar import Litestar

    from tartarus.control.peers import PeerListener

# One message carries at most this much of a client's input; a spec's 2 MiB command line must fit in the first.
MAX_MESSAGE_BYTES = 5 * 1024 * 1024


class Server(uvicorn.Server):
    """Serves one application until `stop` is set, then runs `drain`, then ends what still runs.

    uvicorn's own loop wakes up ten times a second to look at a flag and a clock; this one sleeps.
    """

    def __init__(
        self, app: Litestar, *, stop: asyncio.Event, drain: Callable[[], Awaitable[None]], grace_s: float
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=CuttableProtocol,
                ws=StreamProtocol,
                ws_max_size=MAX_MESSAGE_BYTES,
                ws_per_message_deflate=False,
                # A Unix socket tells when its peer is gone; nothing on the way needs to be kept alive.
                ws_ping_interval=None,
                ws_ping_timeout=None,
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                date_header=False,
                server_header=False,
                # On every answer, the handshake's too: a client of another version learns it without asking.
                headers=[("tartarus-version", __version__)],
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=max(1, round(grace_s)),
                backlog=1024,
            )
        )
        self._stop = stop
        self._drain = drain

    async def run_on(self, listener: PeerListener, on_ready: Callable[[], None]) -> None:
        """Serve the listening socket; `on_ready` is called once requests are being answered."""
        self._on_ready = on_ready
        await self.serve(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as usual, with the headers that uvicorn's own loop would set each second."""
        self.server_state.default_headers = list(self.config.encoded_headers)
        await super().startup(sockets)

    async def main_loop(self) -> None:
        """Sleep until told to stop; then refuse new connections and let the node end its sandboxes."""
        self._on_ready()
        await self._stop.wait()
        for server in self.servers:
            server.close()
        await self._drain()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The daemon handles signals itself."""
        yield
