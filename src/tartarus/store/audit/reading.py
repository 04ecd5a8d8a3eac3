"""Reading a log: recovering where it stands, verifying all of it, proving one entry."""

from __future__ import annotations

import collections
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import zstandard

from tartarus.store.audit import merkle
from tartarus.store.audit.entries import FIRST_HASH, Written, hash_of, read_line
from tartarus.store.audit.notes import Checkpoint, Verifier

MAX_LINE = 64 * 1024
_HASH = 32


class Recovered(NamedTuple):
    """Where a log stands: its tree, the hash of its last entry, its last segment; `broken`: why it can't go on."""

    tree: merkle.Tree
    previous: str
    segment: Path | None
    broken: str


class Finding(NamedTuple):
    """One thing that does not hold."""

    where: str
    what: str


class Proof(msgspec.Struct, frozen=True):
    """All that a stranger needs to check an entry, beside the log's public key."""

    entry: Written
    size: int
    path: tuple[str, ...]
    checkpoint: str


def segments(log: Path) -> list[Path]:
    """A log's segments, the oldest first."""
    found = [*log.glob("entries-*.jsonl"), *log.glob("entries-*.jsonl.zst")]
    whole = {path.name.removesuffix(".zst"): path for path in sorted(found, key=lambda path: path.suffix == ".jsonl")}
    return [whole[name] for name in sorted(whole)]


def start_of(segment: Path) -> int:
    """The sequence of its first entry."""
    return int(segment.name.split("-", 1)[1].split(".", 1)[0])


def lines_of(segment: Path) -> Iterator[bytes]:
    """Its lines, without their ends. Raises ValueError for a line that is too long or has no end, and OSError."""
    with segment.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw) if segment.suffix == ".zst" else raw
        with io.BufferedReader(stream) as file:
            while line := file.readline(MAX_LINE):
                if not line.endswith(b"\n"):
                    raise ValueError("a line without an end")
                yield line[:-1]


def recover(log: Path) -> Recovered:
    """Verify the last segment and go on behind it. A torn last line, which a crash leaves, is cut off."""
    log.mkdir(mode=0o700, exist_ok=True)
    found = segments(log)
    leaves = log / "leaves"
    if not found:
        broken = "the entries are gone, their hashes are not" if leaves.exists() and leaves.stat().st_size else ""
        return Recovered(merkle.Tree(), FIRST_HASH, None, broken)
    last = found[-1]
    try:
        if last.suffix != ".zst":
            _cut_torn_line(last)
        start = start_of(last)
        tree = _tree_of_leaves(leaves, start, found)
        previous = _last_hash(found[-2]) if len(found) > 1 else (FIRST_HASH if not start else "")
        hashes = []
        for index, line in enumerate(lines_of(last), start):
            written = read_line(line)
            _check_place(written, index, previous)
            previous = written.hash
            hashes.append(merkle.leaf_hash(line))
        for leaf in hashes:
            tree.add(leaf)
        _mend_leaves(leaves, start, hashes)
        _check_checkpoints(log, tree, leaves)
    except (ValueError, OSError, msgspec.MsgspecError, zstandard.ZstdError) as error:
        return Recovered(merkle.Tree(), FIRST_HASH, None, f"{last.name}: {error}")
    return Recovered(tree, previous, last if last.suffix != ".zst" else None, "")


def verify(root: Path, witnessed: Sequence[bytes] = ()) -> list[Finding]:
    """Check all of a log: every hash, the chain, the tree, every checkpoint, and those that were taken elsewhere.

    A log whose oldest segments were let go is checked from there on, with the hashes that stayed.
    """
    findings: list[Finding] = []
    log = root / "log"
    verifier = Verifier((root / "key.pub").read_text())
    stored = _stored_leaves(log / "leaves")
    found = segments(log)
    first = start_of(found[0]) if found else 0
    tree = merkle.Tree()
    for leaf in stored[:first]:
        tree.add(leaf)
    roots = {tree.size: tree.root()}
    notes = [*_notes(log / "checkpoints"), *witnessed]
    wanted = {checkpoint.size for note in notes if (checkpoint := _opened(verifier, note)) is not None}
    previous = ""
    for segment in found:
        if start_of(segment) != tree.size:
            findings.append(Finding(segment.name, f"it should begin with entry {tree.size}"))
            return findings
        try:
            for line in lines_of(segment):
                index = tree.size
                written = read_line(line)
                _check_place(written, index, previous or written.previous if index else FIRST_HASH)
                leaf = merkle.leaf_hash(line)
                if index < len(stored) and stored[index] != leaf:  # a crash may leave the last ones out
                    findings.append(Finding(f"entry {index}", "its stored hash is another's"))
                tree.add(leaf)
                previous = written.hash
                if tree.size in wanted:
                    roots[tree.size] = tree.root()
        except (ValueError, OSError, msgspec.MsgspecError, zstandard.ZstdError) as error:
            findings.append(Finding(f"{segment.name}, entry {tree.size}", str(error)))
            return findings
    roots[tree.size] = tree.root()
    findings += _check_notes(verifier, notes, roots, tree.size)
    if len(stored) > tree.size:
        findings.append(Finding("leaves", f"there are hashes of {len(stored) - tree.size} entries that are gone"))
    return findings


