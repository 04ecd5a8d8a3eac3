"""Cases on disk: each a directory of its own below one that nobody else may enter, whatever is killed when."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from tartarus.durable import sync_directory, write_whole
from tartarus.model.errors import CaseNotFound, GuestFailed, NoSpace, TartarusError
from tartarus.model.quarantine import Case, CaseStatus, Evidence

_log = structlog.get_logger("tartarus.node.quarantine")
_CASE = "case.json"
_EVIDENCE = "evidence"
_COLLECTING = ".collecting"
_MANIFEST = "manifest.json"


class Cases:
    """All of a host's, in memory and on disk; what the disk has no room for is here until it has."""

    def __init__(self, root: Path, remove: Callable[[Path], object] = shutil.rmtree) -> None:
        self.root = root
        self._remove = remove
        self._cases: dict[str, Case] = {}
        self._unwritten: set[str] = set()

    def open(self) -> None:
        """Read those of earlier daemons: none of their processes lives any more."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.root, 0o700)
        for place in sorted(self.root.iterdir()):
            try:
                case = msgspec.json.decode((place / _CASE).read_bytes(), type=Case)
            except (OSError, msgspec.MsgspecError) as error:
                # Killed before its first word was on disk. What is there is somebody's evidence still: it stays.
                _log.error("case_unreadable", place=place.name, error=str(error))
                continue
            self._cases[case.id] = case
            if case.status is CaseStatus.HELD:
                self.keep(self._orphaned(case, place))

    def _orphaned(self, case: Case, place: Path) -> Case:
        with contextlib.suppress(OSError):
            self._remove(place / _COLLECTING)
        trouble = "its processes ended with the daemon that held them"
        evidence, complete = case.evidence, case.complete
        if not complete:
            try:
                evidence = msgspec.json.decode((place / _EVIDENCE / _MANIFEST).read_bytes(), type=tuple[Evidence, ...])
                complete = True
            except (OSError, msgspec.MsgspecError):
                trouble += ", while evidence was collected"
        return msgspec.structs.replace(
            case, status=CaseStatus.DEAD, trouble=trouble, evidence=evidence, complete=complete
        )

    def list(self) -> list[Case]:
        """Newest first."""
        return sorted(self._cases.values(), key=lambda case: case.at, reverse=True)

    def find(self, name: str) -> Case:
        """By its id, or its sandbox's id or name: the newest. Raises CaseNotFound."""
        for case in self.list():
            if name and name in {case.id, case.sandbox_id, case.name}:
                return case
        raise CaseNotFound(f"no quarantined sandbox {name!r}", fix="see them with: tartarus quarantine list")

    def get(self, case_id: str) -> Case:
        """As it is now."""
        return self._cases[case_id]

    def keep(self, case: Case) -> None:
        """Change one, on disk too. A disk without room is no reason to forget it: `flush` tries again."""
        self._cases[case.id] = case
        self._unwritten.add(case.id)
        try:
            self._write(case)
        except OSError as error:
            _log.error("case_not_written", case=case.id, error=str(error))
        else:
            self._unwritten.discard(case.id)

    def flush(self) -> None:
        """Write what could not be written before."""
        for case_id in list(self._unwritten):
            self.keep(self._cases[case_id])

    def is_written(self, case_id: str) -> bool:
        """Whether the disk has it as it is."""
        return case_id not in self._unwritten

    def _write(self, case: Case) -> None:
        place = self.root / case.id
        place.mkdir(mode=0o700, exist_ok=True)
        write_whole(place / _CASE, msgspec.json.encode(case))
        sync_directory(place)
        sync_directory(self.root)

    # Evidence.

    def evidence(self, case_id: str) -> Path:
        """Where a case's evidence lies."""
        return self.root / case_id / _EVIDENCE

    def collecting(self, case_id: str) -> Path:
        """An empty directory to collect it in. Raises NoSpace."""
        place = self.root / case_id / _COLLECTING
        try:
            if place.exists():
                self._remove(place)
            place.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise explained(error) from error
        return place

    def collected(self, case_id: str, evidence: tuple[Evidence, ...]) -> None:
        """What was collected is all there is: from now on it is there, whole. Blocks. Raises NoSpace."""
        place = self.root / case_id / _COLLECTING
        try:
            write_whole(place / _MANIFEST, msgspec.json.encode(evidence))
            os.sync()  # a tree of many files that foreign code filled: one call for all of them
            os.replace(place, self.evidence(case_id))
            sync_directory(place.parent)
        except OSError as error:
            raise explained(error) from error

    def remove(self, case_id: str) -> None:
        """Forget a case with all its evidence. Blocks."""
        place = self.root / case_id
        for part in (place / _COLLECTING, place / _EVIDENCE):
            if part.exists():
                self._remove(part)
        shutil.rmtree(place, ignore_errors=True)
        self._cases.pop(case_id, None)
        self._unwritten.discard(case_id)


def explained(error: OSError) -> TartarusError:
    """What kept evidence from being written."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(
            "no room for the evidence of a quarantined sandbox", why=str(error), fix="free some disk; it stays frozen"
        )
    return GuestFailed("evidence can't be written", why=str(error))
