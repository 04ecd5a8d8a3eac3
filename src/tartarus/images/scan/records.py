"""OSV records, and whether one speaks of a package (https://ossf.github.io/osv-schema/, 1.7)."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec
from packaging.utils import canonicalize_name

from tartarus.images.sbom.nouns import Distribution, Kind, Package
from tartarus.images.scan.versions import Incomparable, sort_key

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")


class OsvRating(msgspec.Struct, frozen=True):
    """One rating: ``CVSS_V3`` and a vector, or ``Ubuntu`` and a word."""

    type: str = ""
    score: str = ""


class OsvPackage(msgspec.Struct, frozen=True):
    """Whom a record speaks of."""

    ecosystem: str = ""
    name: str = ""


class OsvEvent(msgspec.Struct, frozen=True):
    """Where in an ecosystem's order a vulnerability comes or goes."""

    introduced: str | None = None
    fixed: str | None = None
    last_affected: str | None = None
    limit: str | None = None


class OsvRange(msgspec.Struct, frozen=True):
    """Events of one order: ``ECOSYSTEM``, ``SEMVER``, or ``GIT``, which says nothing of installed packages."""

    type: str = ""
    events: list[OsvEvent] = []


class OsvWords(msgspec.Struct, frozen=True):
    """What databases add of their own that rates a vulnerability: GitHub's severity, Debian's urgency."""

    severity: Any = None
    urgency: Any = None


class OsvAffected(msgspec.Struct, frozen=True):
    """Which versions of one package are affected."""

    package: OsvPackage = OsvPackage()
    severity: list[OsvRating] | None = None
    ranges: list[OsvRange] | None = None
    versions: list[str] | None = None
    ecosystem_specific: OsvWords | None = None
    database_specific: OsvWords | None = None


class OsvRecord(msgspec.Struct, frozen=True):
    """One vulnerability."""

    id: str
    modified: str = ""
    withdrawn: str | None = None
    aliases: list[str] | None = None
    upstream: list[str] | None = None
    summary: str = ""
    details: str = ""
    severity: list[OsvRating] | None = None
    affected: list[OsvAffected] | None = None
    database_specific: OsvWords | None = None


class Coordinates(NamedTuple):
    """How OSV names a package: its ecosystem (``Debian:12``), name and version there."""

    ecosystem: str
    name: str
    version: str

    @property
    def family(self) -> str:
        """The ecosystem without its release: the folder of OSV's bucket."""
        return self.ecosystem.partition(":")[0]


class Match(NamedTuple):
    """That a record affects a package: which versions mend it, and whether the version could be compared."""

    fixed_in: tuple[str, ...]
    certain: bool


def coordinates(package: Package, distribution: Distribution | None) -> Coordinates | None:
    """What OSV calls the package, or None where it has no name for it.

    Distributions' advisories speak of source packages. A Python, node or R package that the distribution installed
    is not looked up under its own name: its version says nothing of the mends that the distribution put in.
    """
    if package.owner:
        return None
    if package.kind == "pypi":
        return Coordinates("PyPI", canonicalize_name(package.name), package.version)
    if package.kind == "npm":
        return Coordinates("npm", f"{package.namespace}/{package.name}".lstrip("/"), package.version)
    if package.kind == "cran":
        return Coordinates("CRAN", package.name, package.version)
    ecosystem = _release(package.kind, distribution) if distribution else ""
    if ecosystem.startswith("AlmaLinux"):
        return Coordinates(ecosystem, package.name, package.version)  # whose advisories name what is installed
    return Coordinates(ecosystem, package.source or package.name, package.source_version) if ecosystem else None


def is_id(text: str) -> bool:
    """Whether it can be a vulnerability's id: it goes into paths, tables and addresses."""
    return bool(_ID.fullmatch(text))


def matches_ecosystem(recorded: str, wanted: str) -> bool:
    """Whether a record of `recorded` speaks of `wanted`: the same, all its releases, or Ubuntu's long-term name."""
    return recorded in {wanted, wanted.partition(":")[0], f"{wanted}:LTS"}


def recorded_name(package: OsvPackage) -> str:
    """A record's package name as `coordinates` writes it."""
    return canonicalize_name(package.name) if package.ecosystem.startswith("PyPI") else package.name


