"""What a scan finds."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from tartarus.images.sbom.nouns import Kind
from tartarus.model.errors import TemplateFailed

Severity = Literal["unknown", "none", "low", "medium", "high", "critical"]
SEVERITIES: Final[tuple[Severity, ...]] = ("unknown", "none", "low", "medium", "high", "critical")
"""From least to worst; what nobody rated is `unknown`, and ranks below all."""


class ScanFailed(TemplateFailed):
    """The scanner, or the service it asks, did not do its part: nothing is known of the template."""


class Finding(msgspec.Struct, frozen=True):
    """One vulnerability in one package. `aliases` are its other names; `fixed_in` the versions that mend it, if any.

    `score` is CVSS's, 0 to 10, and `vector` what it was computed from; `certain` is False where the package's
    version could not be compared and it is taken for affected; `paths` are where the image records the package.
    """

    id: str
    severity: Severity
    kind: Kind
    package: str
    version: str
    purl: str
    aliases: tuple[str, ...] = ()
    score: float | None = None
    vector: str = ""
    summary: str = ""
    fixed_in: tuple[str, ...] = ()
    certain: bool = True
    paths: tuple[str, ...] = ()
    url: str = ""


class ScanReport(msgspec.Struct, frozen=True):
    """What was looked for where, and found. `checked` of `packages` were looked up; `gaps` say why not all.

    `database_date` is the day of the newest advisory (``2026-11-20``): an old database finds old vulnerabilities.
    """

    source: str
    packages: int
    checked: int
    findings: tuple[Finding, ...] = ()
    gaps: tuple[str, ...] = ()
    database_date: str = ""

    def counts(self) -> dict[Severity, int]:
        """Findings by severity, worst first; every severity is there."""
        return {level: sum(found.severity == level for found in self.findings) for level in reversed(SEVERITIES)}


def rank(severity: Severity) -> int:
    """Higher is worse."""
    return SEVERITIES.index(severity)


def sorted_findings(findings: list[Finding]) -> tuple[Finding, ...]:
    """Worst first, then by package and id: the same findings come in the same order."""
    return tuple(sorted(findings, key=lambda f: (-rank(f.severity), -(f.score or 0), f.purl, f.id)))
