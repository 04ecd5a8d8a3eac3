"""The progress of work that takes its time, as a stream that its reader can leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from tartarus.model.library import BuildOutput, Progress, StepProgress, StepState

Tell = Callable[[Progress], None]
_MOST_WAITING = 1024
_MOST_WAITING_CHARS = 4 * 1024**2


def _can_be_missed(event: Progress) -> bool:
    return isinstance(event, BuildOutput) or (isinstance(event, StepProgress) and event.state is StepState.UPDATED)


def _chars(event: Progress) -> int:
    return len(event.text) if isinstance(event, BuildOutput | StepProgress) else 0


@contextlib.asynccontextmanager
async def streamed(work: Callable[[Tell], Coroutine[Any, Any, None]]) -> AsyncIterator[AsyncIterator[Progress]]:
    """What `work` tells, as it goes on. It is cancelled, and waited for, when the context is left before its end.

    What a build's steps print, and how far a transfer is, is left out while the reader is far behind: foreign code
    says how much of it there is, and the reader how fast it is taken.
    """
    events: asyncio.Queue[Progress | None] = asyncio.Queue()
    waiting_chars = 0

    def tell(event: Progress) -> None:
        nonlocal waiting_chars
        if _can_be_missed(event) and (events.qsize() >= _MOST_WAITING or waiting_chars >= _MOST_WAITING_CHARS):
            return
        waiting_chars += _chars(event)
        events.put_nowait(event)

    async def run() -> None:
        try:
            await work(tell)
        finally:
            events.put_nowait(None)

    async def told() -> AsyncIterator[Progress]:
        nonlocal waiting_chars
        while (event := await events.get()) is not None:
            waiting_chars -= _chars(event)
            yield event
        await task

    task = asyncio.create_task(run())
    try:
        yield told()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
