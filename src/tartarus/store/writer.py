"""One thread that owns one connection: jobs that arrive together share one transaction (group commit).

Each caller awaits its own result, and is answered only after the commit that holds its change. A job
may refuse by raising a TartarusError before it has written anything; only that caller sees it. Any other
failure rolls the whole batch back, and its jobs are run again one by one, so that one bad job
can't take its neighbours with it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from tartarus.model.errors import DaemonUnavailable, TartarusError

T = TypeVar("T")
Job = Callable[[Connection], Any]
# Bounds how long the first caller of a batch waits for the last.
MAX_BATCH = 256


class Worker:
    """A database thread. `run` may be called from any task of the loop that made it."""

    def __init__(self, engine: Engine, name: str, explain: Callable[[Exception], TartarusError]) -> None:
        self._engine = engine
        self._explain = explain
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Job, asyncio.Future[Any]]] = deque()
        self._wake = threading.Semaphore(0)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[Connection], T]) -> T:
        """Run `job` in the next transaction; returns or raises what it did, once committed."""
        if self._closing:
            raise DaemonUnavailable("the state database is closed", why="the daemon is stopping", fix="try again")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.append((job, future))
        self._wake.release()
        return await future

    async def close(self) -> None:
        """Finish what was queued, then end the thread."""
        self._closing = True
        self._wake.release()
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        connection: Connection | None = None
        while True:
            self._wake.acquire()
            batch = self._take()
            if batch:
                try:
                    connection = connection or self._engine.connect()
                    outcomes = self._commit(connection, batch)
                except Exception as error:  # noqa: BLE001 - every waiter must hear of it, and the thread go on
                    outcomes = [(False, self._explain(error))] * len(batch)
                self._answer(batch, outcomes)
            elif self._closing:
                break
        if connection is not None:
            connection.close()

    def _take(self) -> list[tuple[Job, asyncio.Future[Any]]]:
        batch: list[tuple[Job, asyncio.Future[Any]]] = []
        while self._queue and len(batch) < MAX_BATCH:
            batch.append(self._queue.popleft())
        # One permit was taken by the caller; each further job brought one of its own.
        for _ in range(len(batch) - 1):
            self._wake.acquire(blocking=False)
        return batch

    def _commit(self, connection: Connection, batch: list[tuple[Job, Any]]) -> list[tuple[bool, Any]]:
        try:
            with connection.begin():
                return [_attempt(job, connection) for job, _ in batch]
        except SQLAlchemyError as error:
            if len(batch) == 1:
                return [(False, self._explain(error))]
        return [outcome for entry in batch for outcome in self._commit(connection, [entry])]

    def _answer(self, batch: list[tuple[Job, asyncio.Future[Any]]], outcomes: list[tuple[bool, Any]]) -> None:
        futures = [future for _, future in batch]

        def deliver() -> None:
            for future, (succeeded, value) in zip(futures, outcomes, strict=True):
                if future.done():  # its caller was cancelled; the change is made all the same
                    continue
                if succeeded:
                    future.set_result(value)
                else:
                    future.set_exception(value)

        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody is left to hear the answer
            self._queue.clear()


def _attempt(job: Job, connection: Connection) -> tuple[bool, Any]:
    try:
        return True, job(connection)
    except SQLAlchemyError:
        raise
    except Exception as error:  # noqa: BLE001 - it is its caller's, and raised there
        return False, error
