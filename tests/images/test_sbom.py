"""Inventories of real package databases, and of hostile ones; the CycloneDX document by the official schema."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import subprocess
import sysconfig
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from tartarus.images.sbom import Distribution, Inventory, Limits, Package, cyclonedx, take_inventory
from tartarus.images.sbom.cyclonedx import Affected
from tartarus.images.stackview import StackView
from tartarus.model.errors import ImageRefused

STATUS = "var/lib/dpkg/status"
APK = """\
C:Q1abc=
P:musl
V:1.2.4-r2
A:x86_64
L:MIT
o:musl
F:lib
R:ld-musl-x86_64.so.1

C:Q1def=
P:libcrypto3
V:3.1.4-r5
A:x86_64
L:Apache-2.0
o:openssl

P:py3-six
V:1.16.0-r6
A:x86_64
o:py3-six
F:usr/lib/python3.11/site-packages/six-1.16.0.dist-info
R:METADATA
"""


def write(layer: Path, path: str, content: str | bytes) -> None:
    place = layer / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content.encode() if isinstance(content, str) else content)


def inventory(*layers: Path, limits: Limits | None = None) -> Inventory:
    with StackView(layers) as view:
        return take_inventory(view, limits)


def valid(document: dict[str, Any]) -> str:
    text = json.dumps(document)
    errors = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert errors is None, errors
    return text


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    place = tmp_path / "layer"
    write(place, "usr/lib/os-release", 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n')
    (place / "etc").mkdir()
    (place / "etc/os-release").symlink_to("../usr/lib/os-release")
    return place


class TestRealDatabases:
    def test_dpkg_as_dpkg_query_reads_it(self, layer: Path) -> None:
        write(layer, STATUS, Path("/", STATUS).read_bytes())
        form = "${db:Status-Status}|${Package}|${Version}|${Architecture}|${source:Package}|${source:Version}\n"
        told = subprocess.run(
            ["dpkg-query", f"--admindir={layer}/var/lib/dpkg", "-W", f"-f={form}"],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
        rows = [line.split("|") for line in told.splitlines()]
        expected = {tuple(row[1:]) for row in rows if row[0] not in {"not-installed", "config-files"}}
        found = inventory(layer)
        assert found.distribution == Distribution("debian", "12", "Debian GNU/Linux 12 (bookworm)")
        assert {(p.name, p.version, p.architecture, p.source, p.source_version) for p in found.packages} == expected
        assert not found.gaps

    def test_python_as_importlib_reads_it(self, layer: Path) -> None:
        site = Path(sysconfig.get_path("purelib"))
        for record in site.glob("*.dist-info/METADATA"):
            write(layer, f"venv/lib/{record.parent.name}/METADATA", record.read_bytes())
        expected = {(d.metadata["Name"], d.version) for d in importlib.metadata.distributions(path=[str(site)])}
        found = inventory(layer)
        assert {(p.name, p.version) for p in found.packages} == expected
        assert all(p.kind == "pypi" and not p.owner for p in found.packages)

    @pytest.mark.needs("node")
    def test_node_as_npm_installs_it(self, layer: Path, tmp_path: Path) -> None:
        for name, version, dependencies in (
            ("left", "1.2.3", {}),
            ("@scope/right", "2.0.0-rc.1", {"left": "file:../left"}),
        ):
            manifest = {"name": name, "version": version, "license": "MIT", "dependencies": dependencies}
            write(tmp_path, f"{name.rpartition('/')[2]}/package.json", json.dumps(manifest))
        write(layer, "app/package.json", json.dumps({"name": "app", "version": "9.9.9"}))
        subprocess.run(
            ["npm", "install", "--offline", "--install-links", "--no-audit", "--no-fund", tmp_path / "left", tmp_path / "right"],
            cwd=layer / "app", capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        found = inventory(layer)
        assert [p.purl for p in found.packages] == ["pkg:npm/left@1.2.3", "pkg:npm/%40scope/right@2.0.0-rc.1"]
        assert {p.license for p in found.packages} == {"MIT"}


class TestOtherDatabases:
    """Written by hand after the formats' documentation: the programs are not to be had for this machine."""

    def test_distroless(self, layer: Path) -> None:
        write(
            layer,
            "var/lib/dpkg/status.d/libc6",
            "Package: libc6\nVersion: 2.36-9\nArchitecture: amd64\nSource: glibc\n",
        )
        write(layer, "var/lib/dpkg/status.d/libc6.md5sums", "Package: no\nVersion: 1\n")
        (package,) = inventory(layer).packages
        assert package.purl == "pkg:deb/debian/libc6@2.36-9?arch=amd64&distro=debian-12&upstream=glibc%402.36-9"

    def test_apk(self, tmp_path: Path) -> None:
        layer = tmp_path / "alpine"
        write(layer, "etc/os-release", "ID=alpine\nVERSION_ID=3.18.5\n")
        write(layer, "lib/apk/db/installed", APK)
        write(
            layer,
            "usr/lib/python3.11/site-packages/six-1.16.0.dist-info/METADATA",
            "Name: six\nVersion: 1.16.0\n\nReadme",
        )
        found = inventory(layer).packages
        assert [p.purl for p in found] == [
            "pkg:apk/alpine/libcrypto3@3.1.4-r5?arch=x86_64&distro=alpine-3.18.5&upstream=openssl%403.1.4-r5",
            "pkg:apk/alpine/musl@1.2.4-r2?arch=x86_64&distro=alpine-3.18.5",
            "pkg:apk/alpine/py3-six@1.16.0-r6?arch=x86_64&distro=alpine-3.18.5",
            "pkg:pypi/six@1.16.0",
        ]
        assert found[-1].owner == "py3-six"

    def test_r(self, layer: Path) -> None:
        for name, extra in (("Rcpp", "License: GPL (>= 2)\n"), ("stats", "Priority: base\n")):
            write(layer, f"usr/lib/R/library/{name}/Meta/package.rds", "")
            write(layer, f"usr/lib/R/library/{name}/DESCRIPTION", f"Package: {name}\nVersion: 1.0.11\n{extra}")
        write(layer, "src/notes/DESCRIPTION", "Package: source\nVersion: 1\n")
        (package,) = inventory(layer).packages
        assert (package.purl, package.license) == ("pkg:cran/Rcpp@1.0.11", "GPL (>= 2)")

    def test_eggs(self, layer: Path) -> None:
        for path in ("a/old.egg-info", "b/old.egg-info/PKG-INFO", "c/old.egg/EGG-INFO/PKG-INFO"):
            write(layer, path, "Name: Old_Thing\r\nVersion: 0.1\r\n\r\nName: no\r\n")
        (package,) = inventory(layer).packages
        assert package.purl == "pkg:pypi/old-thing@0.1"
        assert package.paths == ("/a/old.egg-info", "/b/old.egg-info/PKG-INFO", "/c/old.egg/EGG-INFO/PKG-INFO")

    def test_a_broken_rpm_database_is_a_gap(self, layer: Path) -> None:
        write(layer, "usr/lib/sysimage/rpm/rpmdb.sqlite", b"SQLite format 3\0")
        (gap,) = inventory(layer).gaps
        assert gap.startswith("/usr/lib/sysimage/rpm/rpmdb.sqlite: the rpm database can't be read")

    def test_what_the_distribution_installed_is_marked(self, layer: Path) -> None:
        record = "usr/lib/python3/dist-packages/yaml-6.0.dist-info/METADATA"
        write(layer, record, "Name: PyYAML\nVersion: 6.0\n")
        write(layer, "usr/lib/python3/dist-packages/own-1.dist-info/METADATA", "Name: own\nVersion: 1\n")
        write(layer, "var/lib/dpkg/info/python3-yaml:amd64.list", f"/.\n/usr\n/{record}\n")
        assert [(p.name, p.owner) for p in inventory(layer).packages] == [("PyYAML", "python3-yaml"), ("own", "")]

    def test_removed_packages_and_other_states(self, layer: Path) -> None:
        states = (
            "install ok installed",
            "deinstall ok config-files",
            "install ok half-configured",
            "purge ok not-installed",
        )
        write(
            layer, STATUS, "\n".join(f"Package: p{i}\nStatus: {state}\nVersion: 1\n" for i, state in enumerate(states))
        )
        assert [p.name for p in inventory(layer).packages] == ["p0", "p2"]

    def test_the_uppermost_layer_counts(self, layer: Path, tmp_path: Path) -> None:
        upper = tmp_path / "upper"
        write(layer, STATUS, "Package: old\nVersion: 1\n")
        write(upper, STATUS, "Package: new\nVersion: 2\n")
        assert [p.name for p in inventory(upper, layer).packages] == ["new"]


