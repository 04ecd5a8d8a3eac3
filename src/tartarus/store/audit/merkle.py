"""The Merkle tree of RFC 6962 over the entries: a root that stands for all of them, and short proofs of one.

Algorithms as in RFC 6962, section 2.1, and RFC 9162, sections 2.1.3.2 and 2.1.4.2 (verification).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

Leaf = Callable[[int], bytes]
"""The hash of the leaf at an index."""


def leaf_hash(entry: bytes) -> bytes:
    """The hash of a leaf: of a zero byte and the entry."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node: of a one byte and its children."""
    return hashlib.sha256(b"\1" + left + right).digest()


EMPTY_ROOT = hashlib.sha256(b"").digest()


class Tree:
    """Grows by leaves; keeps one hash for each complete subtree at its right edge, at most 64."""

    def __init__(self, size: int = 0, edge: Sequence[bytes] = ()) -> None:
        """An empty tree, or one that goes on from its size and the complete subtrees of its edge, largest first."""
        if size.bit_count() != len(edge):
            raise ValueError("a tree of that size has another edge")
        self.size = size
        self.edge = list(edge)

    def add(self, leaf: bytes) -> None:
        """Add a leaf's hash."""
        self.edge.append(leaf)
        size = self.size
        while size & 1:
            right = self.edge.pop()
            self.edge.append(node_hash(self.edge.pop(), right))
            size >>= 1
        self.size += 1

    def root(self) -> bytes:
        """The hash of the whole tree."""
        if not self.edge:
            return EMPTY_ROOT
        found = self.edge[-1]
        for subtree in reversed(self.edge[:-1]):
            found = node_hash(subtree, found)
        return found


def range_root(leaf: Leaf, start: int, end: int) -> bytes:
    """The root over the leaves from `start` up to `end`."""
    tree = Tree()
    for index in range(start, end):
        tree.add(leaf(index))
    return tree.root()


def inclusion_proof(leaf: Leaf, index: int, size: int) -> list[bytes]:
    """The path that shows that the leaf at `index` is in the tree of `size` leaves."""
    if not 0 <= index < size:
        raise ValueError("no such leaf")
    return _path(leaf, index, 0, size)


def _path(leaf: Leaf, index: int, start: int, end: int) -> list[bytes]:
    if end - start == 1:
        return []
    middle = start + _split(end - start)
    if index < middle:
        return [*_path(leaf, index, start, middle), range_root(leaf, middle, end)]
    return [*_path(leaf, index, middle, end), range_root(leaf, start, middle)]


def consistency_proof(leaf: Leaf, old: int, size: int) -> list[bytes]:
    """What shows that the tree of `size` leaves begins with the one of `old` leaves."""
    if not 0 < old <= size:
        raise ValueError("no such older tree")
    return _subproof(leaf, old, 0, size, complete=True)


def _subproof(leaf: Leaf, old: int, start: int, end: int, *, complete: bool) -> list[bytes]:
    if old == end - start:
        return [] if complete else [range_root(leaf, start, end)]
    split = _split(end - start)
    middle = start + split
    if old <= split:
        return [*_subproof(leaf, old, start, middle, complete=complete), range_root(leaf, middle, end)]
    return [*_subproof(leaf, old - split, middle, end, complete=False), range_root(leaf, start, middle)]


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << ((size - 1).bit_length() - 1)


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether the proof shows that `leaf` stands at `index` in the tree of that size and root."""
    if not 0 <= index < size:
        return False
    node, last, found = index, size - 1, leaf
    for part in proof:
        if not last:
            return False
        if node & 1 or node == last:
            found = node_hash(part, found)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, part)
        node, last = node >> 1, last >> 1
    return not last and found == root


def verify_consistency(old: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that the tree of `size` and `root` begins with the one of `old` and `old_root`."""
    if not 0 < old <= size:
        return False
    if old == size:
        return not proof and old_root == root
    path = list(proof)
    if not old & (old - 1):
        path.insert(0, old_root)
    if not path:
        return False
    node, last = old - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    first = second = path[0]
    for part in path[1:]:
        if not last:
            return False
        if node & 1 or node == last:
            first, second = node_hash(part, first), node_hash(part, second)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            second = node_hash(second, part)
        node, last = node >> 1, last >> 1
    return not last and first == old_root and second == root
