"""Trivy and Grype by contract.

Neither is to be had where these tests run, so programs of the tests' own stand on the PATH in their names, take the
arguments that both document, and print reports in the documented form.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tartarus.images.sbom import Inventory, Package
from tartarus.images.scan import ScanFailed, scan_with_tool
from tartarus.images.scan.tools import installed_tools
from tartarus.model.errors import InvalidRequest

pytestmark = pytest.mark.anyio

PACKAGES = Inventory(None, (Package("npm", "@s", "tool", "1.0.0"), Package("pypi", "", "six", "1.16", paths=("/six",))))
TRIVY = {
    "SchemaVersion": 2, "ArtifactName": "x", "ArtifactType": "cyclonedx",
    "Results": [
        {"Target": "Python", "Class": "lang-pkgs", "Type": "python-pkg", "Vulnerabilities": [{
            "VulnerabilityID": "CVE-1", "PkgName": "six", "InstalledVersion": "1.16", "FixedVersion": "1.17, 2.0", "Severity": "HIGH",
            "PkgIdentifier": {"PURL": "pkg:pypi/six@1.16", "UID": "1", "BOMRef": "pkg:pypi/six@1.16"}, "Title": "words",
            "PrimaryURL": "https://avd.aquasec.com/nvd/cve-1",
        }]},
        {"Target": "Node.js"},
    ],
}  # fmt: skip
GRYPE = {
    "matches": [{
        "vulnerability": {"id": "GHSA-1", "dataSource": "https://github.com/advisories/GHSA-1", "severity": "Critical",
                          "description": "words", "fix": {"versions": ["1.0.1"], "state": "fixed"}},
        "relatedVulnerabilities": [{"id": "CVE-2"}], "matchDetails": [],
        "artifact": {"id": "0", "name": "@s/tool", "version": "1.0.0", "type": "npm", "purl": "pkg:npm/@s/tool@1.0.0"},
    }],
    "source": {}, "distro": {}, "descriptor": {"name": "grype", "version": "0.99.1"},
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the whole PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(place: Path, name: str, body: str) -> None:
    (place / name).write_text(f"#!{sys.executable} -IS\nimport json, os, sys, time\n{body}\n")
    (place / name).chmod(0o755)


def reports(place: Path, name: str, report: Any) -> None:
    """A tool that reads the document it is given, notes how it was called, and prints `report`."""
    (place / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    program(
        place, name,
        "path = next(word.removeprefix('sbom:') for word in sys.argv if '/proc/self/fd/' in word)\n"
        "seen = {'argv': sys.argv[1:], 'sbom': json.load(open(path)), 'update': os.environ.get('GRYPE_DB_AUTO_UPDATE')}\n"
        f"json.dump(seen, open({str(place / 'seen.json')!r}, 'w'))\n"
        f"sys.stdout.write(open({str(place / 'report.json')!r}).read())",
    )  # fmt: skip


def seen(place: Path) -> Any:
    return json.loads((place / "seen.json").read_text())


async def test_trivy(place: Path) -> None:
    reports(place, "trivy", TRIVY)
    report = await scan_with_tool("trivy", PACKAGES)
    (found,) = report.findings
    assert (found.id, found.package, found.severity, found.fixed_in, found.paths) == (
        "CVE-1",
        "six",
        "high",
        ("1.17", "2.0"),
        ("/six",),
    )
    assert (report.source, report.checked) == ("trivy", 2)
    assert seen(place)["argv"][:4] == ["sbom", "--quiet", "--format", "json"]
    assert {"--offline-scan", "--skip-db-update", "--skip-java-db-update"} < set(seen(place)["argv"])
    assert [c["purl"] for c in seen(place)["sbom"]["components"]] == ["pkg:npm/%40s/tool@1.0.0", "pkg:pypi/six@1.16"]
    await scan_with_tool("trivy", PACKAGES, network=True)
    assert not any("skip" in word for word in seen(place)["argv"])


async def test_grype(place: Path) -> None:
    reports(place, "grype", GRYPE)
    (found,) = (await scan_with_tool("grype", PACKAGES)).findings
    assert (found.id, found.aliases, found.package, found.severity, found.fixed_in) == (
        "GHSA-1",
        ("CVE-2",),
        "tool",
        "critical",
        ("1.0.1",),
    )
    assert (seen(place)["update"], seen(place)["argv"][-2:]) == ("false", ["--output", "json"])
    await scan_with_tool("grype", PACKAGES, network=True)
    assert seen(place)["update"] == "true"


async def test_what_is_not_installed_is_said(place: Path) -> None:
    assert installed_tools() == ()
    with pytest.raises(InvalidRequest, match="trivy is not installed"):
        await scan_with_tool("trivy", PACKAGES)
    reports(place, "grype", GRYPE)
    assert installed_tools() == ("grype",)


async def test_a_tool_that_fails_says_why(place: Path) -> None:
    program(place, "trivy", "sys.stderr.write('x' * 9999 + '\\x1b[2J no database'); sys.exit(3)")
    with pytest.raises(ScanFailed, match=r"status 3.*no database") as caught:
        await scan_with_tool("trivy", PACKAGES)
    assert caught.value.why.isprintable()


@pytest.mark.parametrize(
    ("tool", "report"),
    [
        ("trivy", ""), ("trivy", "{}"), ("trivy", "[" * 100_000), ("trivy", json.dumps(TRIVY | {"SchemaVersion": 3})),
        ("trivy", json.dumps(TRIVY).replace("six@1.16", "seven@1")), ("trivy", json.dumps(TRIVY).replace("CVE-1", "\\u001b[2J")),
        ("grype", "{}"), ("grype", "nothing found"), ("grype", json.dumps(GRYPE).replace("pkg:npm", "pkg:gem")),
    ],
)  # fmt: skip
async def test_reports_that_are_none_are_no_clean_bill(place: Path, tool: Any, report: str) -> None:
    reports(place, tool, report)
    with pytest.raises(ScanFailed):
        await scan_with_tool(tool, PACKAGES)


async def test_one_that_does_not_end_is_ended_with_its_children(place: Path) -> None:
    mark = place / "pids"
    program(
        place, "trivy",
        f"child = os.fork()\nif child:\n    print(os.getpid(), child, file=open({str(mark)!r}, 'w'), flush=True)\ntime.sleep(1000)",
    )  # fmt: skip
    with pytest.raises(ScanFailed, match="did not end in 1 s"):
        await scan_with_tool("trivy", PACKAGES, timeout_s=1)
    for pid in map(int, mark.read_text().split()):
        assert gone(pid)


def test_one_whose_daemon_is_killed_ends_too(place: Path) -> None:
    mark = place / "pid"
    program(place, "trivy", f"print(os.getpid(), file=open({str(mark)!r}, 'w'), flush=True)\ntime.sleep(1000)")
    script = (
        "import asyncio; from tartarus.images.sbom import Inventory; from tartarus.images.scan import scan_with_tool\n"
        "asyncio.run(scan_with_tool('trivy', Inventory()))"
    )
    daemon = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    assert gone(int(mark.read_text()))


def gone(pid: int) -> bool:
    """Whether the process ends; a zombie that nobody here can reap has."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
