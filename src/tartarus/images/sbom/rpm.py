"""What rpm has installed, from its SQLite database (rpm 4.16 and later); its older databases become gaps."""

from __future__ import annotations

import re
import struct
from typing import Final

from tartarus.images.sbom.nouns import Distribution, Package
from tartarus.images.sbom.reading import Reader, one_line
from tartarus.images.sbom.sqlitefile import NotReadable, Table

_PLACES: Final = ("/var/lib/rpm", "/usr/lib/sysimage/rpm", "/usr/share/rpm")
_OLD: Final = ("Packages", "Packages.db")  # Berkeley DB; SUSE's ndb
# Tags and types of rpm's header format (rpmtag.h).
_NAME, _VERSION, _RELEASE, _EPOCH, _LICENSE, _ARCH, _SOURCE = 1000, 1001, 1002, 1003, 1014, 1022, 1044
_INT32, _STRING, _I18N = 4, 6, 9
_WANTED: Final = frozenset({_NAME, _VERSION, _RELEASE, _EPOCH, _LICENSE, _ARCH, _SOURCE})
_SOURCE_FILE = re.compile(r"(.+)-([^-]+-[^-]+)\.(?:no)?src\.rpm")


def read_rpm(reader: Reader, distribution: Distribution | None) -> None:
    """Add every package of the rpm databases."""
    # One of the places is often a link to the other.
    found = {place.path for name in _PLACES if (place := reader.view.resolve(name)) is not None and place.kind == "dir"}
    for folder in sorted(found):
        for name in _OLD:
            if reader.view.resolve(f"{folder}/{name}") is not None:
                reader.gap(f"{folder}/{name}", "an rpm database of an old format, which is not read")
        path = f"{folder}/rpmdb.sqlite"
        log = reader.view.resolve(f"{path}-wal")
        if log is not None and log.size > 0:
            reader.gap(f"{path}-wal", "the rpm database has changes that were never written to it, which are not read")
        content = reader.database(path)
        if content is not None:
            _read(reader, path, content, distribution)


def _read(reader: Reader, path: str, content: bytes, distribution: Distribution | None) -> None:
    try:
        for row in Table(content).rows("Packages"):
            if len(row) != 2 or not isinstance(row[1], bytes):
                raise NotReadable("a row is no package")
            try:
                package = _package(_header(row[1]), distribution)
            except NotReadable as error:
                reader.gap(path, f"a package could not be read: {error}")
                continue
            # Keys that signatures are checked with are kept among the packages.
            if package.name != "gpg-pubkey":
                reader.add(package, path)
    except NotReadable as error:
        reader.gap(path, f"the rpm database can't be read: {error}")


def _header(blob: bytes) -> dict[int, str]:
    """The wanted tags of a package's header: an index of (tag, type, offset, count), then the data it points to."""
    if len(blob) < 8:
        raise NotReadable("its header is cut off")
    count, length = struct.unpack_from(">II", blob)
    data = 8 + 16 * count
    if data + length > len(blob):
        raise NotReadable("its header is cut off")
    tags: dict[int, str] = {}
    for tag, kind, offset, number in struct.iter_unpack(">IIII", blob[8:data]):
        if tag not in _WANTED or tag in tags:
            continue
        place = data + offset
        if offset >= length or number < 1:
            raise NotReadable("a tag points outside of its header")
        if kind in {_STRING, _I18N}:
            end = blob.find(b"\0", place, data + length)
            if end < 0:
                raise NotReadable("a text does not end")
            tags[tag] = blob[place:end][:4096].decode("utf-8", "replace")
        elif kind == _INT32 and offset + 4 <= length:
            tags[tag] = str(int.from_bytes(blob[place : place + 4]))
        else:
            raise NotReadable("a tag is of the wrong type")
    return tags


def _package(tags: dict[int, str], distribution: Distribution | None) -> Package:
    version = f"{tags.get(_VERSION, '')}-{tags.get(_RELEASE, '')}"
    epoch = f"{tags[_EPOCH]}:" if tags.get(_EPOCH, "0") != "0" else ""
    match = _SOURCE_FILE.fullmatch(tags.get(_SOURCE, ""))
    source, source_version = match.groups() if match else (tags.get(_NAME, ""), version)
    namespace, release = (distribution.id, distribution.release) if distribution else ("", "")
    return Package(
        "rpm", namespace, tags.get(_NAME, ""), epoch + version, tags.get(_ARCH, ""), source, epoch + source_version,
        one_line(tags.get(_LICENSE, "")), release=release,
    )  # fmt: skip
