"""From an inventory and advisories to a report."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

from tartarus.images.sbom.cyclonedx import Affected, cyclonedx
from tartarus.images.sbom.nouns import Inventory, Package
from tartarus.images.sbom.reading import one_line
from tartarus.images.scan.findings import Finding, ScanReport, rank, sorted_findings
from tartarus.images.scan.records import (
    Coordinates,
    Match,
    OsvAffected,
    OsvRecord,
    affects,
    coordinates,
    is_id,
    matches_ecosystem,
    recorded_name,
)
from tartarus.images.scan.severity import level_of, level_of_word, worst
from tartarus.model.errors import InvalidRequest

_URL = "https://osv.dev/vulnerability/"
_MAX_GAPS = 200
_MAX_VERSION = 128
_MAX_NAMES = 100
_MAX_RATINGS = 50
_MAX_MATCHES = 200_000
# Versions and events looked at in all: some minutes' worth. 2,000 advisories for one kernel, each with 5,000 versions,
# would be a tenth of it.
_MAX_WORK = 100_000_000


class Advisories(Protocol):
    """Where advisories come from: `OsvDatabase`, or `OsvService`.

    After `find` is through, `newest` is the day of the newest advisory, `missing` the ecosystems' families that it
    knows nothing of, and `gaps` say what was not read.
    """

    source: str
    newest: str
    missing: set[str]
    gaps: list[str]

    def find(self, wanted: Collection[Coordinates]) -> Iterator[OsvRecord]:
        """Every record that names one of the packages."""


def scan(inventory: Inventory, advisories: Advisories) -> ScanReport:
    """Look up every package of `inventory`. Blocks: call it in a thread.

    Raises what `advisories.find` raises, and InvalidRequest for advisories without end.
    """
    wanted, gaps = _wanted(inventory)
    by_name: dict[tuple[str, str], list[Coordinates]] = {}
    for place in wanted:
        by_name.setdefault((place.family, place.name), []).append(place)
    found: dict[Coordinates, list[tuple[OsvRecord, Match]]] = {}
    work = matches = 0
    for record in advisories.find(wanted):
        if not is_id(record.id):
            gaps.append(f"{one_line(record.id, 40)!r} is no vulnerability's id: the record was passed over")
            continue
        names = {(a.package.ecosystem.partition(":")[0], recorded_name(a.package)) for a in record.affected or ()}
        places = [place for name in names for place in by_name.get(name, ())]
        work += len(places) * _weight(record)
        for place in places if work <= _MAX_WORK else ():
            match = affects(record, place, wanted[place][0].kind)
            if match is not None:
                found.setdefault(place, []).append((record, match))
                matches += len(wanted[place])
        if work > _MAX_WORK or matches > _MAX_MATCHES:
            raise InvalidRequest(
                "the vulnerability database has more to say of this template than can be looked at",
                why=f"at most {_MAX_MATCHES} findings and {_MAX_WORK} versions",
                fix="use OSV's own",
            )
    findings = [
        _finding(package, place, group)
        for place, records in found.items()
        for group in _by_alias(records)
        for package in wanted[place]
    ]
    # What the distribution installed is covered by the distribution's advisories, under the owner's name.
    checked = sum(bool(package.owner) for package in inventory.packages)
    checked += sum(len(packages) for place, packages in wanted.items() if place.family not in advisories.missing)
    return ScanReport(
        source=advisories.source,
        packages=len(inventory.packages),
        checked=checked,
        findings=sorted_findings(findings),
        gaps=tuple([*inventory.gaps, *gaps, *advisories.gaps][:_MAX_GAPS]),
        database_date=advisories.newest,
    )


def report_document(
    inventory: Inventory, report: ScanReport, *, name: str, digest: str = "", timestamp: str | None = None
) -> dict[str, Any]:
    """The inventory as CycloneDX with the report's findings in it; see `cyclonedx`."""
    known = {package.purl for package in inventory.packages}
    groups: dict[str, list[Finding]] = {}
    for found in report.findings:
        if found.purl in known:
            groups.setdefault(found.id, []).append(found)
    entries = [
        Affected(
            id=group[0].id, source_url=group[0].url, severity=group[0].severity, score=group[0].score,
            vector=group[0].vector, description=group[0].summary,
            recommendation=_recommendation(group), purls=tuple(sorted({found.purl for found in group})),
        )
        for group in groups.values()
    ]  # fmt: skip
    return cyclonedx(inventory, name=name, digest=digest, timestamp=timestamp, vulnerabilities=entries)


