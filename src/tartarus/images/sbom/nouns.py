"""What an inventory is made of."""

from __future__ import annotations

import functools
from typing import Literal

import msgspec

# Small, without dependencies, and kept by the purl specification's own authors.
from packageurl import PackageURL

Kind = Literal["deb", "apk", "rpm", "pypi", "npm", "cran"]
"""Where a package comes from, in the package URL specification's names."""


class Distribution(msgspec.Struct, frozen=True):
    """What os-release(5) says: ``debian``, ``12``, ``Debian GNU/Linux 12 (bookworm)``. The release may be empty."""

    id: str
    release: str = ""
    title: str = ""


class Package(msgspec.Struct, frozen=True, order=True):
    """One installed package. `source` and `source_version` name what it was built from, where it was built here.

    `namespace` is the distribution, or npm's scope (``@types``); `owner` is the distribution's package that
    installed it (``python3-yaml``), if one did; `paths` are where it says so.
    """

    kind: Kind
    namespace: str
    name: str
    version: str
    architecture: str = ""
    source: str = ""
    source_version: str = ""
    license: str = ""
    owner: str = ""
    release: str = ""
    paths: tuple[str, ...] = ()

    @property
    def purl(self) -> str:
        """The package URL: the name that other tools know it by."""
        return _purl(self)


class Inventory(msgspec.Struct, frozen=True):
    """All packages of one stack, sorted, and in `gaps` what could not be read: an honest inventory has none."""

    distribution: Distribution | None = None
    packages: tuple[Package, ...] = ()
    gaps: tuple[str, ...] = ()


@functools.lru_cache(maxsize=8192)
def _purl(package: Package) -> str:
    qualifiers = {}
    version = package.version
    if package.kind == "rpm" and ":" in version:
        qualifiers["epoch"], _, version = version.partition(":")
    if package.architecture:
        qualifiers["arch"] = package.architecture
    if package.release:
        qualifiers["distro"] = f"{package.namespace}-{package.release}"
    # Not in the specification, but what Syft writes and Grype reads to find the source's advisories.
    if package.kind == "rpm" and package.source:
        qualifiers["upstream"] = f"{package.source}-{package.source_version.rpartition(':')[2]}.src.rpm"
    elif package.source and (package.source, package.source_version) != (package.name, package.version):
        qualifiers["upstream"] = f"{package.source}@{package.source_version}"
    return PackageURL(package.kind, package.namespace, package.name, version, qualifiers).to_string()