class TestTheDocument:
    @pytest.fixture
    def found(self, layer: Path) -> Inventory:
        write(layer, STATUS, Path("/", STATUS).read_bytes())
        write(layer, "lib/apk/db/installed", APK)
        write(
            layer,
            "x/node_modules/@types/node/package.json",
            '{"name": "@types/node", "version": "20.1.0", "license": "MIT"}',
        )
        write(layer, os.fsdecode(b"odd\xff\x1b[31m/a-1.dist-info/METADATA"), "Name: a\nVersion: 1\nLicense: é\n")
        write(layer, "bad/node_modules/bad/package.json", "[")
        return inventory(layer)

    def test_is_valid_and_the_same_each_time(self, found: Inventory, layer: Path) -> None:
        assert any(kind in {p.kind for p in found.packages} for kind in ("deb", "apk", "npm", "pypi"))
        assert found.gaps
        first = valid(cyclonedx(found, name="python-ds", digest="sha256:" + "0" * 64))
        again = valid(cyclonedx(inventory(layer), name="python-ds", digest="sha256:" + "0" * 64))
        assert first == again
        assert "timestamp" not in first
        assert "\\u001b" not in first
        assert first != valid(cyclonedx(found, name="other"))
        dated = cyclonedx(found, name="x", timestamp="2026-11-21T10:00:00Z")
        valid(dated)
        assert dated["metadata"]["timestamp"] == "2026-11-21T10:00:00Z"

    def test_every_purl_reads_back(self, found: Inventory) -> None:
        for package in found.packages:
            url = PackageURL.from_string(package.purl)
            assert url.version == package.version
            same = re.sub("_", "-", package.name.lower()) if package.kind == "pypi" else package.name
            assert url.name == (same.lower() if package.kind in {"deb", "apk"} else same)

    def test_vulnerabilities_are_valid_too(self, found: Inventory) -> None:
        purl = found.packages[0].purl
        vector = "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"
        affected = [
            Affected(
                "CVE-2026-1",
                "https://osv.dev/vulnerability/CVE-2026-1",
                "critical",
                9.8,
                vector,
                "words",
                "upgrade",
                (purl,),
            ),
            Affected("CVE-2026-2", "https://osv.dev/vulnerability/CVE-2026-2", "unknown", None, "", "", "", (purl,)),
        ]
        document = cyclonedx(found, name="x", vulnerabilities=affected)
        valid(document)
        assert document["vulnerabilities"][0]["ratings"] == [
            {"severity": "critical", "score": 9.8, "vector": vector, "method": "CVSSv31"}
        ]

    def test_an_empty_stack_has_a_valid_document(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        valid(cyclonedx(inventory(tmp_path / "empty"), name="scratch"))


class TestHostileImages:
    def test_links_that_leave_are_not_followed(self, layer: Path, tmp_path: Path) -> None:
        write(tmp_path, "outside/status", "Package: bait\nVersion: 1\n")
        write(tmp_path, "outside/x-1.dist-info/METADATA", "Name: bait\nVersion: 1\n")
        (layer / "var/lib/dpkg").mkdir(parents=True)
        for target in (str(tmp_path / "outside/status"), "../../../../outside/status", "status", "/proc/self/environ"):
            (layer / STATUS).unlink(missing_ok=True)
            (layer / STATUS).symlink_to(target)
            assert inventory(layer).packages == ()
        (layer / "site").symlink_to(tmp_path / "outside")
        (layer / "loop").symlink_to(".")
        (layer / "y-1.dist-info").mkdir()
        (layer / "y-1.dist-info/METADATA").symlink_to(tmp_path / "outside/x-1.dist-info/METADATA")
        assert inventory(layer).packages == ()

    def test_what_is_too_large_or_no_file_is_a_gap_and_read_by_no_one(self, layer: Path) -> None:
        (layer / "var/lib/dpkg").mkdir(parents=True)
        with (layer / STATUS).open("wb") as file:
            file.truncate(1 << 40)
        write(layer, "a-1.dist-info/METADATA", b"Name: a\n" + b"x" * 5_000_000)
        (layer / "lib/apk/db").mkdir(parents=True)
        os.mkfifo(layer / "lib/apk/db/installed")
        found = inventory(layer)
        assert found.packages == ()
        assert [gap.partition(":")[0] for gap in found.gaps] == [
            "/a-1.dist-info/METADATA", "/lib/apk/db/installed", "/lib/apk/db/installed", "/var/lib/dpkg/status"
        ]  # fmt: skip

    def test_names_that_would_write_on_a_terminal_are_gaps(self, layer: Path) -> None:
        names = ["a\x1b[2J", "b c", "", "x" * 257, "\u202egpj", "ok"]
        write(layer, STATUS, "\n".join(f"Package: {name}\nVersion: 1\n" for name in names))
        found = inventory(layer)
        assert [p.name for p in found.packages] == ["ok"]
        assert len(found.gaps) == 5
        assert all(gap.isprintable() for gap in found.gaps)

    def test_json_of_every_bad_shape_is_a_gap(self, layer: Path) -> None:
        shapes = [
            b'{"x":' + b"[" * 500_000, b"[" * 3_000_000, b'{"name": 5, "version": "1"}', b'{"name": "a", "version": {"b": 1}}',
            b"\xff\xfe", b"", b'{"name": "../../x", "version": "1"}', b'{"name": "a", "version": "' + b"1" * 9999 + b'"}', b"null",
        ]  # fmt: skip
        for number, shape in enumerate(shapes):
            write(layer, f"node_modules/p{number}/package.json", shape)
        found = inventory(layer)
        assert found.packages == ()
        assert len(found.gaps) == len(shapes)

    def test_too_many_packages_or_entries_are_refused(self, layer: Path) -> None:
        write(layer, STATUS, "\n".join(f"Package: p{i}\nVersion: 1\n" for i in range(1000)))
        with pytest.raises(ImageRefused, match="more than 999 packages"):
            inventory(layer, limits=Limits(packages=999))
        with pytest.raises(ImageRefused, match="more than 3 files"):
            inventory(layer, limits=Limits(entries=3))
        with pytest.raises(ImageRefused, match="more than 10 bytes"):
            inventory(layer, limits=Limits(total=10))
        assert len(inventory(layer).packages) == 1000

    def test_directories_that_are_too_full_are_gaps(self, layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(layer, "var/lib/dpkg/status.d/a", "Package: a\nVersion: 1\n")
        write(layer, "var/lib/dpkg/info/a.list", "/.\n")

        def full(*_: object) -> list[str]:
            raise OSError(errno.E2BIG, "too many names")

        monkeypatch.setattr(StackView, "listdir", full)
        assert [gap.partition(":")[0] for gap in inventory(layer).gaps] == [
            "/var/lib/dpkg/info",
            "/var/lib/dpkg/status.d",
        ]

    def test_gaps_are_few(self, layer: Path) -> None:
        write(layer, STATUS, "\n".join(f"Package: p{i}\nVersion: a b\n" for i in range(5000)))
        assert len(inventory(layer).gaps) == 101

    def test_an_os_release_of_junk_says_nothing(self, layer: Path) -> None:
        for junk in (b"ID='", b"ID=$(reboot)\n", b"ID=\x1b\n", b"\xff" * 100, b"ID=" + b"a" * 5000):
            write(layer, "usr/lib/os-release", junk)
            assert inventory(layer).distribution is None


def test_two_hundred_packages_take_no_time(layer: Path) -> None:
    """Not a clock's test: the number of files opened is what is bounded."""
    write(layer, STATUS, "\n".join(f"Package: p{i}\nVersion: 1\n" for i in range(200)))
    for number in range(50):
        write(layer, f"lib/d{number}/x.py", "")
    opened = 0

    class Counting(StackView):
        def open(self, path: str) -> int:
            nonlocal opened
            opened += 1
            return super().open(path)

    with Counting([layer]) as view:
        assert len(take_inventory(view).packages) == 200
    assert opened < 12


def test_packages_sort_and_hash() -> None:
    first, second = Package("deb", "debian", "a", "1"), Package("deb", "debian", "b", "1")
    assert sorted({second, first}) == [first, second]


@pytest.mark.parametrize("content", [b"ab\n\n", b"\n", b"ab\n"], ids=["paragraphs", "nothing", "lines"])
def test_a_database_of_nothing_but_ends_takes_little_memory(layer: Path, content: bytes) -> None:
    whole = content * (512 * 1024 // len(content))
    for path in (STATUS, "var/lib/dpkg/info/x.list", "lib/apk/db/installed"):
        write(layer, path, whole)
    tracemalloc.start()
    try:
        assert inventory(layer).packages == ()
        assert tracemalloc.get_traced_memory()[1] < 6 * len(whole)
    finally:
        tracemalloc.stop()


def test_more_owned_records_than_anybody_has(layer: Path) -> None:
    write(layer, "var/lib/dpkg/info/x.list", "".join(f"/{number}/METADATA\n" for number in range(2000)))
    with pytest.raises(ImageRefused, match="own more than 1000"):
        inventory(layer, limits=Limits(packages=1000))
