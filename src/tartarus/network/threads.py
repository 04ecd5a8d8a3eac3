"""Work that must not be left half done, and blocking work beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Await work that must not be left half done: a caller that is cancelled still waits for its end, which is near."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def in_thread(work: Callable[[], T]) -> T:
    """Blocking work in a worker thread, to its end."""
    return await finish(asyncio.to_thread(work))
