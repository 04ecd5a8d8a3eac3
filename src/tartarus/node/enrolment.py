"""When a new sandbox is written down.

A commit takes about as long as a start. A sandbox that nobody outside can notice before its creator is answered (no
name that another might take, no directory of the host's to write to, no network, no secrets) is therefore written
down once, when it runs, and its creator gets neither an answer nor a byte of output before that is committed. One with
a network is written down while its guest is made, and joined to the network then. Should
the daemon die before, the next one ends all guests that it finds, written down or not (`node.reconcile`), and nobody
ever heard of this one. A start that takes long is written down while it is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import structlog

from tartarus.model.errors import TartarusError
from tartarus.model.sandbox import Isolation, Reason, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.store.sandboxes import SandboxStore

_log = structlog.get_logger("tartarus.node")
WITHIN_S = 0.05
"""A start that takes longer than this is written down before it is done."""
_QUICK = frozenset({Isolation.PROCESS, Isolation.CONTAINER, Isolation.WASM})
_PATH = (State.SCHEDULED, State.STARTING)
_BEGUN = frozenset({State.STARTING, State.RUNNING})


def may_wait(spec: SandboxSpec, isolation: Isolation) -> bool:
    """Whether a sandbox may be written down after its start: nothing of it is seen before."""
    return isolation in _QUICK and not spec.name and not spec.mounts and not spec.secrets


class Enrolment:
    """One new sandbox's way into the store: `first`, or `when it runs`, and its end should it never run.

    `record` is pending when this is made.
    """

    def __init__(self, store: SandboxStore, record: SandboxRecord) -> None:
        self._store = store
        self._record = record
        self._writing: asyncio.Task[SandboxRecord] | None = None
        self._late: asyncio.TimerHandle | None = None

    async def first(self) -> SandboxRecord:
        """Write it down now, as starting, or wait until that is done. Raises NameTaken, NoSpace."""
        return await asyncio.shield(self._write())

    def meanwhile(self) -> None:
        """Write it down beside what comes next; `first` is awaited before anybody can notice it."""
        self._write()

    def soon(self) -> None:
        """Write it down if it does not run soon."""
        self._late = asyncio.get_running_loop().call_later(WITHIN_S, self._write)

    async def running(self, **changes: Any) -> SandboxRecord:
        """It runs: the record, committed. Raises what the store does."""
        if self._writing is None:
            return await asyncio.shield(self._write(State.RUNNING, **changes))
        await asyncio.shield(self._writing)
        return await self._store.transition(self._record.id, {State.STARTING}, State.RUNNING, **changes)

    async def failed(self, state: State, **changes: Any) -> SandboxRecord:
        """It never ran, or its creator never heard of it: the record of that. Raises what the store does."""
        if self._writing is None:
            return await asyncio.shield(self._write(State.STOPPING, state, **changes))
        # Whoever is cancelled while a change is written does not learn that it was: it may be running in the store.
        with contextlib.suppress(TartarusError):
            await asyncio.shield(self._writing)
        return await self._store.transition(self._record.id, _BEGUN, State.STOPPING, state, **changes)

    async def never_ran(self, message: str, reason: Reason, state: State) -> None:
        """As `failed`; what the store says against it goes to the log, since the sandbox failed for another reason."""
        try:
            await self.failed(state, ended_at=time.time(), reason=reason, message=message)
        except TartarusError as error:
            _log.error("failure_not_stored", sandbox=self._record.id, error=str(error))

    def _write(self, *path: State, **changes: Any) -> asyncio.Task[SandboxRecord]:
        if self._late is not None:
            self._late.cancel()
        if self._writing is None:
            writing = self._store.insert(self._record, *_PATH, *path, **changes)
            self._writing = asyncio.get_running_loop().create_task(writing)
            # Its error is for whoever asks next, and may come to nobody who still waits.
            self._writing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._writing
