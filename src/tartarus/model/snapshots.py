"""What a snapshot keeps, and how one comes from elsewhere."""

from __future__ import annotations

from enum import Enum

import msgspec

from tartarus.model.checks import check_labels, require
from tartarus.model.ids import check_snapshot_name


class SnapshotKind(str, Enum):
    """What is kept of a sandbox: its files alone, or its memory and devices too, so that what runs in it goes on."""

    FILES = "files"
    MEMORY = "memory"


class ImportSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot of memory that was exported, as an upload."""

    upload: str
    name: str = ""
    labels: dict[str, str] = {}

    def __post_init__(self) -> None:
        require(bool(self.upload), "no upload given", "send the file first")
        if self.name:
            check_snapshot_name(self.name)
        check_labels(self.labels)
