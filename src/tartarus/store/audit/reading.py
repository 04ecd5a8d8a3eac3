"""Reading a log, beside its writer: looking for entries, verifying all of it, proving one entry."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import zstandard

from tartarus.model.audit import FIRST_HASH, AuditFinding, AuditPage, AuditProof, AuditQuery, AuditVerification, Written
from tartarus.store.audit import files, merkle
from tartarus.store.audit.entries import hash_of, line_of, read_line
from tartarus.store.audit.notes import Checkpoint, Verifier
from tartarus.store.audit.recovery import check_place
from tartarus.store.audit.writing import RETENTION

_MOST_LOOKED_AT = 100_000
_TRIES = 3
_UNREADABLE = (ValueError, OSError, msgspec.MsgspecError, zstandard.ZstdError)


class _Verification:
    """One pass over a log."""

    def __init__(self, log: Path, leaves: files.Leaves, verifier: Verifier, witnessed: Sequence[bytes]) -> None:
        self._log = log
        self._leaves = leaves
        self.findings: list[AuditFinding] = []
        notes, stray = files.notes_of(log / "checkpoints")
        if stray:
            self.findings.append(AuditFinding("checkpoints", f"{stray} bytes belong to no checkpoint"))
        self._notes = [(f"checkpoint {number}", _opened(verifier, note)) for number, note in enumerate(notes)]
        self._notes += [
            (f"witnessed checkpoint {number}", _opened(verifier, note)) for number, note in enumerate(witnessed)
        ]
        self._wanted = {checkpoint.size for _, checkpoint in self._notes if checkpoint is not None}
        self._roots: dict[int, bytes] = {}
        self._tree = merkle.Tree()
        self._previous = ""
        self._promised = 0
        self.first = 0

    @property
    def size(self) -> int:
        """How many entries there are, and were."""
        return self._tree.size

    @property
    def signed(self) -> int:
        """How many entries the last good checkpoint covers."""
        return max((one.size for _, one in self._notes if one is not None and one.size <= self.size), default=0)

    def run(self) -> None:
        """Look at all of it."""
        found = files.segments(self._log)
        try:
            self.first = files.start_of(found[0]) if found else 0
            for index in range(self.first):
                self._add(self._leaves[index] if index < len(self._leaves) else b"")
        except _UNREADABLE as error:
            self.findings.append(AuditFinding("leaves", str(error)))
            return
        for segment in found:
            if not self._read(segment, last=segment is found[-1]):
                return
        self._roots[self.size] = self._tree.root()
        if self._promised < self.first:
            self.findings.append(
                AuditFinding("entries", f"those before {self.first} are gone, and nothing says that they were let go")
            )
        for where, checkpoint in self._notes:
            if checkpoint is None:
                self.findings.append(AuditFinding(where, "it is not signed by this log"))
            elif checkpoint.size > self.size:
                self.findings.append(
                    AuditFinding(where, f"entries {self.size} to {checkpoint.size - 1} were signed and are gone")
                )
            elif self._roots[checkpoint.size] != checkpoint.root:
                self.findings.append(
                    AuditFinding(where, f"the first {checkpoint.size} entries are not those that were signed")
                )
        if len(self._leaves) > self.size:
            self.findings.append(
                AuditFinding("leaves", f"there are hashes of {len(self._leaves) - self.size} entries that are gone")
            )

    def _read(self, segment: Path, *, last: bool) -> bool:
        try:
            if files.start_of(segment) != self.size:
                self.findings.append(AuditFinding(segment.name, f"it should begin with entry {self.size}"))
                return False
            for line in files.lines_of(segment, torn=last):
                self._check(line)
        except _UNREADABLE as error:
            self.findings.append(AuditFinding(f"{segment.name}, entry {self.size}", str(error)))
            return False
        return True

    def _check(self, line: bytes) -> None:
        index = self.size
        written = read_line(line)
        check_place(written, index, self._previous if index else FIRST_HASH)
        leaf = merkle.leaf_hash(line)
        if index < len(self._leaves) and self._leaves[index] != leaf:  # a crash may leave the last ones out
            self.findings.append(AuditFinding(f"entry {index}", "its stored hash is another's"))
        self._add(leaf)
        self._previous = written.hash
        if written.action == RETENTION and written.actor == "tartarus" and written.target.isdigit():
            self._promised = max(self._promised, int(written.target))

    def _add(self, leaf: bytes) -> None:
        if self.size in self._wanted:
            self._roots[self.size] = self._tree.root()
        self._tree.add(leaf)


def verify(root: Path, witnessed: Sequence[bytes] = (), verifier_text: str = "") -> AuditVerification:
    """Check all of a log: every hash, the chain, the tree, every checkpoint, and those that were taken elsewhere.

    `verifier_text`: the log's public key, as somebody kept it; the one that lies beside the log if not given. A log
    whose oldest segments were let go is checked from there on, with the hashes that stayed. Raises ValueError and
    OSError when there is no log, or no key.
    """
    text = verifier_text or _key(root)
    verifier = Verifier(text)
    for _ in range(_TRIES):
        before = _state(root / "log")
        # Hashes and checkpoints are read before the entries: whoever writes meanwhile writes entries first.
        with files.Leaves(root / "log" / "leaves") as leaves:
            run = _Verification(root / "log", leaves, verifier, witnessed)
            run.run()
        if not run.findings or _state(root / "log") == before:
            break  # else segments were packed or let go meanwhile: what was not found may be no loss
    return AuditVerification(run.first, run.size, run.signed, text.strip(), tuple(run.findings))


def prove(root: Path, sequence: int) -> AuditProof:
    """A proof that an entry is in the log as of its last checkpoint. Raises ValueError and OSError."""
    log = root / "log"
    verifier = Verifier(_key(root))
    notes, _ = files.notes_of(log / "checkpoints")
    note = notes[-1] if notes else b""
    checkpoint = _opened(verifier, note) if note else None
    if checkpoint is None or checkpoint.size <= sequence:
        raise ValueError(f"no checkpoint covers entry {sequence} yet; there is one at least every minute")
    segment = max(
        (one for one in files.segments(log) if files.start_of(one) <= sequence), key=files.start_of, default=None
    )
    if segment is None:
        raise ValueError(f"entry {sequence} was let go")
    skipped = sequence - files.start_of(segment)
    line = next(itertools.islice(files.lines_of(segment, torn=True), skipped, None), None)
    if line is None:
        raise ValueError(f"there is no entry {sequence}")
    with files.Leaves(log / "leaves") as leaves:
        path = merkle.inclusion_proof(leaves.__getitem__, sequence, checkpoint.size)
    return AuditProof(read_line(line), checkpoint.size, tuple(part.hex() for part in path), note.decode())


def check_proof(proof: AuditProof, verifier_text: str) -> bool:
    """Whether a proof holds, by the log's public key alone."""
    try:
        checkpoint = Verifier(verifier_text).open(proof.checkpoint.encode())
        path = [bytes.fromhex(part) for part in proof.path]
    except ValueError:
        return False
    leaf = merkle.leaf_hash(line_of(proof.entry)[:-1])
    in_tree = merkle.verify_inclusion(leaf, proof.entry.sequence, checkpoint.size, path, checkpoint.root)
    return in_tree and proof.size == checkpoint.size and hash_of(proof.entry) == proof.entry.hash


