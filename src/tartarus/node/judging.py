"""After a sandbox has ended: it is written down, and the judges say what they think of the run."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import structlog

from tartarus.model.sandbox import SandboxRecord
from tartarus.node.auditing import EXEMPT, Auditor
from tartarus.policy.judges import Classification, Court

_log = structlog.get_logger("tartarus.node.judging")
_LIMIT_S = 30.0
_CLOSE_S = 5.0
_AT_ONCE = 8
"""Runs that are judged beside each other. One that a judge hangs over takes a place for good."""


class Afterwards:
    """One node's. Judges that others wrote have a thread, and half a minute: what they do must not hold up the node.

    Threads of their own, which nothing of the node waits for, not even its end.
    """

    def __init__(self, court: Court, audit: Auditor) -> None:
        self._court = court
        self._audit = audit
        self._tasks: set[asyncio.Task[None]] = set()
        self._free = asyncio.Semaphore(_AT_ONCE)

    def ended(self, record: SandboxRecord) -> None:
        """A sandbox has ended."""
        if record.tenant == EXEMPT:
            return
        self._audit.ended(record)
        if self._court.has_plugins:
            task = asyncio.get_running_loop().create_task(self._judge(record))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give those that still judge a moment."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)

    async def _judge(self, record: SandboxRecord) -> None:
        try:
            async with asyncio.timeout(_LIMIT_S):
                await self._free.acquire()
                said = await self._heard(record)
        except TimeoutError:
            _log.error("judges_too_slow", sandbox=record.id, seconds=_LIMIT_S)
            return
        for one in said:
            _log.info("classified", sandbox=record.id, category=one.category, reason=one.reason)
            self._audit.classified(record, one)

    def _heard(self, record: SandboxRecord) -> asyncio.Future[tuple[Classification, ...]]:
        """What the judges say, in a thread that gives its place back when it ends."""
        loop = asyncio.get_running_loop()
        said: asyncio.Future[tuple[Classification, ...]] = loop.create_future()

        def work() -> None:
            found: tuple[Classification, ...] = ()
            try:
                found = self._court.post_hoc(record)
            finally:
                with contextlib.suppress(RuntimeError):  # the node has ended meanwhile
                    loop.call_soon_threadsafe(settle, found)

        def settle(found: tuple[Classification, ...]) -> None:
            self._free.release()
            if not said.done():
                said.set_result(found)

        try:
            threading.Thread(target=work, name="judges", daemon=True).start()
        except RuntimeError:  # the host has no thread for it
            self._free.release()
            raise
        return said
