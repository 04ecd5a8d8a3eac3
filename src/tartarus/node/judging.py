"""After a sandbox has ended: it is written down, and the judges say what they think of the run."""

from __future__ import annotations

import asyncio

import structlog

from tartarus.model.sandbox import SandboxRecord
from tartarus.node.auditing import EXEMPT, Auditor
from tartarus.policy.judges import Court

_log = structlog.get_logger("tartarus.node.judging")
_LIMIT_S = 30.0
_CLOSE_S = 5.0


class Afterwards:
    """One node's. Judges that others wrote have a thread, and half a minute: what they do must not hold up the node."""

    def __init__(self, court: Court, audit: Auditor) -> None:
        self._court = court
        self._audit = audit
        self._tasks: set[asyncio.Task[None]] = set()

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
                said = await asyncio.to_thread(self._court.post_hoc, record)
        except TimeoutError:
            _log.error("judges_too_slow", sandbox=record.id, seconds=_LIMIT_S)
            return
        for one in said:
            _log.info("classified", sandbox=record.id, category=one.category, reason=one.reason)
            self._audit.classified(record, one)
