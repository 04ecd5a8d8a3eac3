"""Where a log stands when it is opened: what was written is held against what was signed, and a crash's traces mended.

Only the last segment is read. What was before it is known by the edge of its tree, which must have the root that was
signed when the segment began.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import zstandard

from tartarus.model.audit import FIRST_HASH, Written
from tartarus.store.audit import files, merkle
from tartarus.store.audit.entries import hash_of, read_line
from tartarus.store.audit.notes import Checkpoint, Verifier

EDGE = "edge"


class Recovered(NamedTuple):
    """Where a log stands: its tree, the hash of its last entry, its last segment and when that began (milliseconds).

    `signed`: how many entries the last checkpoint covers. `broken`: why the log can't go on.
    """

    tree: merkle.Tree
    previous: str = FIRST_HASH
    segment: Path | None = None
    began_ms: int = 0
    signed: int = 0
    broken: str = ""


def recover(log: Path, verifier: Verifier) -> Recovered:
    """Verify the last segment and go on behind it. A torn last line or note, which a crash leaves, is cut off.

    Raises OSError when the disk can't be read.
    """
    log.mkdir(mode=0o700, exist_ok=True)
    found = files.segments(log)
    leaves = log / "leaves"
    if not found:
        gone = any(path.exists() and path.stat().st_size for path in (leaves, log / "checkpoints"))
        return Recovered(merkle.Tree(), broken="the entries are gone, what was made of them is not" if gone else "")
    last = found[-1]
    try:
        return _go_on(log, found, verifier)
    except (ValueError, msgspec.MsgspecError, zstandard.ZstdError) as error:
        return Recovered(merkle.Tree(), broken=f"{last.name}: {error}")


def write_edge(log: Path, tree: merkle.Tree) -> None:
    """Keep the edge of the tree before a segment that begins."""
    aside = log / f".{EDGE}"
    aside.write_bytes(msgspec.json.encode([tree.size, [part.hex() for part in tree.edge]]))
    aside.rename(log / EDGE)


def check_place(written: Written, index: int, previous: str) -> None:
    """Raise ValueError unless an entry is what it should be there; `previous` may be unknown."""
    if written.sequence != index:
        raise ValueError(f"entry {written.sequence} stands where {index} belongs")
    if previous and written.previous != previous:
        raise ValueError(f"entry {index} does not follow the one before it")
    if hash_of(written) != written.hash:
        raise ValueError(f"entry {index} is not what its hash says")


def _go_on(log: Path, found: Sequence[Path], verifier: Verifier) -> Recovered:
    last = found[-1]
    if last.suffix == ".zst":
        raise ValueError("the segment behind it is gone")
    files.cut_torn_line(last)
    files.cut_torn_note(log / "checkpoints")
    start = files.start_of(last)
    notes = files.last_notes(log / "checkpoints")
    signed = verifier.open(notes[-1]) if notes else None
    if start and (signed is None or signed.size < start):
        raise ValueError(f"the checkpoint of the first {start} entries is gone")
    tree = _tree_before(log, start, found, notes, verifier)
    previous = _last_hash(found[-2]) if len(found) > 1 else ("" if start else FIRST_HASH)
    hashes, began_ms = [], 0
    root = tree.root() if signed is not None and signed.size == start else None
    for index, line in enumerate(files.lines_of(last), start):
        written = read_line(line)
        check_place(written, index, previous)
        previous, began_ms = written.hash, began_ms or written.time_ms
        hashes.append(merkle.leaf_hash(line))
        tree.add(hashes[-1])
        if signed is not None and tree.size == signed.size:
            root = tree.root()
    if signed is not None and signed.size > tree.size:
        raise ValueError(f"entries {tree.size} to {signed.size - 1} were signed and are gone")
    if signed is not None and root != signed.root:
        raise ValueError(f"the first {signed.size} entries are not those that were signed")
    if start and not hashes and not previous:
        raise ValueError("nothing is left to go on from")
    _mend_leaves(log / "leaves", start, hashes)
    return Recovered(tree, previous, last, began_ms, 0 if signed is None else signed.size)


def _tree_before(
    log: Path, start: int, found: Sequence[Path], notes: Sequence[bytes], verifier: Verifier
) -> merkle.Tree:
    """The tree over what is before the last segment: by its edge if that was signed, else of all hashes.

    Hashes that are missing are made anew, of entries that are all still there.
    """
    if not start:
        return merkle.Tree()
    leaves = log / "leaves"
    if not leaves.exists() or leaves.stat().st_size < start * files.HASH_BYTES:
        if files.start_of(found[0]):
            raise ValueError("hashes of entries that were let go are missing")
        made = [merkle.leaf_hash(line) for segment in found[:-1] for line in files.lines_of(segment)]
        _mend_leaves(leaves, 0, made)
    wanted = str(start).encode()
    signed = next((verifier.open(note) for note in reversed(notes) if note.split(b"\n", 2)[1] == wanted), None)
    if signed is not None and (tree := _edge(log)) is not None and _is(tree, signed):
        return tree
    tree = merkle.Tree()
    with files.Leaves(leaves) as stored:
        for index in range(min(start, len(stored))):
            tree.add(stored[index])
    if tree.size != start:
        raise ValueError(f"there are {tree.size} entries before it, and not {start}")
    if signed is not None and not _is(tree, signed):
        raise ValueError(f"the first {start} entries are not those that were signed")
    return tree


def _edge(log: Path) -> merkle.Tree | None:
    try:
        size, edge = msgspec.json.decode((log / EDGE).read_bytes(), type=tuple[int, list[str]])
        return merkle.Tree(size, [bytes.fromhex(part) for part in edge])
    except (OSError, ValueError, msgspec.MsgspecError):
        return None


def _is(tree: merkle.Tree, signed: Checkpoint) -> bool:
    return tree.size == signed.size and tree.root() == signed.root


def _mend_leaves(path: Path, start: int, hashes: Sequence[bytes]) -> None:
    """Have the file of hashes say what the entries say from `start` on."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        wanted, at = b"".join(hashes), start * files.HASH_BYTES
        if os.pread(fd, len(wanted) + 1, at) != wanted:
            os.pwrite(fd, wanted, at)
            os.ftruncate(fd, at + len(wanted))
            os.fsync(fd)
    finally:
        os.close(fd)


def _last_hash(segment: Path) -> str:
    last = b""
    for line in files.lines_of(segment):
        last = line
    return read_line(last).hash
