"""Who needs which blobs, on disk: one small file per owner, replaced in one step."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from tartarus.durable import sync_directory, write_whole
from tartarus.images.blobfiles import disk
from tartarus.model.errors import InvalidRequest, TemplateFailed

_SUFFIX = ".json"
# A file name has at most 255 bytes, and the suffix and the temporary name want some.
_MAX_OWNER_BYTES = 240


class Holds:
    """The holds under `root`. A hold file that can't be read is an error: collecting without it could lose blobs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, owner: str, digests: Sequence[str]) -> tuple[str, ...]:
        """Let `owner` hold these too; returns what it held before."""
        with self._alone():
            before = self._read(self._file(owner))
            self._write(owner, sorted({*before, *digests}))
        return before

    def set(self, owner: str, digests: Sequence[str]) -> None:
        """Let `owner` hold exactly these; with none, nothing is left of it."""
        with self._alone():
            if digests:
                self._write(owner, digests)
            else:
                self._file(owner).unlink(missing_ok=True)
                sync_directory(self._root)

    def all(self) -> dict[str, tuple[str, ...]]:
        """What each owner holds."""
        with self._alone():
            for left in self._root.glob(f".*{_SUFFIX}.new"):
                left.unlink()  # of a killed one
            files = self._root.glob(f"*{_SUFFIX}")
            return {unquote(file.name.removesuffix(_SUFFIX)): self._read(file) for file in files}

    def _file(self, owner: str) -> Path:
        # '.' is one of the few marks that quote() leaves, and no owner may be named so that its file is hidden.
        name = quote(owner, safe="").replace(".", "%2E")
        if not owner or len(name) > _MAX_OWNER_BYTES:
            raise InvalidRequest(f"{owner[:100]!r} can't hold images: its name is empty or too long")
        return self._root / f"{name}{_SUFFIX}"

    @staticmethod
    def _read(file: Path) -> tuple[str, ...]:
        try:
            return msgspec.json.decode(file.read_bytes(), type=tuple[str, ...])
        except FileNotFoundError:
            return ()
        except msgspec.DecodeError as error:
            raise TemplateFailed(f"the record {file} is damaged", why=str(error), fix="pull its image again") from error

    def _write(self, owner: str, digests: Sequence[str]) -> None:
        place = self._file(owner)
        write_whole(place, msgspec.json.encode(digests))
        sync_directory(self._root)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time."""
        with disk("record which images are in use"), open(self._root / ".lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
