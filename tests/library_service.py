"""The API with the tests' own templates (`tests.library`), served in a thread, for clients that block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.control.conftest import Service, serving


class Served:
    """A running server. `service.library` holds what was asked of it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.home = str(service.settings.state_dir)

    @property
    def uploads(self) -> list[Path]:
        """The files of uploads that wait."""
        return list((self.service.settings.cache_dir / "uploads").glob("*"))

    def reset(self) -> None:
        """Forget what an earlier test made."""
        library = self.service.library
        for kept in (library.templates.own, library.snapshots.own):
            kept.clear()
        for asked in (library.templates.requests, library.templates.received, library.templates.pushes):
            asked.clear()


@contextlib.contextmanager
def served() -> Iterator[Served]:
    """A server for as long as the context lasts."""
    ready = threading.Event()
    found: list[Served] = []
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        async with serving() as service:
            found.append(Served(service))
            loops.append((asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield found[0]
    finally:
        loop, stop = loops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
