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
    """A payload for an upload (see `tartarus.sdk.packing`): tars of an engine, checked to be whole, as one.

    `archives` is entered when the first piece is wanted, and left after the last one or with `close`. Each archive is
    its pieces; what comes later lies over what came before.
    """

    path = ""

    def __init__(
        self, archives: AbstractContextManager[Iterator[Iterator[bytes]]], engine: str, most_bytes: int = MAX_EXPORT
    ) -> None:
        self._archives = archives
        self._engine = engine
        self._most = most_bytes
        self._total = 0
        self._started: Generator[bytes, None, None] | None = None

    def parts(self) -> Iterator[bytes]:
        """The pieces. Raises EngineFailed for an archive that is cut off, and MigrationRefused for one too large."""
        self._started = self._joined()
        return self._started

    def close(self) -> None:
        """Let go of the engine, however far it got."""
        if self._started is not None:
            self._started.close()

    def _joined(self) -> Generator[bytes, None, None]:
        with self._archives as archives:
            for pieces in archives:
                yield from self._members(pieces)
            yield _END

    def _members(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """An archive without the two empty blocks that Go's writer, and ours, ends it with."""
        begun, held = self._total, b""
        for piece in pieces:
            self._total += len(piece)
            if self._total > self._most:
                raise MigrationRefused(
                    "the container's file system is too large", why=f"more than {self._most >> 30} GiB",
                    fix="remove what it does not need, or keep data in a mount",
                )  # fmt: skip
            held += piece
            if len(held) > len(_END):
                yield held[: -len(_END)]
                held = held[-len(_END) :]
        # An engine that fails half-way may end its answer as if all were well.
        if (self._total - begun) % _BLOCK or held != _END:
            raise EngineFailed(f"{self._engine}'s archive of the container is cut off", fix="try again")