def affects(record: OsvRecord, wanted: Coordinates, kind: Kind) -> Match | None:
    """Whether `record` affects the package; None if not, and for a record that was withdrawn.

    Where a version on either side can't be compared, the package counts as affected, and the match as uncertain.
    """
    if record.withdrawn:
        return None
    fixed: set[str] = set()
    found = certain = False
    for affected in record.affected or ():
        if recorded_name(affected.package) != wanted.name:
            continue
        if not matches_ecosystem(affected.package.ecosystem, wanted.ecosystem):
            continue
        ranges = [each for each in affected.ranges or () if each.type in {"ECOSYSTEM", "SEMVER"}]
        if wanted.version in (affected.versions or ()):
            found = certain = True
        for each in ranges:
            match = _in_range(each, wanted.version, "semver" if each.type == "SEMVER" else kind)
            if match is not None:
                found, certain = True, certain or match.certain
        for each in ranges:
            fixed.update(_later_fixes(each, wanted.version, "semver" if each.type == "SEMVER" else kind))
        if not ranges and not affected.versions:
            # No versions at all: the schema leaves that to mean every one (malicious packages are written so).
            found = certain = True
    return Match(tuple(sorted(fixed)), certain) if found else None


def _release(kind: Kind, distribution: Distribution) -> str:
    """The ecosystem of a distribution's release; empty where OSV has none, or the release is not known."""
    name, release = distribution.id, distribution.release
    if kind == "deb" and name == "debian" and release.partition(".")[0].isdigit():
        return f"Debian:{release.partition('.')[0]}"
    if kind == "deb" and name == "ubuntu" and re.fullmatch(r"\d+\.\d+", release):
        return f"Ubuntu:{release}"
    if kind == "apk" and name == "alpine" and (match := re.fullmatch(r"(\d+\.\d+)(?:\.\d+)?", release)):
        return f"Alpine:v{match[1]}"
    if kind == "rpm" and name in {"rocky", "almalinux"} and release.partition(".")[0].isdigit():
        return f"{'Rocky Linux' if name == 'rocky' else 'AlmaLinux'}:{release.partition('.')[0]}"
    if kind == "apk" and name in {"wolfi", "chainguard"}:
        return name.title()
    return ""


def _in_range(span: OsvRange, version: str, kind: str) -> Match | None:
    """OSV's evaluation of events in order."""
    try:
        key = sort_key(kind)
        ours = key(version)
    except Incomparable:
        return Match((), certain=False)
    certain = True
    points = []
    for event in span.events:
        for order, (name, text) in enumerate(
            # At one version a fix comes before what begins again there, and a last affected version after.
            (("fixed", event.fixed), ("introduced", event.introduced), ("last", event.last_affected))
        ):
            if text is None:
                continue
            if name == "introduced" and text == "0":
                points.append((0, 0, 0, name))
                continue
            try:
                points.append((1, key(text), order, name))
            except Incomparable:
                certain = False
                if name == "introduced":
                    points.append((0, 0, 0, name))
    affected = False
    for begins, point, _, name in sorted(points, key=lambda p: p[:1] if not p[0] else p[:3]):
        if name == "introduced" and (not begins or ours >= point):
            affected = True
        elif (name == "fixed" and ours >= point) or (name == "last" and ours > point):
            affected = False
    if affected and not _below_limit(span, ours, key):
        return None
    return Match((), certain) if affected else None


def _below_limit(span: OsvRange, ours: Any, key: Any) -> bool:
    limits = [event.limit for event in span.events if event.limit is not None]
    if not limits or "*" in limits:
        return True
    for limit in limits:
        try:
            if ours < key(limit):
                return True
        except Incomparable:
            return True
    return False


def _later_fixes(span: OsvRange, version: str, kind: str) -> list[str]:
    """The nearest fix after `version`; every fix where nothing can be compared."""
    fixes = [event.fixed for event in span.events if event.fixed]
    try:
        key = sort_key(kind)
        ours = key(version)
        later = sorted((fix for fix in fixes if key(fix) > ours), key=key)
    except Incomparable:
        return fixes
    return later[:1]