def _wanted(inventory: Inventory) -> tuple[dict[Coordinates, list[Package]], list[str]]:
    """The packages by what OSV calls them, and in words what it has no name for."""
    wanted: dict[Coordinates, list[Package]] = {}
    nameless: dict[str, int] = {}
    for package in inventory.packages:
        place = coordinates(package, inventory.distribution)
        if place is not None:
            wanted.setdefault(place, []).append(package)
        elif not package.owner:
            nameless[package.kind] = nameless.get(package.kind, 0) + 1
    system = inventory.distribution
    which = f"{system.id} {system.release}".strip() if system else "a distribution that does not say which it is"
    return wanted, [
        f"no advisories are known for {which}: {n} {kind} packages were not checked" for kind, n in nameless.items()
    ]


def _by_alias(records: list[tuple[OsvRecord, Match]]) -> list[list[tuple[OsvRecord, Match]]]:
    """Records of one vulnerability under several names, together: those that name each other, directly or by a third.

    A distribution's record of a single CVE names it as `upstream`; an advisory for several is none of them.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while (parent := parents.setdefault(name, name)) != name:
            parents[name] = parents[parent]  # halves the way for the next who asks
            name = parent
        return name

    for record, _ in records:
        for name in _other_names(record):
            parents[root(name)] = root(record.id)
    groups: dict[str, list[tuple[OsvRecord, Match]]] = {}
    for record, match in sorted(records, key=lambda pair: pair[0].id):
        groups.setdefault(root(record.id), []).append((record, match))
    return list(groups.values())


def _finding(package: Package, place: Coordinates, group: list[tuple[OsvRecord, Match]]) -> Finding:
    records = [record for record, _ in group]
    names = {name for record in records for name in (record.id, *_other_names(record)) if is_id(name)}
    # By the name that everybody knows, if it has one.
    best = min(names, key=lambda name: (not name.startswith("CVE-"), not name.startswith("GHSA-"), name))
    spoken = [a for record in records for a in record.affected or () if _is_about(a, place)]
    ratings = [each for record in records for each in record.severity or ()]
    ratings += [each for affected in spoken for each in affected.severity or ()]
    score, vector = worst(each.score for each in ratings[:_MAX_RATINGS] if each.type.startswith("CVSS"))
    words = [each.score for each in ratings if not each.type.startswith("CVSS")]
    specific = [s for a in spoken for s in (a.ecosystem_specific, a.database_specific) if s is not None]
    specific += [record.database_specific for record in records if record.database_specific is not None]
    urgencies = [each.urgency for each in specific]
    if any(record.id.startswith("MAL-") for record in records):
        severity = level_of_word("critical")  # a package made to do harm; nobody rates those
    elif "unimportant" in urgencies:
        severity = level_of_word("unimportant")  # Debian: its build is not affected in a way that matters
    elif score is not None:
        severity = level_of(score)
    else:
        levels = [level_of_word(word) for word in (*words, *(each.severity for each in specific), *urgencies)]
        severity = max(levels, key=rank, default="unknown")
    fixed = sorted(
        {fix for _, match in group for fix in match.fixed_in if len(fix) <= _MAX_VERSION and fix.isprintable()}
    )
    prose = next((text for record in records for text in (record.summary, record.details) if text), "")
    return Finding(
        id=best, severity=severity, kind=package.kind, package=package.name, version=package.version, purl=package.purl,
        aliases=tuple(sorted(names - {best})[:_MAX_NAMES]), score=score, vector=vector, summary=one_line(prose, 300),
        fixed_in=tuple(fixed[:_MAX_NAMES]), certain=any(match.certain for _, match in group), paths=package.paths[:10],
        url=f"{_URL}{min(record.id for record in records)}",
    )  # fmt: skip


def _other_names(record: OsvRecord) -> list[str]:
    upstream = record.upstream if record.upstream and len(record.upstream) == 1 else []
    return [*(record.aliases or ())[:_MAX_NAMES], *upstream]


def _weight(record: OsvRecord) -> int:
    """How many versions and events a look at the record takes."""
    return sum(
        1 + len(affected.versions or ()) + sum(1 + len(each.events) for each in affected.ranges or ())
        for affected in record.affected or ()
    )


def _is_about(affected: OsvAffected, place: Coordinates) -> bool:
    return recorded_name(affected.package) == place.name and matches_ecosystem(
        affected.package.ecosystem, place.ecosystem
    )


def _recommendation(group: list[Finding]) -> str:
    fixes = sorted({f"{found.package} {found.fixed_in[0]}" for found in group if found.fixed_in})
    return f"update to {', '.join(fixes[:10])}" if fixes else ""
