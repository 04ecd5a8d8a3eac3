"""What the distribution's package manager installed: dpkg, apk, rpm, and which language packages are theirs."""

from __future__ import annotations

import re
import shlex

from tartarus.images.sbom.nouns import Distribution, Package
from tartarus.images.sbom.reading import Reader, is_word, one_line, pieces, stanzas
from tartarus.images.sbom.rpm import read_rpm
from tartarus.model.errors import ImageRefused

_STATUS = "/var/lib/dpkg/status"
_STATUS_D = "/var/lib/dpkg/status.d"  # distroless images: one file for each package
_INFO = "/var/lib/dpkg/info"
_APK = ("/lib/apk/db/installed", "/usr/lib/apk/db/installed")
_DEB_FIELDS = frozenset({"Package", "Status", "Version", "Architecture", "Source"})
_SOURCE = re.compile(r"(\S+)(?:\s+\((\S+)\))?")
# dpkg(1): in these states no file of the package is on disk.
_ABSENT = {"not-installed", "config-files"}
_RECORDS = (b"/METADATA", b"/PKG-INFO", b".egg-info", b"/package.json", b"/DESCRIPTION")
_PATH_MAX = 4095  # without the final NUL, limits.h


def read_distribution(reader: Reader) -> Distribution | None:
    """What os-release says, if it says anything."""
    content = reader.record("/etc/os-release") or reader.record("/usr/lib/os-release")
    values: dict[str, str] = {}
    for line in (content or b"").decode("utf-8", "replace").splitlines()[:200]:
        name, equals, value = line.partition("=")
        if equals and name in {"ID", "VERSION_ID", "PRETTY_NAME"}:
            try:
                values[name] = " ".join(shlex.split(value[:1024]))
            except ValueError:
                reader.gap("/etc/os-release", f"{name} is not quoted as a shell would")
    if not re.fullmatch(r"[a-z0-9._-]{1,64}", values.get("ID", "")):
        return None
    release = values.get("VERSION_ID", "")
    return Distribution(values["ID"], release if is_word(release) else "", one_line(values.get("PRETTY_NAME", "")))


def read_system_packages(reader: Reader, distribution: Distribution | None) -> None:
    """Add what dpkg, apk and rpm have installed."""
    _read_dpkg(reader, distribution)
    for path in _APK:
        _read_apk(reader, path, distribution)
    read_rpm(reader, distribution)


def owned_records(reader: Reader) -> dict[str, str]:
    """Which metadata files of languages' packages a package of the distribution brought: path to package."""
    owners: dict[str, str] = {}
    for name in reader.names(_INFO):
        if name.endswith(".list"):
            content = reader.database(f"{_INFO}/{name}") or b""
            owner = name.removesuffix(".list").partition(":")[0]
            for line in pieces(content, b"\n"):
                if line.endswith(_RECORDS):
                    _own(reader, owners, line, owner)
    for path in _APK:
        folder, owner = b"", ""
        for line in pieces(reader.database(path) or b"", b"\n"):
            if line.startswith(b"P:"):
                owner = _text(line[2:])
            elif line.startswith(b"F:"):
                folder = line[2:]
            elif line.startswith(b"R:") and (b"/" + line[2:]).endswith(_RECORDS):
                _own(reader, owners, b"/%b/%b" % (folder, line[2:]), owner)
    return owners


def _own(reader: Reader, owners: dict[str, str], path: bytes, owner: str) -> None:
    if len(path) <= _PATH_MAX and is_word(owner):
        owners[_text(path)] = owner
    if len(owners) > reader.limits.packages:
        raise ImageRefused(f"the image's packages own more than {reader.limits.packages} records of other packages")


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _read_dpkg(reader: Reader, distribution: Distribution | None) -> None:
    names = [name for name in reader.names(_STATUS_D) if not name.endswith(".md5sums")]
    paths = [_STATUS, *(f"{_STATUS_D}/{name}" for name in names)]
    namespace, release = (distribution.id, distribution.release) if distribution else ("debian", "")
    for path in paths:
        for fields in stanzas(reader.database(path) or b"", _DEB_FIELDS):
            if "Package" not in fields or fields.get("Status", "").rpartition(" ")[2] in _ABSENT:
                continue
            name, version = fields["Package"], fields.get("Version", "")
            match = _SOURCE.fullmatch(fields.get("Source", ""))
            source, source_version = match.groups() if match else (name, None)
            package = Package(
                "deb", namespace, name, version, fields.get("Architecture", ""), source, source_version or version,
                release=release,
            )  # fmt: skip
            reader.add(package, path)


def _read_apk(reader: Reader, path: str, distribution: Distribution | None) -> None:
    namespace, release = (distribution.id, distribution.release) if distribution else ("alpine", "")
    for fields in stanzas(reader.database(path) or b"", frozenset("PVAoL")):
        if "P" not in fields:
            continue
        version = fields.get("V", "")
        package = Package(
            "apk", namespace, fields["P"], version, fields.get("A", ""), fields.get("o", fields["P"]), version,
            one_line(fields.get("L", "")), release=release,
        )  # fmt: skip
        reader.add(package, path)
