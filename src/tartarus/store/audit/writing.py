"""The files of a log as its writer has them: entries, their hashes, checkpoints; one thread's alone.

A log is a directory: ``entries-N.jsonl`` (a segment that begins with entry N; ``.zst`` once the next one has begun),
``leaves`` (the hash of each entry, 32 bytes each: what proofs are made of), ``edge`` (the tree before the last
segment), ``checkpoints`` (signed notes, each ended by an empty line); beside it ``key`` and ``key.pub``. When what is
there does not hold together, the directory is set aside under another name, and a new log begins.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from tartarus.durable import sync_directory
from tartarus.model.audit import FIRST_HASH, AuditEntry, Written
from tartarus.store.audit import files, merkle
from tartarus.store.audit.entries import line_of, place

if TYPE_CHECKING:
    from tartarus.store.audit.notes import Signer

_log = structlog.get_logger("tartarus.audit")
SEGMENT_BYTES = 4 * 1024**2
"""Small enough that a daemon that starts has read its last segment in a moment."""
SEGMENT_MS = 86_400_000
_NEARLY_FULL = (0.95, 0.8)


class Retention(msgspec.Struct, frozen=True):
    """How long entries are kept, in seconds, and how many bytes of segments."""

    seconds: float = 90 * 86400.0
    size_bytes: int = 1024**3


class LogFiles:
    """Made, then opened. `unsigned`: how many entries no checkpoint covers yet."""

    def __init__(self, root: Path, name: str, retention: Retention) -> None:
        self._root = root
        self._log = root / "log"
        self._name = name
        self._retention = retention
        self._tree = merkle.Tree()
        self._previous = FIRST_HASH
        self._segment = self._leaves = -1
        self._segment_bytes = 0
        self._began_ms = 0
        self._signer: Signer | None = None
        self._signed_size = 0

    @property
    def unsigned(self) -> int:
        """How many entries no checkpoint covers yet."""
        return self._tree.size - self._signed_size

    def open(self) -> str:
        """Find out where the log stands; why it had to be set aside, if it had. Raises OSError."""
        # Late: the cryptography costs a daemon that starts 60 ms of CPU, which this thread has beside the rest.
        from tartarus.store.audit import recovery
        from tartarus.store.audit.notes import Signer, Verifier

        broken = ""
        public = self._root / "key.pub"
        with contextlib.suppress(FileNotFoundError, ValueError):
            # A node may get another name; its log keeps the one that it began with.
            self._name = Verifier(public.read_text()).name
        try:
            self._signer = Signer.at(self._root / "key", self._name)
        except ValueError as error:
            broken = str(error)
            (self._root / "key").rename(self._root / f"key.broken-{time.time_ns()}")
            self._signer = Signer.at(self._root / "key", self._name)
        aside = public.with_name(".key.pub")
        aside.write_text(self._signer.verifier_text + "\n")
        aside.rename(public)
        verifier = Verifier(self._signer.verifier_text)
        found = recovery.recover(self._log, verifier)
        broken = broken or found.broken
        if broken:
            self._log.rename(self._root / f"broken-{time.time_ns()}")
            found = recovery.recover(self._log, verifier)
        self._tree, self._previous, self._signed_size = found.tree, found.previous, found.signed
        self._began_ms = found.began_ms
        if found.segment is None:
            self._begin_segment()
        else:
            self._segment = os.open(found.segment, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._segment_bytes = os.fstat(self._segment).st_size
        self._leaves = os.open(self._log / "leaves", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600)
        return broken

    def write(self, batch: Sequence[tuple[AuditEntry, int]]) -> list[Written]:
        """All of a batch, each entry with its milliseconds since 1970, on disk; or nothing of it. Raises OSError."""
        self._rotate_if_due(batch[0][1])
        before = merkle.Tree(self._tree.size, self._tree.edge), self._previous
        lines, leaves, placed = [], [], []
        for entry, time_ms in batch:
            written = place(entry, self._tree.size, time_ms, self._previous)
            line = line_of(written)
            leaf = merkle.leaf_hash(line[:-1])
            self._tree.add(leaf)
            self._previous = written.hash
            lines.append(line)
            leaves.append(leaf)
            placed.append(written)
        try:
            files.write_all(self._segment, b"".join(lines))
            os.fdatasync(self._segment)
            files.write_all(self._leaves, b"".join(leaves))
        except OSError:
            self._tree, self._previous = before
            with contextlib.suppress(OSError):
                os.ftruncate(self._segment, self._segment_bytes)
                os.ftruncate(self._leaves, files.HASH_BYTES * self._tree.size)
            raise
        self._segment_bytes += sum(map(len, lines))
        self._began_ms = self._began_ms or batch[0][1]
        return placed

    def sign(self) -> bytes:
        """Sign where the log has come to; the signed note. Raises OSError."""
        from tartarus.store.audit.notes import Checkpoint

        assert self._signer is not None
        note = self._signer.sign(Checkpoint(self._name, self._tree.size, self._tree.root()))
        fd = os.open(self._log / "checkpoints", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            try:
                files.write_all(fd, note + b"\n")
                os.fsync(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
        self._signed_size = self._tree.size
        return note

    def close(self) -> None:
        """Let go of the files."""
        for fd in (self._segment, self._leaves):
            with contextlib.suppress(OSError):
                os.close(fd)

    def _begin_segment(self) -> None:
        path = self._log / files.segment_name(self._tree.size)
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._segment >= 0:
            os.close(self._segment)
        self._segment, self._segment_bytes, self._began_ms = made, 0, 0
        sync_directory(self._log)

    def _rotate_if_due(self, now_ms: int) -> None:
        if not self._segment_bytes:
            return
        if self._segment_bytes < SEGMENT_BYTES and now_ms - self._began_ms < SEGMENT_MS:
            return
        import zstandard

        from tartarus.store.audit.recovery import write_edge

        self.sign()
        write_edge(self._log, self._tree)
        finished = sorted(self._log.glob("entries-*.jsonl"))
        self._begin_segment()
        for path in finished:
            aside = path.with_name(f".{path.name}.zst")
            with path.open("rb") as source, aside.open("wb") as target:
                zstandard.ZstdCompressor().copy_stream(source, target)
                target.flush()
                os.fsync(target.fileno())
            os.utime(aside, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
            aside.rename(path.with_name(f"{path.name}.zst"))
            path.unlink()
        self._retire(now_ms)

    def _retire(self, now_ms: int) -> None:
        """Let go of the oldest segments that are too old, or too much; their hashes stay, so that proofs still hold.

        That is written down first: a segment that is gone without an entry was taken by somebody else.
        """
        packed = sorted(self._log.glob("entries-*.jsonl.zst"))
        total = sum(path.stat().st_size for path in packed)
        used = total / self._retention.size_bytes
        if level := next((level for level in _NEARLY_FULL if used >= level), None):
            _log.warning("audit_log_nearly_full", percent=round(100 * level), size_bytes=total)
        going = []
        for path in packed:
            found = path.stat()
            if total <= self._retention.size_bytes and now_ms / 1000 - found.st_mtime < self._retention.seconds:
                break
            going.append(path)
            total -= found.st_size
        if not going:
            return
        staying = (files.start_of(path) for path in files.segments(self._log) if path not in going)
        first = str(min(staying))
        entry = AuditEntry(actor="tartarus", tenant="", action=RETENTION, target=first, decision="allow")
        self.write([(entry, now_ms)])
        for path in going:
            path.unlink()


RETENTION = "audit.retention"
"""The action of entries that say from which entry on (`target`) the log still has them."""
