"""OSV advisories from a disk: `all.zip` of each ecosystem, as OSV's bucket has them, or a directory of JSON files.

Whoever runs the daemon fetches the files, when and how they like; a user may bring one of their own, and then it is as
hostile as any image. They are read from one end to the other for each scan (Debian's 50,000 records take a few
seconds), so there is no index that could be older than its source.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

from tartarus.images.sbom.reading import one_line
from tartarus.images.scan.records import Coordinates, OsvPackage, OsvRecord, recorded_name
from tartarus.model.errors import InvalidRequest

MAX_RECORD: Final = 16 * 1024 * 1024
"""Bytes of one record; the largest of OSV's (a kernel's, with all its versions) have under 4 MB."""
MAX_RECORDS: Final = 1_000_000
"""OSV has some 600,000 records in all."""
MAX_TOTAL: Final = 8 * 1024 * 1024 * 1024
MAX_DIRECTORY: Final = 32 * 1024 * 1024
"""Bytes of a zip's list of members, which takes many times as much in memory. 100 for each of npm's 217,000 records are
22 MB."""
_MAX_GAPS = 20
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}T")


class _BriefAffected(msgspec.Struct):
    package: OsvPackage = OsvPackage()


class _Brief(msgspec.Struct):
    """As little of a record as tells whether it matters."""

    modified: str = ""
    affected: list[_BriefAffected] | None = None


class _Bounded(io.BufferedReader):
    """A file for zipfile, which reads the list of members in one piece, however long an archive says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(MAX_DIRECTORY + 1 if size is None or size < 0 else min(size, MAX_DIRECTORY + 1))
        if len(content) > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of members has more than {MAX_DIRECTORY} bytes")
        return content


class OsvDatabase:
    """The advisories below `path`: a zip, or a directory with zips and JSON files at any depth.

    Raises InvalidRequest when there is nothing to read there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # By name: a report goes to users, who need not know where the daemon keeps its files.
        self.source = f"OSV database {path.name}"
        self.newest = ""
        self.missing: set[str] = set()
        self.gaps: list[str] = []
        if not path.exists():
            raise InvalidRequest(
                f"there is no vulnerability database {path.name!r}",
                fix="fetch all.zip of each ecosystem from OSV into a folder of its name, and give the folder above",
            )

    def find(self, wanted: Collection[Coordinates]) -> Iterator[OsvRecord]:
        """The records that name one of the packages, at whatever version. Blocks: call it in a thread.

        Afterwards `newest` is the day of the newest advisory read, `missing` the families (``Debian``) that the
        database has nothing of, and `gaps` say so and what could not be read. Raises InvalidRequest for a database
        that is none.
        """
        self.newest, self.missing, self.gaps = "", set(), []
        if not wanted:
            return
        names = {(each.family, each.name) for each in wanted}
        families = {family for family, _ in names}
        seen: set[str] = set()
        unreadable = 0
        for raw in self._raw_records(families):
            try:
                brief = msgspec.json.decode(raw, type=_Brief)
                packages = [affected.package for affected in brief.affected or ()]
                record = None
                if any((package.ecosystem.partition(":")[0], recorded_name(package)) in names for package in packages):
                    record = msgspec.json.decode(raw, type=OsvRecord)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                unreadable += 1
                continue
            seen.update(package.ecosystem.partition(":")[0] for package in packages)
            if brief.modified > self.newest and _DAY.match(brief.modified):
                self.newest = brief.modified
            if record is not None:
                yield record
        self.newest = self.newest[:10]
        if unreadable:
            self._gap(f"{unreadable} records of the database could not be read")
        self.missing = families - seen
        for family in sorted(self.missing):
            self._gap(f"the database has no advisories for {family}: its packages were not checked")

    def _raw_records(self, families: set[str]) -> Iterator[bytes]:
        total = 0
        for records, content in enumerate(self._contents(families), 1):
            total += len(content)
            if records > MAX_RECORDS or total > MAX_TOTAL:
                raise InvalidRequest(
                    f"the vulnerability database {self._path.name!r} is too large",
                    why=f"at most {MAX_RECORDS} records and {MAX_TOTAL} bytes are read",
                )
            yield content

    def _contents(self, families: set[str]) -> Iterator[bytes]:
        if not self._path.is_dir():
            yield from self._zipped(self._path)
            return
        for top, folders, files in os.walk(self._path):
            place = Path(top)
            if place == self._path:
                # The folders that the bucket has for other ecosystems need not be read.
                folders[:] = [name for name in folders if self._may_matter(place / name, families)]
            folders.sort()
            for name in sorted(files):
                if name.endswith(".zip"):
                    yield from self._zipped(place / name)
                elif name.endswith(".json"):
                    content = self._file(place / name)
                    if content is not None:
                        yield content

    @staticmethod
    def _may_matter(folder: Path, families: set[str]) -> bool:
        return not (folder / "all.zip").exists() or folder.name.partition(":")[0] in families

    def _file(self, path: Path) -> bytes | None:
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(file, "rb") as stream:
                status = os.fstat(file)
                if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_RECORD:
                    return stream.read(MAX_RECORD)
        except OSError as error:
            self._gap(f"{path.name}: {error.strerror}")
            return None
        self._gap(f"{path.name}: no file, or more than {MAX_RECORD} bytes")
        return None

    def _zipped(self, path: Path) -> Iterator[bytes]:
        try:
            with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if not member.filename.endswith(".json"):
                        continue
                    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                        # OSV's are deflated; LZMA would let an archive say how much memory it takes.
                        raise zipfile.BadZipFile("it is compressed in another way than OSV's")
                    if member.file_size > MAX_RECORD:
                        self._gap(f"{one_line(member.filename)}: more than {MAX_RECORD} bytes")
                        continue
                    with archive.open(member) as stream:
                        # At most what the archive says; zipfile finds by the checksum whether that was true.
                        content = stream.read()
                    yield content
        except (
            OSError,
            zipfile.BadZipFile,
            zlib.error,
            NotImplementedError,
            RuntimeError,
            EOFError,
            ValueError,
        ) as error:
            # NotImplementedError, RuntimeError: compressed or encrypted in ways that zipfile does not read.
            raise InvalidRequest(
                f"{path.name!r} is no vulnerability database", why=one_line(str(error)), fix="fetch it again"
            ) from error

    def _gap(self, text: str) -> None:
        if len(self.gaps) < _MAX_GAPS:
            self.gaps.append(text)