def entries(root: Path, start: int = 0) -> Iterator[Written]:
    """Every entry from one on that is still there, the oldest first."""
    found = files.segments(root / "log")
    for number, segment in enumerate(found):
        if number + 1 < len(found) and files.start_of(found[number + 1]) <= start:
            continue
        for line in files.lines_of(segment, torn=number + 1 == len(found)):
            written = read_line(line)
            if written.sequence >= start:
                yield written


def newest(root: Path, before: int | None = None) -> Iterator[Written]:
    """Every entry before one (before none: all) that is still there, the newest first."""
    found = files.segments(root / "log")
    for number, segment in enumerate(reversed(found)):
        if before is not None and files.start_of(segment) >= before:
            continue
        for line in reversed(list(files.lines_of(segment, torn=not number))):
            written = read_line(line)
            if before is None or written.sequence < before:
                yield written


def find(root: Path, query: AuditQuery) -> AuditPage:
    """Entries that match, the newest first. What takes too long to look through is for the next page."""
    found: list[Written] = []
    at = None
    for looked_at, one in enumerate(newest(root, query.before)):
        if one.time_ms < query.since_ms:
            return AuditPage(tuple(found))
        if len(found) == query.limit or looked_at == _MOST_LOOKED_AT:
            return AuditPage(tuple(found), at)
        at = one.sequence
        if query.matches(one):
            found.append(one)
    return AuditPage(tuple(found))


def witnessed(path: Path) -> list[bytes]:
    """The checkpoints that a file's witness kept. Raises OSError."""
    path.stat()
    return files.notes_of(path)[0]


def _state(log: Path) -> tuple[list[Path], int]:
    checkpoints = log / "checkpoints"
    return files.segments(log), checkpoints.stat().st_size if checkpoints.exists() else 0


def _key(root: Path) -> str:
    return (root / "key.pub").read_text()


def _opened(verifier: Verifier, note: bytes) -> Checkpoint | None:
    try:
        return verifier.open(note)
    except ValueError:
        return None
