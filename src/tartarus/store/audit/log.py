"""The log's one writer: a thread that appends, flushes in batches, and signs where the log has come to."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import structlog

from tartarus.model.audit import AuditEntry, Written
from tartarus.model.errors import DaemonUnavailable, TartarusError
from tartarus.store.audit.witnesses import Witness, Witnessing
from tartarus.store.audit.writing import LogFiles, Retention

_log = structlog.get_logger("tartarus.audit")
FLUSH_ENTRIES = 100
FLUSH_S = 0.5
CHECKPOINT_ENTRIES = 1000
CHECKPOINT_S = 60.0
_MAX_WAITING = 100_000
_MOST_OF_A_TENANT = 20_000
"""Of those that wait: whoever asks faster than the disk writes is refused before the others are."""
_LOOK_S = 0.005
_RETRY_S = 0.1
_RETRY_MAX_S = 5.0
BREAK = "audit.break"
"""The action of the entry that begins a log in the place of one that did not hold together."""
GAP = "audit.gap"
"""The action of the entry that says how many were lost, and whose, because the disk could not keep up."""


class _Waiting(NamedTuple):
    entry: AuditEntry
    time_ms: int
    future: asyncio.Future[Written] | None


class AuditLog:
    """Appends entries. Made with `open`; used in the loop that opened it."""

    def __init__(
        self, root: Path, name: str, *, witness: Witness | None = None, retention: Retention | None = None
    ) -> None:
        self._root = root
        self._files = LogFiles(root, name, retention or Retention())
        self._witnessing = None if witness is None else Witnessing(witness)
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._since = 0.0
        self._urgent = self._closing = self._begun = False
        self._stop = threading.Event()
        self._failure: OSError | None = None
        self._taken = self._written = 0
        self._waiting_of: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._signed_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        self._lock = -1

    @classmethod
    async def open(
        cls, root: Path, name: str, *, witness: Witness | None = None, retention: Retention | None = None
    ) -> AuditLog:
        """Open the log, or begin one. What does not hold together is set aside, and the new log's first entry says so.

        Its last segment is verified while entries are already taken: nothing is written before that is done. Raises
        DaemonUnavailable when another process writes it, or the disk can't.
        """
        log = cls(root, name, witness=witness, retention=retention)
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            log._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(log._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if log._lock >= 0:
                os.close(log._lock)
            raise DaemonUnavailable(
                "the audit log can't be opened", why=str(error), fix="look at its directory"
            ) from error
        log._thread.start()
        return log

    def add(self, entry: AuditEntry) -> None:
        """Take an entry, which is on disk within half a second. Raises DaemonUnavailable when the log takes none."""
        self._take(entry, None)

    async def append(self, entry: AuditEntry, *, durable: bool = False) -> None:
        """Write an entry down; `durable` waits until it is on disk, as decisions about security must be before the act.

        Raises DaemonUnavailable when the log is closed or can't be written.
        """
        if not durable:
            self._take(entry, None)
            return
        future: asyncio.Future[Written] = self._loop.create_future()
        self._take(entry, future)
        await future

    async def flush(self) -> None:
        """Returns once everything that was added is on disk. Raises DaemonUnavailable when it can't be written.

        A log that was just opened may still be set aside; who reads it must not find it half gone.
        """
        while not self._begun and not self._closing:
            if self._failure is not None:
                raise _unwritten(self._failure)
            await asyncio.sleep(_LOOK_S)
        with self._changed:
            wanted = self._taken + len(self._lost)
            self._urgent = self._urgent or bool(self._waiting)
            self._changed.notify()
        while self._written < wanted:
            if self._failure is not None:
                raise _unwritten(self._failure)
            await asyncio.sleep(_LOOK_S)

    async def close(self) -> None:
        """Write what waits, sign, and let go of the files."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._stop.set()
        await asyncio.to_thread(self._thread.join)

    def _take(self, entry: AuditEntry, future: asyncio.Future[Written] | None) -> None:
        with self._changed:
            # What is waited for comes only as fast as it is written, and is not kept out by what is not.
            greedy = future is None and self._waiting_of[entry.tenant] >= _MOST_OF_A_TENANT
            if self._closing or greedy or len(self._waiting) >= _MAX_WAITING:
                if not self._closing:
                    self._lost[entry.tenant if greedy else ""] += 1
                    self._urgent = True
                    self._changed.notify()
                raise DaemonUnavailable(
                    "the audit log takes no entry",
                    why="too many of yours are still to be written" if greedy
                    else "it is closed, or its disk can't keep up",
                    fix="try again in a moment" if greedy else "make room on its disk",
                )  # fmt: skip
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting.append(_Waiting(entry, time.time_ns() // 1_000_000, future))
            self._taken += 1
            if entry.tenant:
                self._waiting_of[entry.tenant] += 1
            count = len(self._waiting)
            if future is not None or count == FLUSH_ENTRIES:
                self._urgent = True
            if self._urgent or count == 1:
                self._changed.notify()

    # From here on: the thread.

    def _work(self) -> None:
        try:
            if self._begin():
                self._go_on()
        except Exception as error:
            # Nobody may wait for a thread that is gone, or go on as if it wrote.
            _log.exception("audit_log_ended")
            with self._changed:
                self._closing = True
            self._failed(list(self._waiting), OSError(f"{type(error).__name__}: {error}"))
            raise
        finally:
            if self._witnessing is not None:
                self._witnessing.close()
            self._files.close()
            os.close(self._lock)

    def _begin(self) -> bool:
        """Find out where the log stands, as often as it takes; False when it is closed before that could be done."""
        delay_s = _RETRY_S
        while True:
            try:
                broken = self._files.open()
            except OSError as error:
                self._failed(list(self._waiting), error)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)
                if self._stop.wait(delay_s):
                    return False
                continue
            if broken:
                _log.error("audit_log_broken", why=broken)
                entry = AuditEntry(actor="tartarus", tenant="", action=BREAK, decision="error", reason=broken)
                with self._changed:
                    self._waiting.insert(0, _Waiting(entry, time.time_ns() // 1_000_000, None))
                    self._taken += 1
                    self._urgent = True
            self._begun = True
            return True

    def _go_on(self) -> None:
        delay_s = _RETRY_S
        while True:
            batch, closing = self._next()
            try:
                if batch:
                    self._write(batch)
                due = self._files.unsigned >= CHECKPOINT_ENTRIES or self._sign_in() <= 0
                if self._files.unsigned and (due or closing):
                    self._sign()
            except OSError as error:
                self._failed(batch, error)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)
                if closing or self._stop.wait(delay_s):
                    _log.error("audit_entries_lost", count=len(self._waiting))
                    return
                continue
            self._failure, delay_s = None, _RETRY_S
            with self._changed:
                if closing and not self._waiting:
                    return

    def _next(self) -> tuple[list[_Waiting], bool]:
        """Wait until there is something to do: a batch that is due, a checkpoint, or the end."""
        with self._changed:
            while not self._urgent and not self._closing:
                if self._waiting:
                    left_s = self._since + FLUSH_S - time.monotonic()
                elif self._files.unsigned:
                    left_s = self._sign_in()
                else:
                    self._changed.wait()
                    continue
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            self._urgent = False
            for tenant, lost in self._lost.items():
                whose = f" of {tenant}" if tenant else ""
                reason = f"{lost} entries{whose} were lost: the disk could not keep up"
                entry = AuditEntry(actor="tartarus", tenant=tenant, action=GAP, decision="error", reason=reason)
                self._waiting.append(_Waiting(entry, time.time_ns() // 1_000_000, None))
                self._taken += 1
                self._waiting_of[tenant] += 1
            self._lost.clear()
            return list(self._waiting), self._closing

    def _sign_in(self) -> float:
        return self._signed_at + CHECKPOINT_S - time.monotonic()

    def _write(self, batch: list[_Waiting]) -> None:
        placed = self._files.write([(one.entry, one.time_ms) for one in batch])
        with self._changed:
            del self._waiting[: len(batch)]
            self._waiting_of = Counter(one.entry.tenant for one in self._waiting if one.entry.tenant)
            self._written += len(batch)
            self._since = time.monotonic()
        for one, written in zip(batch, placed, strict=True):
            if one.future is not None:
                self._answer(one.future, written)

    def _sign(self) -> None:
        note = self._files.sign()
        self._signed_at = time.monotonic()
        if self._witnessing is not None:
            self._witnessing.tell(note)

    def _failed(self, batch: list[_Waiting], error: OSError) -> None:
        """Whoever waits for an entry to be on disk must not act; the entries themselves stay and are written later."""
        _log.error("audit_not_written", error=str(error), waiting=len(batch))
        self._failure = error
        for one in batch:
            if one.future is not None:
                self._answer(one.future, _unwritten(error))

    def _answer(self, future: asyncio.Future[Written], answer: Written | TartarusError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(_settle, future, answer)


def _unwritten(error: OSError) -> TartarusError:
    return DaemonUnavailable("the audit log can't be written", why=str(error), fix="make room on its disk")


def _settle(future: asyncio.Future[Written], answer: Written | TartarusError) -> None:
    if future.done():
        return
    if isinstance(answer, TartarusError):
        future.set_exception(answer)
    else:
        future.set_result(answer)
