"""Scans of inventories against OSV advisories. The advisories are the tests' own, written in OSV's schema."""

from __future__ import annotations

import datetime as dt
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tartarus.images.sbom import Distribution, Inventory, Package, take_inventory
from tartarus.images.scan import (
    Ignore,
    OsvDatabase,
    ScanPolicy,
    ScanReport,
    judge,
    report_document,
    scan,
)
from tartarus.images.scan import database as database_module
from tartarus.images.scan import report as report_module
from tartarus.images.scan.records import Coordinates, OsvRecord, affects
from tartarus.images.stackview import StackView
from tartarus.model.errors import InvalidRequest

CRITICAL = "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"  # 9.8
MEDIUM = "CVSS:3.1/AV:N/AC:L/PR:N/UI:R/S:C/C:L/I:L/A:N"  # 6.1
V4_CRITICAL = "CVSS:4.0/AV:N/AC:L/AT:N/PR:N/UI:N/VC:H/VI:H/VA:H/SC:N/SI:N/SA:N"  # 9.3
DEBIAN_12 = Distribution("debian", "12")
TODAY = dt.date(2026, 11, 21)


def record(name: str, ecosystem: str, package: str, *events: dict[str, str], **more: Any) -> dict[str, Any]:
    kind = more.pop("type", "SEMVER" if ecosystem == "npm" else "ECOSYSTEM")
    affected = {"package": {"ecosystem": ecosystem, "name": package}, **more.pop("affected", {})}
    if events:
        affected["ranges"] = [{"type": kind, "events": list(events)}]
    return {
        "id": name,
        "modified": "2026-11-20T08:00:00Z",
        "summary": f"{name} in words",
        "affected": [affected],
        **more,
    }


def database(place: Path, *records: dict[str, Any]) -> OsvDatabase:
    place.mkdir(exist_ok=True)
    for each in records:
        (place / f"{each['id'].replace('/', '_')}.json").write_text(json.dumps(each))
    return OsvDatabase(place)


def deb(name: str, version: str, source: str = "", source_version: str = "", **more: Any) -> Package:
    return Package(
        "deb", "debian", name, version, "amd64", source or name, source_version or version, release="12", **more
    )


def inventory(*packages: Package, distribution: Distribution | None = DEBIAN_12) -> Inventory:
    return Inventory(distribution, tuple(sorted(packages)))


def found(report: ScanReport) -> dict[str, tuple[str, str, str, tuple[str, ...]]]:
    return {f.id: (f.package, f.version, f.severity, f.fixed_in) for f in report.findings}


