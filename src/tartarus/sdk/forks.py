"""What `Sandbox.fork` made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from tartarus.model.errors import TartarusError
from tartarus.model.forking import ForkResult
from tartarus.model.sandbox import SandboxRecord
from tartarus.model.snapshots import SnapshotKind

S = TypeVar("S")


class Forks(Generic[S]):
    """Copies of a sandbox; iterate over it for those that live.

    Attributes:
        sandboxes: the copies that live.
        errors: why the others were not made.
        paused_ms: how long the source stood still, in milliseconds.
        kind: ``memory``, or ``files`` where nothing runs in the copies yet.
        note: what to know about a copy of files; else empty.
    """

    def __init__(self, result: ForkResult, make: Callable[[SandboxRecord], S]) -> None:
        self.sandboxes = [make(child.sandbox) for child in result.children if child.sandbox is not None]
        self.errors: list[TartarusError] = [
            child.error.to_error() for child in result.children if child.error is not None
        ]
        self.paused_ms = result.paused_ms
        self.kind: SnapshotKind = result.kind
        self.note = result.note

    def __iter__(self) -> Iterator[S]:
        return iter(self.sandboxes)

    def __len__(self) -> int:
        return len(self.sandboxes)

    def __repr__(self) -> str:
        return f"<Forks {len(self.sandboxes)} of {self.kind.value}, {len(self.errors)} failed>"
