"""What pip, npm and R installed, wherever it lies: found by the records they leave beside the packages."""

from __future__ import annotations

from typing import Any

import msgspec

from tartarus.images.sbom.nouns import Package
from tartarus.images.sbom.reading import Reader, one_line, stanzas
from tartarus.images.stackview import Directory

_PYTHON_FIELDS = frozenset({"Name", "Version", "License", "License-Expression"})
_R_FIELDS = frozenset({"Package", "Version", "Priority", "License"})
_NOT_FILES = ("proc", "sys", "dev")


class _Manifest(msgspec.Struct):
    """What we read of a package.json; foreign values in any shape."""

    name: Any = ""
    version: Any = ""
    license: Any = ""


def read_language_packages(reader: Reader, owners: dict[str, str]) -> None:
    """Walk the whole tree once and add every package found; `owners` are metadata files of the distribution's packages.

    Raises ImageRefused for a tree beyond the limits.
    """

    def closed(path: str) -> None:
        reader.gap(path, "a directory that the daemon may not read")

    for step in reader.view.walk(max_entries=reader.limits.entries, closed=closed):
        if step.path == "/":
            step.dirs[:] = [name for name in step.dirs if name not in _NOT_FILES]
        prefix = step.path.rstrip("/")
        for path in _python_records(step, prefix):
            _read_python(reader, path, owners)
        if "package.json" in step.files and _is_node_package(prefix):
            _read_node(reader, f"{prefix}/package.json", owners)
        if "DESCRIPTION" in step.files and "Meta" in step.dirs:
            _read_r(reader, f"{prefix}/DESCRIPTION", owners)


def _python_records(step: Directory, prefix: str) -> list[str]:
    folder = prefix.rpartition("/")[2]
    if folder.endswith(".dist-info"):
        return [f"{prefix}/METADATA"] if "METADATA" in step.files else []
    if folder.endswith(".egg-info") or folder == "EGG-INFO":
        return [f"{prefix}/PKG-INFO"] if "PKG-INFO" in step.files else []
    return [f"{prefix}/{name}" for name in step.files if name.endswith(".egg-info")]


def _read_python(reader: Reader, path: str, owners: dict[str, str]) -> None:
    content = reader.record(path)
    if content is None:
        return
    # The first paragraph holds the fields, the rest is a README.
    fields = next(stanzas(content.replace(b"\r\n", b"\n").split(b"\n\n", 1)[0], _PYTHON_FIELDS), {})
    license_ = fields.get("License-Expression") or fields.get("License", "")
    name, version = fields.get("Name", ""), fields.get("Version", "")
    reader.add(Package("pypi", "", name, version, license=one_line(license_), owner=owners.get(path, "")), path)


def _is_node_package(prefix: str) -> bool:
    parts = prefix.split("/")
    if len(parts) > 2 and parts[-2].startswith("@"):
        return parts[-3] == "node_modules"
    return len(parts) > 1 and parts[-2] == "node_modules"


def _read_node(reader: Reader, path: str, owners: dict[str, str]) -> None:
    content = reader.record(path)
    if content is None:
        return
    try:
        manifest = msgspec.json.decode(content, type=_Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        reader.gap(path, f"no package.json: {one_line(str(error))}")
        return
    if not isinstance(manifest.name, str) or not isinstance(manifest.version, str):
        reader.gap(path, "its name and version are no text")
        return
    scope, slash, name = manifest.name.rpartition("/")
    if slash and not scope.startswith("@"):
        reader.gap(path, f"{one_line(manifest.name, 40)!r} is no package name")
        return
    license_ = one_line(manifest.license) if isinstance(manifest.license, str) else ""
    reader.add(Package("npm", scope, name, manifest.version, license=license_, owner=owners.get(path, "")), path)


def _read_r(reader: Reader, path: str, owners: dict[str, str]) -> None:
    fields = next(stanzas(reader.record(path) or b"", _R_FIELDS), {})
    # Packages of priority "base" are R itself, with its version; CRAN has none of that name.
    if fields.get("Package") and fields.get("Priority") != "base":
        package = Package(
            "cran", "", fields["Package"], fields.get("Version", ""), license=one_line(fields.get("License", "")),
            owner=owners.get(path, ""),
        )  # fmt: skip
        reader.add(package, path)