class TestFinding:
    def test_by_source_package_and_release(self, tmp_path: Path) -> None:
        advisories = database(
            tmp_path / "osv",
            record("CVE-1", "Debian:12", "openssl", {"introduced": "0"}, {"fixed": "3.0.11-1~deb12u2"}, severity=[{"type": "CVSS_V3", "score": CRITICAL}]),
            record("CVE-2", "Debian:11", "openssl", {"introduced": "0"}),
            record("CVE-3", "Debian:12", "openssl", {"introduced": "0"}, {"fixed": "3.0.9-1"}),
            record("CVE-4", "Debian:12", "libssl3", {"introduced": "0"}),
            record("CVE-5", "Debian:12", "openssl", {"introduced": "0"}, affected={"ecosystem_specific": {"urgency": "unimportant"}}),
        )  # fmt: skip
        packages = inventory(deb("libssl3", "3.0.10-1+b1", "openssl", "3.0.10-1"), deb("bash", "5.2-1"))
        report = scan(packages, advisories)
        assert found(report) == {
            "CVE-1": ("libssl3", "3.0.10-1+b1", "critical", ("3.0.11-1~deb12u2",)),
            "CVE-5": ("libssl3", "3.0.10-1+b1", "low", ()),
        }
        first = report.findings[0]
        assert (first.score, first.vector, first.url) == (9.8, CRITICAL, "https://osv.dev/vulnerability/CVE-1")
        assert (report.packages, report.checked, report.gaps, report.database_date) == (2, 2, (), "2026-11-20")
        assert report.counts()["critical"] == 1

    def test_in_every_ecosystem(self, tmp_path: Path) -> None:
        advisories = database(
            tmp_path / "osv",
            record("PYSEC-1", "PyPI", "My.Package", {"introduced": "1.0"}, {"fixed": "1.10"}, aliases=["CVE-10"]),
            record("GHSA-1", "npm", "@scope/tool", {"introduced": "1.0.0-0"}, {"last_affected": "1.9.9"}, severity=[{"type": "CVSS_V4", "score": V4_CRITICAL}]),
            record("RSEC-1", "CRAN", "readxl", {"introduced": "0"}, {"fixed": "1.4-2"}),
        )  # fmt: skip
        packages = inventory(
            Package("pypi", "", "my_package", "1.9"),
            Package("npm", "@scope", "tool", "1.2.3"),
            Package("cran", "", "readxl", "1.4-1"),
            distribution=None,
        )
        assert found(scan(packages, advisories)) == {
            "CVE-10": ("my_package", "1.9", "unknown", ("1.10",)),
            "GHSA-1": ("tool", "1.2.3", "critical", ()),
            "RSEC-1": ("readxl", "1.4-1", "unknown", ("1.4-2",)),
        }

    def test_alpine_and_ubuntu_by_their_names(self, tmp_path: Path) -> None:
        advisories = database(
            tmp_path / "osv",
            record("ALPINE-CVE-1", "Alpine:v3.18", "openssl", {"introduced": "0"}, {"fixed": "3.1.4-r6"}, upstream=["CVE-20"]),
            record("UBUNTU-CVE-2", "Ubuntu:22.04:LTS", "curl", {"introduced": "0"}, severity=[{"type": "Ubuntu", "score": "medium"}]),
            record("UBUNTU-CVE-3", "Ubuntu:Pro:22.04:LTS", "curl", {"introduced": "0"}),
        )  # fmt: skip
        alpine = inventory(
            Package("apk", "alpine", "libcrypto3", "3.1.4-r5", source="openssl", source_version="3.1.4-r5"),
            distribution=Distribution("alpine", "3.18.5"),
        )
        assert found(scan(alpine, advisories)) == {"CVE-20": ("libcrypto3", "3.1.4-r5", "unknown", ("3.1.4-r6",))}
        ubuntu = inventory(
            Package("deb", "ubuntu", "curl", "7.81", source="curl", source_version="7.81"),
            distribution=Distribution("ubuntu", "22.04"),
        )
        assert found(scan(ubuntu, advisories)) == {"UBUNTU-CVE-2": ("curl", "7.81", "medium", ())}

    def test_names_of_one_thing_are_one_finding(self, tmp_path: Path) -> None:
        advisories = database(
            tmp_path / "osv",
            record("PYSEC-1", "PyPI", "a", {"introduced": "0"}, {"fixed": "2"}, aliases=["CVE-1"]),
            record("GHSA-1", "PyPI", "a", {"introduced": "0"}, {"fixed": "2.1"}, aliases=["CVE-1", "PYSEC-1"], database_specific={"severity": "MODERATE"}),
            record("PYSEC-2", "PyPI", "a", {"introduced": "0"}, upstream=["CVE-1", "CVE-2"]),
        )  # fmt: skip
        report = scan(inventory(Package("pypi", "", "a", "1")), advisories)
        assert found(report) == {"CVE-1": ("a", "1", "medium", ("2", "2.1")), "PYSEC-2": ("a", "1", "unknown", ())}
        assert report.findings[0].aliases == ("GHSA-1", "PYSEC-1")

    def test_withdrawn_is_nothing_and_malicious_is_critical(self, tmp_path: Path) -> None:
        advisories = database(
            tmp_path / "osv",
            record("CVE-1", "npm", "left", {"introduced": "0"}, withdrawn="2026-01-01T00:00:00Z"),
            record("MAL-2026-1", "npm", "evil"),
        )
        packages = inventory(Package("npm", "", "left", "1.0.0"), Package("npm", "", "evil", "0.0.1"))
        assert found(scan(packages, advisories)) == {"MAL-2026-1": ("evil", "0.0.1", "critical", ())}

    def test_the_distributions_own_python_is_the_distributions_to_mend(self, tmp_path: Path) -> None:
        advisories = database(
            tmp_path / "osv",
            record("CVE-1", "PyPI", "requests", {"introduced": "0"}),
            record("CVE-2", "Debian:12", "x", {"introduced": "0"}),
        )
        packages = inventory(
            deb("python3-requests", "2.28-1"), Package("pypi", "", "requests", "2.28", owner="python3-requests")
        )
        report = scan(packages, advisories)
        assert (found(report), report.checked) == ({}, 2)

    def test_real_packages_of_this_machine(self, tmp_path: Path) -> None:
        layer = tmp_path / "layer"
        (layer / "var/lib/dpkg").mkdir(parents=True)
        (layer / "etc").mkdir()
        (layer / "etc/os-release").write_bytes(Path("/etc/os-release").read_bytes())
        (layer / "var/lib/dpkg/status").write_bytes(Path("/var/lib/dpkg/status").read_bytes())
        with StackView([layer]) as view:
            packages = take_inventory(view)
        assert packages.distribution is not None
        release = f"Debian:{packages.distribution.release}"
        advisories = database(
            tmp_path / "osv",
            record("CVE-ALL", release, "glibc", {"introduced": "0"}, severity=[{"type": "CVSS_V3", "score": MEDIUM}]),
            record("CVE-OLD", release, "glibc", {"introduced": "0"}, {"fixed": "2.30-1"}),
        )
        report = scan(packages, advisories)
        sources = {p.name for p in packages.packages if p.source == "glibc"}
        assert {f.package for f in report.findings} == sources
        assert {(f.id, f.severity) for f in report.findings} == {("CVE-ALL", "medium")}
        document = json.dumps(report_document(packages, report, name="host", timestamp="2026-11-21T00:00:00Z"))
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document) is None
        assert '"CVE-ALL"' in document


