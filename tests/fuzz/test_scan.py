"""Any OSV record against any package: a report or nothing, printable and bounded, never another error."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tartarus.images.sbom import Distribution, Inventory, Package
from tartarus.images.scan import OsvDatabase, ScanPolicy, judge, report_document, scan
from tartarus.images.scan.findings import SEVERITIES

VERSION = st.text(alphabet="0129.-~+:ar_", min_size=1, max_size=8)
WORD = st.one_of(
    st.sampled_from(["a", "CVE-1", "GHSA-2", "Debian:12", "PyPI", "npm", "SEMVER", "ECOSYSTEM", "CVSS_V3", "high"]),
    st.text(max_size=6),
)
EVENT = st.dictionaries(
    st.sampled_from(["introduced", "fixed", "last_affected", "limit"]),
    st.one_of(VERSION, st.just("0"), WORD),
    max_size=2,
)
VECTOR = st.one_of(
    st.sampled_from(
        [
            "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H",
            "CVSS:4.0/AV:N",
            "CVSS:3.1/AV:N/AV:N",
            "AV:N/AC:L/Au:N/C:P/I:P/A:P",
            "CVSS:4.0",
        ]
    ),
    st.text(alphabet="CVS:430./ANLHP", max_size=60),
)
RATING = st.fixed_dictionaries({"type": WORD, "score": VECTOR})
AFFECTED = st.fixed_dictionaries(
    {"package": st.fixed_dictionaries({"ecosystem": st.sampled_from(["Debian:12", "PyPI", "npm", "Debian"]), "name": st.just("a")})},
    optional={
        "ranges": st.lists(st.fixed_dictionaries({"type": st.sampled_from(["SEMVER", "ECOSYSTEM", "GIT"]), "events": st.lists(EVENT, max_size=4)}), max_size=2),
        "versions": st.lists(VERSION, max_size=3),
        "severity": st.lists(RATING, max_size=2),
        "ecosystem_specific": st.dictionaries(st.sampled_from(["severity", "urgency"]), st.one_of(WORD, st.none(), st.integers())),
    },
)  # fmt: skip
RECORD = st.fixed_dictionaries(
    {"id": WORD, "affected": st.lists(AFFECTED, max_size=3)},
    optional={
        "aliases": st.lists(WORD, max_size=3), "upstream": st.lists(WORD, max_size=2), "severity": st.lists(RATING, max_size=2),
        "modified": WORD, "summary": st.text(max_size=20), "withdrawn": st.none() | WORD,
    },
)  # fmt: skip

_number = itertools.count()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records=st.lists(RECORD, max_size=4), version=VERSION)
def test_any_record(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], version: str) -> None:
    place = Path(tmp_path_factory.getbasetemp(), f"osv{next(_number)}")
    place.mkdir()
    for number, record in enumerate(records):
        (place / f"{number}.json").write_text(json.dumps(record))
    packages = Inventory(
        Distribution("debian", "12"),
        (
            Package("deb", "debian", "a", version, source="a", source_version=version),
            Package("npm", "", "a", version),
            Package("pypi", "", "a", version),
        ),
    )
    report = scan(packages, OsvDatabase(place))
    assert report.checked <= report.packages == 3
    assert len({(f.id, f.purl) for f in report.findings}) == len(report.findings)
    for found in report.findings:
        assert found.severity in SEVERITIES
        assert all(text.isprintable() for text in (found.id, found.summary, *found.aliases, *found.fixed_in, found.url))
    assert all(gap.isprintable() for gap in report.gaps)
    json.dumps(report_document(packages, report, name="x"))
    judge(report, ScanPolicy(block_at="low"), dt.date(2026, 11, 21))