def prove(root: Path, sequence: int) -> Proof:
    """A proof that an entry is in the log as of its last checkpoint. Raises ValueError."""
    log = root / "log"
    verifier = Verifier((root / "key.pub").read_text())
    covering = [
        (checkpoint, note)
        for note in _notes(log / "checkpoints")
        if (checkpoint := _opened(verifier, note)) is not None and checkpoint.size > sequence
    ]
    if not covering:
        raise ValueError(f"no checkpoint covers entry {sequence} yet; there is one at least every minute")
    checkpoint, note = covering[-1]
    stored = _stored_leaves(log / "leaves")
    segment = max((one for one in segments(log) if start_of(one) <= sequence), key=start_of, default=None)
    if segment is None:
        raise ValueError(f"entry {sequence} was let go")
    line = next(itertools.islice(lines_of(segment), sequence - start_of(segment), None), None)
    if line is None:
        raise ValueError(f"there is no entry {sequence}")
    path = merkle.inclusion_proof(stored.__getitem__, sequence, checkpoint.size)
    return Proof(read_line(line), checkpoint.size, tuple(part.hex() for part in path), note.decode())


def check_proof(proof: Proof, verifier_text: str) -> bool:
    """Whether a proof holds, by the log's public key alone."""
    from tartarus.store.audit.entries import line_of

    try:
        checkpoint = Verifier(verifier_text).open(proof.checkpoint.encode())
        path = [bytes.fromhex(part) for part in proof.path]
    except ValueError:
        return False
    leaf = merkle.leaf_hash(line_of(proof.entry)[:-1])
    in_tree = merkle.verify_inclusion(leaf, proof.entry.sequence, checkpoint.size, path, checkpoint.root)
    return in_tree and proof.size == checkpoint.size and hash_of(proof.entry) == proof.entry.hash


def entries(root: Path) -> Iterator[Written]:
    """Every entry that is still there, the oldest first."""
    for segment in segments(root / "log"):
        for line in lines_of(segment):
            yield read_line(line)


def _check_place(written: Written, index: int, previous: str) -> None:
    if written.sequence != index:
        raise ValueError(f"entry {written.sequence} stands where {index} belongs")
    if previous and written.previous != previous:
        raise ValueError(f"entry {index} does not follow the one before it")
    if hash_of(written) != written.hash:
        raise ValueError(f"entry {index} is not what its hash says")


def _check_checkpoints(log: Path, tree: merkle.Tree, leaves: Path) -> None:
    """The last checkpoint's entries must all be there, and be those that were signed. Raises ValueError."""
    verifier = Verifier((log.parent / "key.pub").read_text())
    notes = _notes(log / "checkpoints")
    if not notes:
        return
    last = verifier.open(notes[-1])
    if last.size > tree.size:
        raise ValueError(f"entries {tree.size} to {last.size - 1} were signed and are gone")
    stored = _stored_leaves(leaves)
    if merkle.range_root(stored.__getitem__, 0, last.size) != last.root:
        raise ValueError(f"the first {last.size} entries are not those that were signed")


def _check_notes(verifier: Verifier, notes: Sequence[bytes], roots: dict[int, bytes], size: int) -> list[Finding]:
    findings = []
    for number, note in enumerate(notes):
        where = f"checkpoint {number}"
        checkpoint = _opened(verifier, note)
        if checkpoint is None:
            findings.append(Finding(where, "it is not signed by this log"))
        elif checkpoint.size > size:
            findings.append(Finding(where, f"entries {size} to {checkpoint.size - 1} were signed and are gone"))
        elif checkpoint.size in roots and roots[checkpoint.size] != checkpoint.root:
            findings.append(Finding(where, f"the first {checkpoint.size} entries are not those that were signed"))
    return findings


def _opened(verifier: Verifier, note: bytes) -> Checkpoint | None:
    try:
        return verifier.open(note)
    except ValueError:
        return None


def _notes(path: Path) -> list[bytes]:
    """The signed notes of a file: text, empty line, signatures, empty line."""
    try:
        parts = path.read_bytes().split(b"\n\n")
    except FileNotFoundError:
        return []
    return [parts[index] + b"\n\n" + parts[index + 1] + b"\n" for index in range(0, len(parts) - 1, 2)]


def _stored_leaves(path: Path) -> list[bytes]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [content[at : at + _HASH] for at in range(0, len(content) - _HASH + 1, _HASH)]


def _tree_of_leaves(leaves: Path, size: int, found: Sequence[Path]) -> merkle.Tree:
    """The tree up to the last segment: of the stored hashes, or made anew from entries that are all still there."""
    stored = _stored_leaves(leaves)
    tree = merkle.Tree()
    if len(stored) < size:
        if start_of(found[0]):
            raise ValueError("hashes of entries that were let go are missing")
        stored = [merkle.leaf_hash(line) for segment in found[:-1] for line in lines_of(segment)]
        _mend_leaves(leaves, 0, stored)
    for leaf in stored[:size]:
        tree.add(leaf)
    if tree.size != size:
        raise ValueError(f"there are {tree.size} entries before it, and not {size}")
    return tree


def _mend_leaves(path: Path, start: int, hashes: Sequence[bytes]) -> None:
    """Have the file of hashes say what the entries say from `start` on."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        wanted = b"".join(hashes)
        if os.pread(fd, len(wanted) + 1, start * _HASH) != wanted:
            os.pwrite(fd, wanted, start * _HASH)
            os.ftruncate(fd, start * _HASH + len(wanted))
            os.fsync(fd)
    finally:
        os.close(fd)


def _last_hash(segment: Path) -> str:
    (last,) = collections.deque(lines_of(segment), maxlen=1)
    return read_line(last).hash


def _cut_torn_line(segment: Path) -> None:
    fd = os.open(segment, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        tail = os.pread(fd, MAX_LINE, max(0, size - MAX_LINE))
        if tail and not tail.endswith(b"\n"):
            os.ftruncate(fd, size - len(tail) + tail.rfind(b"\n") + 1)
            os.fsync(fd)
    finally:
        os.close(fd)