class TestRanges:
    @pytest.mark.parametrize(
        ("events", "inside", "outside"),
        [
            ([{"introduced": "0"}, {"fixed": "2"}], ["0", "1.9"], ["2", "3"]),
            ([{"introduced": "1"}, {"last_affected": "2"}], ["1", "2"], ["0.9", "2.1"]),
            ([{"introduced": "1"}, {"last_affected": "1"}], ["1"], ["0.9", "1.1"]),
            (
                [{"introduced": "1"}, {"fixed": "2"}, {"introduced": "3"}, {"fixed": "4"}],
                ["1", "3.5"],
                ["2", "2.5", "4"],
            ),
            (
                [{"fixed": "4"}, {"introduced": "3"}, {"fixed": "2"}, {"introduced": "1"}],
                ["1", "3.5"],
                ["2", "2.5", "4"],
            ),
            ([{"introduced": "1"}, {"fixed": "2"}, {"introduced": "2"}, {"fixed": "3"}], ["1", "2", "2.9"], ["3"]),
            ([{"introduced": "0"}, {"limit": "2"}], ["1"], ["2", "3"]),
            ([{"introduced": "0"}, {"limit": "*"}], ["1", "99"], []),
            ([{"introduced": "0"}], ["0", "99"], []),
            ([{"fixed": "2"}], [], ["1", "2"]),
        ],
    )
    def test_are_evaluated_as_osv_says(
        self, events: list[dict[str, str]], inside: list[str], outside: list[str]
    ) -> None:
        each = msgspec.convert(record("CVE-1", "PyPI", "a", *events), OsvRecord)
        for version in [*inside, *outside]:
            match = affects(each, Coordinates("PyPI", "a", version), "pypi")
            assert (match is not None) == (version in inside), version
            assert match is None or match.certain

    def test_listed_versions_count_too(self) -> None:
        each = msgspec.convert(record("CVE-1", "PyPI", "a", affected={"versions": ["1.0", "weird"]}), OsvRecord)
        assert affects(each, Coordinates("PyPI", "a", "weird"), "pypi") is not None
        assert affects(each, Coordinates("PyPI", "a", "1.1"), "pypi") is None

    def test_git_ranges_say_nothing(self) -> None:
        each = msgspec.convert(
            record("CVE-1", "PyPI", "a", {"introduced": "0"}, type="GIT", affected={"versions": ["3"]}), OsvRecord
        )
        assert affects(each, Coordinates("PyPI", "a", "1"), "pypi") is None

    def test_what_can_not_be_compared_is_affected_and_uncertain(self) -> None:
        fixed = msgspec.convert(record("CVE-1", "PyPI", "a", {"introduced": "0"}, {"fixed": "2"}), OsvRecord)
        match = affects(fixed, Coordinates("PyPI", "a", "not-a-version"), "pypi")
        assert match is not None
        assert (match.certain, match.fixed_in) == (False, ("2",))
        odd = msgspec.convert(record("CVE-1", "PyPI", "a", {"introduced": "what?"}, {"fixed": "?"}), OsvRecord)
        assert affects(odd, Coordinates("PyPI", "a", "1"), "pypi") is not None


