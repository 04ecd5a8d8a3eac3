"""The log's one writer: a thread that appends, flushes in batches, and signs where the log has come to.

A log is a directory: ``entries-N.jsonl`` (a segment that begins with entry N; ``.zst`` once the next one has begun),
``leaves`` (the hash of each entry, 32 bytes each: what proofs are made of, and made anew from the entries if it is
lost), ``checkpoints`` (signed notes, one after another, each ended by an empty line) and ``key``. When what is there
does not hold together, the directory is set aside under another name and a new log begins, which says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import zstandard

from tartarus.model.errors import DaemonUnavailable, TartarusError
from tartarus.store.audit import merkle, reading
from tartarus.store.audit.entries import FIRST_HASH, AuditEntry, Written, line_of, place
from tartarus.store.audit.notes import Checkpoint, Signer

_log = structlog.get_logger("tartarus.audit")
FLUSH_ENTRIES = 100
FLUSH_S = 0.5
CHECKPOINT_ENTRIES = 1000
CHECKPOINT_S = 60.0
SEGMENT_BYTES = 64 * 1024**2
RETENTION_S = 90 * 86400.0
RETENTION_BYTES = 1024**3
_MAX_WAITING = 100_000

Witness = Callable[[bytes], None]
"""Takes each signed checkpoint to a second place. What it raises is logged, and the checkpoint is tried again."""


class AuditLog:
    """Appends entries. Made with `open`; `append` is called in the loop that opened it."""

    def __init__(self, root: Path, name: str, *, witness: Witness | None = None) -> None:
        self._root = root
        self._name = name
        self._witness = witness
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._waiting: list[tuple[AuditEntry, int, asyncio.Future[Written] | None]] = []
        self._urgent = False
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        self._tree = merkle.Tree()
        self._previous = FIRST_HASH
        self._unsigned = 0
        self._signed_at = time.monotonic()
        self._segment = -1
        self._segment_bytes = 0
        self._leaves = -1
        self._lock = -1
        self._unwitnessed: bytes | None = None

    @classmethod
    async def open(cls, root: Path, name: str, *, witness: Witness | None = None) -> AuditLog:
        """Open the log, or begin one. Its last segment is verified first; what does not hold is set aside, and said.

        Raises DaemonUnavailable when another process writes it, or the disk can't.
        """
        log = cls(root, name, witness=witness)
        try:
            broken = await asyncio.to_thread(log._prepare)
        except OSError as error:
            raise DaemonUnavailable(
                "the audit log can't be opened", why=str(error), fix="look at its directory"
            ) from error
        log._thread.start()
        if broken:
            _log.error("audit_log_broken", why=broken)
            entry = AuditEntry(actor="tartarus", tenant="", action="audit.break", decision="error", reason=broken)
            await log.append(entry, durable=True)
        return log

    async def append(self, entry: AuditEntry, *, durable: bool = False) -> None:
        """Write an entry down; `durable` waits until it is on disk, as decisions about security must be before the act.

        Others are on disk within half a second. Raises DaemonUnavailable when the log is closed or can't be written.
        """
        future: asyncio.Future[Written] | None = self._loop.create_future() if durable else None
        with self._changed:
            if self._closing or len(self._waiting) >= _MAX_WAITING:
                raise DaemonUnavailable(
                    "the audit log takes no entry",
                    why="it is closed, or its disk can't keep up",
                    fix="look at its disk",
                )
            self._waiting.append((entry, time.time_ns() // 1_000_000, future))
            if durable or len(self._waiting) >= FLUSH_ENTRIES:
                self._urgent = self._urgent or durable or len(self._waiting) == FLUSH_ENTRIES
                self._changed.notify()
        if future is not None:
            await future

    async def close(self) -> None:
        """Write what waits, sign, and let go of the files."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _prepare(self) -> str:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._signer = Signer.at(self._root / "key", self._name)
        (self._root / "key.pub").write_text(self._signer.verifier_text + "\n")
        found = reading.recover(self._root / "log")
        if found.broken:
            (self._root / "log").rename(self._root / f"broken-{time.time_ns()}")
            found = reading.recover(self._root / "log")._replace(broken=found.broken)
        self._tree, self._previous = found.tree, found.previous
        self._begin_segment() if not found.segment else self._go_on(found.segment)
        self._leaves = os.open(
            self._root / "log" / "leaves", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600
        )
        return found.broken

    def _go_on(self, segment: Path) -> None:
        self._segment = os.open(segment, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._segment_bytes = os.fstat(self._segment).st_size

    def _begin_segment(self) -> None:
        path = self._root / "log" / f"entries-{self._tree.size:012d}.jsonl"
        if self._segment >= 0:
            os.close(self._segment)
        self._segment = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._segment_bytes = 0
        _sync_directory(path.parent)

    def _work(self) -> None:
        delay_s = 0.0
        while True:
            with self._changed:
                if not self._urgent and not self._closing:
                    self._changed.wait(FLUSH_S)
                batch, self._urgent, closing = list(self._waiting), False, self._closing
            try:
                if batch:
                    self._write(batch)
                    with self._changed:
                        del self._waiting[: len(batch)]
                self._sign_if_due(closing=closing)
                delay_s = 0.0
            except OSError as error:
                # The batch stays where it is: nothing that was said is forgotten while we live.
                _log.error("audit_not_written", error=str(error), waiting=len(batch))
                self._refuse_durable(batch, error)
                delay_s = min(max(2 * delay_s, 0.1), 5.0)
                if closing:
                    break
                time.sleep(delay_s)
                continue
            with self._changed:
                if closing and not self._waiting:
                    break
        for fd in (self._segment, self._leaves, self._lock):
            with contextlib.suppress(OSError):
                os.close(fd)

    def _write(self, batch: list[tuple[AuditEntry, int, asyncio.Future[Written] | None]]) -> None:
        """All of a batch, on disk, or nothing of it."""
        if self._segment_bytes >= SEGMENT_BYTES:
            self._rotate()
        size, edge, previous, at = self._tree.size, list(self._tree.edge), self._previous, self._segment_bytes
        lines, leaves, placed = [], [], []
        for entry, time_ms, _ in batch:
            written = place(entry, self._tree.size, time_ms, self._previous)
            line = line_of(written)
            leaf = merkle.leaf_hash(line[:-1])
            self._tree.add(leaf)
            self._previous = written.hash
            lines.append(line)
            leaves.append(leaf)
            placed.append(written)
        try:
            _write_all(self._segment, b"".join(lines))
            os.fdatasync(self._segment)
            _write_all(self._leaves, b"".join(leaves))
        except OSError:
            self._tree, self._previous = merkle.Tree(size, edge), previous
            with contextlib.suppress(OSError):
                os.ftruncate(self._segment, at)
                os.ftruncate(self._leaves, 32 * size)
            raise
        self._segment_bytes += sum(map(len, lines))
        self._unsigned += len(batch)
        for (_, _, future), written in zip(batch, placed, strict=True):
            if future is not None:
                self._loop.call_soon_threadsafe(_settle, future, written)

    def _refuse_durable(
        self, batch: list[tuple[AuditEntry, int, asyncio.Future[Written] | None]], error: OSError
    ) -> None:
        """Whoever waits for an entry to be on disk must not act; the entry itself stays and is written later."""
        failure = DaemonUnavailable("the audit log can't be written", why=str(error), fix="make room on its disk")
        for _, _, future in batch:
            if future is not None:
                self._loop.call_soon_threadsafe(_fail, future, failure)

    def _rotate(self) -> None:
        self._sign()
        finished = sorted((self._root / "log").glob("entries-*.jsonl"))
        self._begin_segment()
        for path in finished:
            aside = path.with_name(f".{path.name}.zst")
            with path.open("rb") as source, aside.open("wb") as target:
                zstandard.ZstdCompressor().copy_stream(source, target)
                target.flush()
                os.fsync(target.fileno())
            aside.rename(path.with_name(f"{path.name}.zst"))
            path.unlink()
        self._retire()

    def _retire(self) -> None:
        """Let go of the oldest segments that are too old, or too much; their hashes stay, so that proofs still hold."""
        segments = sorted((self._root / "log").glob("entries-*.jsonl.zst"))
        total = sum(path.stat().st_size for path in segments)
        for path in segments:
            found = path.stat()
            if total <= RETENTION_BYTES and time.time() - found.st_mtime < RETENTION_S:
                break
            path.unlink()
            total -= found.st_size
            entry = AuditEntry(actor="tartarus", tenant="", action="audit.retention", target=path.name)
            with self._changed:
                self._waiting.append((entry, time.time_ns() // 1_000_000, None))

    def _sign_if_due(self, *, closing: bool) -> None:
        due = self._unsigned >= CHECKPOINT_ENTRIES or time.monotonic() - self._signed_at >= CHECKPOINT_S
        if self._unsigned and (due or closing):
            self._sign()
        if self._unwitnessed is not None:
            self._tell_witness(self._unwitnessed)

    def _sign(self) -> None:
        note = self._signer.sign(Checkpoint(self._name, self._tree.size, self._tree.root()))
        with open(self._root / "log" / "checkpoints", "ab") as file:
            file.write(note + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._unsigned, self._signed_at = 0, time.monotonic()
        if self._witness is not None:
            self._unwitnessed = note

    def _tell_witness(self, note: bytes) -> None:
        assert self._witness is not None
        try:
            self._witness(note)
        except (OSError, TartarusError) as error:
            _log.error("audit_not_witnessed", error=str(error))
        else:
            self._unwitnessed = None


def file_witness(path: Path) -> Witness:
    """Appends each checkpoint to a file, which belongs on another disk or host."""

    def witness(note: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, note + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)

    return witness


def _settle(future: asyncio.Future[Written], written: Written) -> None:
    if not future.done():
        future.set_result(written)


def _fail(future: asyncio.Future[Written], error: TartarusError) -> None:
    if not future.done():
        future.set_exception(error)


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
