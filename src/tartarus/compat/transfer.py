"""A container's file system on its way from its engine into a template, piece by piece and never on a disk of ours.

What is in it is looked at by the daemon's jailed unpacker alone; here only its length and its end are checked.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager

from tartarus.model.errors import EngineFailed, MigrationRefused

MAX_EXPORT = 32 * 1024**3
_BLOCK = 512
_END = bytes(2 * _BLOCK)


class Export:
    """A payload for an upload (see `tartarus.sdk.packing`): the pieces of an engine's tar, checked to be whole.

    `archive` is entered when the first piece is wanted, and left after the last one or with `close`.
    """

    path = ""

    def __init__(
        self, archive: AbstractContextManager[Iterator[bytes]], engine: str, most_bytes: int = MAX_EXPORT
    ) -> None:
        self._archive = archive
        self._engine = engine
        self._most = most_bytes
        self._started: Generator[bytes, None, None] | None = None

    def parts(self) -> Iterator[bytes]:
        """The pieces. Raises EngineFailed for an archive that is cut off, and MigrationRefused for one too large."""
        self._started = self._checked()
        return self._started

    def close(self) -> None:
        """Let go of the engine, however far it got."""
        if self._started is not None:
            self._started.close()

    def _checked(self) -> Generator[bytes, None, None]:
        with self._archive as pieces:
            yield from self._whole(pieces)

    def _whole(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        total, tail = 0, b""
        for piece in pieces:
            total += len(piece)
            if total > self._most:
                raise MigrationRefused(
                    "the container's file system is too large", why=f"more than {self._most >> 30} GiB",
                    fix="remove what it does not need, or keep data in a mount",
                )  # fmt: skip
            tail = (tail + piece)[-len(_END) :]
            yield piece
        # An engine that fails half-way may end its answer as if all were well.
        if total % _BLOCK or tail != _END:
            raise EngineFailed(f"{self._engine}'s archive of the container is cut off", fix="try again")