class TestDatabases:
    def bucket(self, place: Path) -> Path:
        """The layout of OSV's bucket: a folder for each ecosystem, with all.zip in it."""
        for folder, records in {
            "Debian": [record("CVE-1", "Debian:12", "bash", {"introduced": "0"})],
            "PyPI": [record("PYSEC-1", "PyPI", "six", {"introduced": "0"})],
        }.items():
            (place / folder).mkdir(parents=True)
            with zipfile.ZipFile(place / folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for each in records:
                    archive.writestr(f"{each['id']}.json", json.dumps(each))
                archive.writestr("README", "no record")
        return place

    def test_the_buckets_layout(self, tmp_path: Path) -> None:
        place = self.bucket(tmp_path / "osv")
        packages = inventory(deb("bash", "5.2-1"), Package("pypi", "", "six", "1.16"))
        assert found(scan(packages, OsvDatabase(place))).keys() == {"CVE-1", "PYSEC-1"}
        assert found(scan(packages, OsvDatabase(place / "Debian"))).keys() == {"CVE-1"}
        assert found(scan(packages, OsvDatabase(place / "Debian/all.zip"))).keys() == {"CVE-1"}

    def test_other_ecosystems_are_not_read(self, tmp_path: Path) -> None:
        place = self.bucket(tmp_path / "osv")
        (place / "npm").mkdir()
        (place / "npm/all.zip").write_bytes(b"no zip")
        assert found(scan(inventory(deb("bash", "5.2-1")), OsvDatabase(place))).keys() == {"CVE-1"}
        with pytest.raises(InvalidRequest, match="no vulnerability database"):
            scan(inventory(Package("npm", "", "a", "1.0.0")), OsvDatabase(place))

    def test_what_it_does_not_have_is_a_gap(self, tmp_path: Path) -> None:
        advisories = database(tmp_path / "osv", record("CVE-1", "Debian:12", "bash", {"introduced": "0"}))
        report = scan(inventory(deb("bash", "5.2-1"), Package("pypi", "", "six", "1.16")), advisories)
        assert report.gaps == ("the database has no advisories for PyPI: its packages were not checked",)
        assert (report.packages, report.checked) == (2, 1)

    def test_a_distribution_without_advisories_is_a_gap(self, tmp_path: Path) -> None:
        for distribution in (
            None,
            Distribution("kali", "2026.1"),
            Distribution("debian"),
            Distribution("debian", "sid"),
        ):
            report = scan(inventory(deb("bash", "5"), distribution=distribution), database(tmp_path / "osv"))
            assert report.checked == 0
            assert "1 deb packages were not checked" in report.gaps[0]

    def test_none_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match="there is no vulnerability database"):
            OsvDatabase(tmp_path / "missing")

    def test_an_empty_template_asks_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "bad.zip").write_bytes(b"x")
        assert scan(inventory(), OsvDatabase(tmp_path / "bad.zip")).findings == ()


class TestHostileDatabases:
    def test_records_of_every_bad_shape_are_counted(self, tmp_path: Path) -> None:
        advisories = database(tmp_path / "osv", record("CVE-1", "Debian:12", "bash", {"introduced": "0"}))
        shapes = [
            b"",
            b"null",
            b"[]",
            b'{"id": 5}',
            b'{"affected": [{"package": 3}]}',
            b"[" * 200_000,
            b'{"x":' * 100_000,
            b"\xff\xfe",
        ]
        shapes.append(b'{"affected": [{"package": {"ecosystem": "Debian:12", "name": "bash"}}], "id": ["x"]}')
        for number, shape in enumerate(shapes):
            (tmp_path / "osv" / f"bad{number}.json").write_bytes(shape)
        report = scan(inventory(deb("bash", "5.2-1")), advisories)
        assert found(report).keys() == {"CVE-1"}
        # {"id": 5} names no package, so that nobody looks at its id.
        assert report.gaps == (f"{len(shapes) - 1} records of the database could not be read",)

    def test_ids_that_are_none_are_passed_over_and_said(self, tmp_path: Path) -> None:
        (tmp_path / "osv").mkdir()
        for number, name in enumerate(["../../x", "a b", "\x1b[2J", "", "x" * 500]):
            each = record(name, "Debian:12", "bash", {"introduced": "0"})
            (tmp_path / "osv" / f"{number}.json").write_text(json.dumps(each))
        report = scan(inventory(deb("bash", "5.2-1")), OsvDatabase(tmp_path / "osv"))
        assert report.findings == ()
        assert len(report.gaps) == 5
        assert all(gap.isprintable() for gap in report.gaps)

    def test_prose_can_not_write_on_a_terminal(self, tmp_path: Path) -> None:
        advisories = database(
            tmp_path / "osv",
            record("CVE-1", "Debian:12", "bash", {"introduced": "0"}, {"fixed": "9\x1b[2J"}, summary="\x1b[2J\nhello" + "x" * 999, aliases=["\x1b"]),
        )  # fmt: skip
        (finding,) = scan(inventory(deb("bash", "5.2-1")), advisories).findings
        assert finding.summary.isprintable()
        assert len(finding.summary) <= 300
        assert (finding.aliases, finding.fixed_in) == ((), ())

    def test_bombs_and_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = tmp_path / "osv"
        place.mkdir()
        monkeypatch.setattr(database_module, "MAX_RECORD", 1 << 20)
        with zipfile.ZipFile(place / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.json", b" " * (64 << 20))
            archive.writestr("CVE-1.json", json.dumps(record("CVE-1", "Debian:12", "bash", {"introduced": "0"})))
        lying = (place / "all.zip").read_bytes().replace((64 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
        os.mkfifo(place / "fifo.json")
        (place / "loop").symlink_to(".")
        (place / "zero.json").symlink_to("/dev/zero")
        with (place / "huge.json").open("wb") as file:
            file.truncate(1 << 40)
        report = scan(inventory(deb("bash", "5.2-1")), OsvDatabase(place))
        assert found(report).keys() == {"CVE-1"}
        assert {gap.partition(":")[0] for gap in report.gaps} == {"bomb.json", "fifo.json", "zero.json", "huge.json"}
        (place / "all.zip").write_bytes(lying)
        with pytest.raises(InvalidRequest, match="no vulnerability database"):
            scan(inventory(deb("bash", "5.2-1")), OsvDatabase(place))

    def test_too_many_records_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        advisories = database(
            tmp_path / "osv", *(record(f"CVE-{n}", "Debian:12", "x", {"introduced": "0"}) for n in range(9))
        )
        monkeypatch.setattr(database_module, "MAX_RECORDS", 8)
        with pytest.raises(InvalidRequest, match="too large"):
            scan(inventory(deb("bash", "5.2-1")), advisories)

    def test_aliases_that_chain_everything_end(self, tmp_path: Path) -> None:
        names = [f"X-{n}" for n in range(300)]
        records = [
            record(name, "Debian:12", "bash", {"introduced": "0"}, aliases=[names[n - 1]])
            for n, name in enumerate(names)
        ]
        (finding,) = scan(inventory(deb("bash", "5.2-1")), database(tmp_path / "osv", *records)).findings
        assert len(finding.aliases) == 100

    def test_lists_of_members_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database_module, "MAX_DIRECTORY", 100_000)
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for number in range(2500):
                archive.writestr(f"{number}.json", "")
        with pytest.raises(InvalidRequest, match="list of members"):
            scan(inventory(deb("bash", "5.2-1")), OsvDatabase(tmp_path / "all.zip"))

    @pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    def test_only_deflate_is_read(self, tmp_path: Path, method: int) -> None:
        with zipfile.ZipFile(tmp_path / "all.zip", "w", method) as archive:
            archive.writestr("a.json", json.dumps(record("CVE-1", "Debian:12", "bash", {"introduced": "0"})))
        with pytest.raises(InvalidRequest, match="compressed in another way"):
            scan(inventory(deb("bash", "5.2-1")), OsvDatabase(tmp_path / "all.zip"))

    def test_findings_and_work_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        records = [
            record(f"CVE-{n}", "Debian:12", "bash", {"introduced": "0"}, affected={"versions": ["1"] * 50})
            for n in range(20)
        ]
        advisories = database(tmp_path / "osv", *records)
        packages = inventory(*(deb(f"bash-{n}", "5.2-1", "bash", "5.2-1") for n in range(10)))
        assert len(scan(packages, advisories).findings) == 200
        for name, limit in (("_MAX_MATCHES", 199), ("_MAX_WORK", 999)):
            with monkeypatch.context() as patch:
                patch.setattr(report_module, name, limit)
                with pytest.raises(InvalidRequest, match="more to say"):
                    scan(packages, advisories)

    def test_ratings_without_end(self, tmp_path: Path) -> None:
        each = record(
            "CVE-1",
            "Debian:12",
            "bash",
            {"introduced": "0"},
            severity=[{"type": "CVSS_V4", "score": V4_CRITICAL}] * 100_000,
        )
        (finding,) = scan(inventory(deb("bash", "5.2-1")), database(tmp_path / "osv", each)).findings
        assert finding.score == 9.3

    def test_reports_do_not_tell_where_the_daemon_keeps_its_files(self, tmp_path: Path) -> None:
        (tmp_path / "bad.zip").write_bytes(b"x")
        with pytest.raises(InvalidRequest) as caught:
            scan(inventory(deb("bash", "5.2-1")), OsvDatabase(tmp_path / "bad.zip"))
        assert str(tmp_path) not in str(caught.value)
        assert str(tmp_path) not in OsvDatabase(tmp_path / "bad.zip").source


class TestPolicies:
    @pytest.fixture
    def report(self, tmp_path: Path) -> ScanReport:
        advisories = database(
            tmp_path / "osv",
            record("GHSA-1", "PyPI", "a", {"introduced": "0"}, {"fixed": "2"}, aliases=["CVE-1"], severity=[{"type": "CVSS_V3", "score": CRITICAL}]),
            record("CVE-2", "PyPI", "a", {"introduced": "0"}, severity=[{"type": "CVSS_V3", "score": MEDIUM}]),
            record("CVE-3", "PyPI", "a", {"introduced": "0"}),
        )  # fmt: skip
        return scan(inventory(Package("pypi", "", "a", "1")), advisories)

    @pytest.mark.parametrize(
        ("policy", "blocking"),
        [
            (ScanPolicy(), []),
            (ScanPolicy(block_at="critical"), ["CVE-1"]),
            (ScanPolicy(block_at="medium"), ["CVE-1", "CVE-2"]),
            (ScanPolicy(block_at="low", fix_only=True), ["CVE-1"]),
            (ScanPolicy(block_unknown=True), ["CVE-3"]),
            (ScanPolicy(block_at="low", ignore=(Ignore("GHSA-1", "not reachable"),)), ["CVE-2"]),
            (ScanPolicy(block_at="critical", ignore=(Ignore("CVE-1", "until then", TODAY),)), []),
            (ScanPolicy(block_at="critical", ignore=(Ignore("CVE-1", "over", TODAY - dt.timedelta(1)),)), ["CVE-1"]),
        ],
    )
    def test_block_what_they_say(self, report: ScanReport, policy: ScanPolicy, blocking: list[str]) -> None:
        verdict = judge(report, policy, TODAY)
        assert [each.id for each in verdict.blocking] == blocking
        assert verdict.blocked == bool(blocking)
        assert len(verdict.reasons) == len(blocking)

    def test_say_why_and_what_was_let_pass(self, report: ScanReport) -> None:
        policy = ScanPolicy(
            block_at="low",
            ignore=(Ignore("CVE-2", "no input from outside"), Ignore("CVE-1", "waiting", dt.date(2026, 11, 1))),
        )
        verdict = judge(report, policy, TODAY)
        assert verdict.reasons == ("CVE-1 (critical) in a 1: fixed in 2",)
        assert [each.id for each in verdict.ignored] == ["CVE-2"]
        assert verdict.notes == ("CVE-1 was ignored until 2026-11-01: waiting",)

    def test_can_ask_for_a_complete_report_of_a_young_database(self, report: ScanReport) -> None:
        assert not judge(report, ScanPolicy(require_complete=True, max_database_age_days=1), TODAY).blocked
        old = judge(report, ScanPolicy(max_database_age_days=1), TODAY + dt.timedelta(5))
        assert old.reasons == ("the vulnerability database is 6 days old, at most 1 are allowed",)
        assert judge(ScanReport("x", 0, 0), ScanPolicy(max_database_age_days=1), TODAY).blocked
        for partial in (ScanReport("x", 2, 1), ScanReport("x", 1, 1, gaps=("something",))):
            assert judge(partial, ScanPolicy(require_complete=True), TODAY).blocked
            assert not judge(partial, ScanPolicy(block_at="low"), TODAY).blocked

    def test_know_whether_they_block_anything(self) -> None:
        assert not ScanPolicy(fix_only=True, ignore=(Ignore("CVE-1", "r"),)).can_block
        for policy in (
            ScanPolicy("low"),
            ScanPolicy(block_unknown=True),
            ScanPolicy(require_complete=True),
            ScanPolicy(max_database_age_days=7),
        ):
            assert policy.can_block

    def test_are_read_from_json_whole_or_not_at_all(self) -> None:
        text = (
            b'{"block_at": "high", "ignore": [{"id": "CVE-1", "until": "2027-01-01", "reason": "r"}], "fix_only": true}'
        )
        policy = msgspec.json.decode(text, type=ScanPolicy)
        assert policy == ScanPolicy("high", True, ignore=(Ignore("CVE-1", "r", dt.date(2027, 1, 1)),))
        for bad in (
            b'{"block_at": "hi"}',
            b'{"blok_at": "high"}',
            b'{"ignore": [{"id": "CVE-1"}]}',
            b'{"max_database_age_days": 1.5}',
        ):
            with pytest.raises(msgspec.ValidationError):
                msgspec.json.decode(bad, type=ScanPolicy)


def test_a_report_crosses_a_wire(tmp_path: Path) -> None:
    advisories = database(tmp_path / "osv", record("CVE-1", "Debian:12", "bash", {"introduced": "0"}))
    report = scan(inventory(deb("bash", "5.2-1", paths=("/var/lib/dpkg/status",))), advisories)
    assert msgspec.json.decode(msgspec.json.encode(report), type=ScanReport) == report


@pytest.mark.parametrize(
    ("distribution", "ecosystem", "name"),
    [("rocky", "Rocky Linux:9", "bash"), ("almalinux", "AlmaLinux:9", "bash-libs")],
)
def test_rpm_based_distributions(tmp_path: Path, distribution: str, ecosystem: str, name: str) -> None:
    """Rocky's advisories name source packages, AlmaLinux's what is installed."""
    advisories = database(
        tmp_path / "osv", record("CVE-1", ecosystem, name, {"introduced": "0"}, {"fixed": "0:5.1-2.el9"})
    )
    package = Package("rpm", distribution, "bash-libs", "5.1-1.el9", "x86_64", "bash", "5.1-1.el9", release="9.4")
    report = scan(inventory(package, distribution=Distribution(distribution, "9.4")), advisories)
    assert found(report) == {"CVE-1": ("bash-libs", "5.1-1.el9", "unknown", ("0:5.1-2.el9",))}
