"""Trivy or Grype, where they are installed: they get our inventory as a file, never the template's files.

That keeps their many parsers away from a hostile tree, and needs no mount. Both stay off the network unless asked,
and then use the databases that they fetched themselves before.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec
from packageurl import PackageURL

from tartarus.images.sbom.cyclonedx import cyclonedx
from tartarus.images.sbom.nouns import Inventory, Package
from tartarus.images.sbom.reading import one_line
from tartarus.images.scan.findings import Finding, ScanFailed, ScanReport, sorted_findings
from tartarus.images.scan.records import is_id
from tartarus.images.scan.severity import level_of_word
from tartarus.model.errors import InvalidRequest

MAX_OUTPUT: Final = 256 * 1024 * 1024
Tool = Literal["trivy", "grype"]
T = TypeVar("T")

# The tool dies with us (PR_SET_PDEATHSIG), also when we are killed between its start and this line.
_TIED_TO_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class _TrivyIdentifier(msgspec.Struct, frozen=True):
    purl: str = msgspec.field(name="PURL", default="")
    bom_ref: str = msgspec.field(name="BOMRef", default="")


class _TrivyFinding(msgspec.Struct, rename="pascal"):
    """One of `Results[].Vulnerabilities` (trivy.dev, Reporting)."""

    vulnerability_id: str = msgspec.field(name="VulnerabilityID", default="")
    pkg_name: str = ""
    installed_version: str = ""
    fixed_version: str = ""
    severity: str = ""
    title: str = ""
    primary_url: str = msgspec.field(name="PrimaryURL", default="")
    pkg_identifier: _TrivyIdentifier = _TrivyIdentifier()


class _TrivyResult(msgspec.Struct, rename="pascal"):
    vulnerabilities: list[_TrivyFinding] | None = None


class _TrivyReport(msgspec.Struct, rename="pascal"):
    schema_version: int = 0
    results: list[_TrivyResult] | None = None


class _GrypeFix(msgspec.Struct, frozen=True):
    versions: list[str] | None = None


class _GrypeVulnerability(msgspec.Struct, rename="camel"):
    id: str = ""
    data_source: str = ""
    severity: str = ""
    description: str = ""
    fix: _GrypeFix = _GrypeFix()


class _GrypeArtifact(msgspec.Struct):
    name: str = ""
    version: str = ""
    purl: str = ""


class _GrypeMatch(msgspec.Struct, rename="camel"):
    """One of `matches` (oss.anchore.com, Understanding Grype results)."""

    vulnerability: _GrypeVulnerability
    artifact: _GrypeArtifact
    related_vulnerabilities: list[_GrypeVulnerability] | None = None


class _GrypeReport(msgspec.Struct):
    matches: list[_GrypeMatch]


def installed_tools() -> tuple[Tool, ...]:
    """Which of the tools are on the PATH."""
    names: tuple[Tool, ...] = ("trivy", "grype")
    return tuple(name for name in names if shutil.which(name))


async def scan_with_tool(
    tool: Tool, inventory: Inventory, *, network: bool = False, timeout_s: float = 300.0
) -> ScanReport:
    """What `tool` finds in the inventory; with `network` it may update its database first.

    Raises InvalidRequest when it is not installed, ScanFailed when it fails, takes longer than `timeout_s`, or does
    not write what it documents.
    """
    program = shutil.which(tool)
    if program is None:
        raise InvalidRequest(f"{tool} is not installed", fix=f"install it on the daemon's PATH, or scan without {tool}")
    # In memory, so that no file is left behind whoever is killed.
    document = os.memfd_create("sbom.cdx.json")
    try:
        await asyncio.to_thread(_fill, document, inventory)
        argv, extra = _command(tool, program, f"/proc/self/fd/{document}", network=network)
        output = await _run(argv, os.environ | extra, document, timeout_s)
    finally:
        os.close(document)
    found = _READERS[tool](output, _Known(inventory))
    return ScanReport(
        source=tool, packages=len(inventory.packages), checked=len(inventory.packages),
        findings=sorted_findings(found), gaps=inventory.gaps,
    )  # fmt: skip


def _fill(file: int, inventory: Inventory) -> None:
    with open(file, "wb", closefd=False) as stream:
        stream.write(msgspec.json.encode(cyclonedx(inventory, name="template")))


def _command(tool: Tool, program: str, document: str, *, network: bool) -> tuple[list[str], dict[str, str]]:
    if tool == "trivy":
        offline = [] if network else ["--offline-scan", "--skip-db-update", "--skip-java-db-update"]
        return [program, "sbom", "--quiet", "--format", "json", *offline, document], {}
    updates = "true" if network else "false"
    extra = {"GRYPE_DB_AUTO_UPDATE": updates, "GRYPE_CHECK_FOR_APP_UPDATE": "false"}
    return [program, f"sbom:{document}", "--quiet", "--output", "json"], extra


class _Known:
    """The inventory's packages by purl, and by what a purl says at the least: tools write them in their own ways."""

    def __init__(self, inventory: Inventory) -> None:
        self._exact = {package.purl: package for package in inventory.packages}
        self._alike = {_core(package.purl): package for package in inventory.packages}

    def find(self, *purls: str) -> Package | None:
        exact = (self._exact.get(purl) for purl in purls)
        alike = (self._alike.get(_core(purl)) for purl in purls if purl)
        return next((package for package in (*exact, *alike) if package is not None), None)


def _core(purl: str) -> tuple[str | None, ...]:
    try:
        parts = PackageURL.from_string(purl[:2048])
    except ValueError:
        return (purl,)
    return parts.type, parts.namespace, parts.name, parts.version


async def _run(argv: list[str], env: dict[str, str], document: int, timeout_s: float) -> bytes:
    """Standard output of a program that ends well in time."""
    name = Path(argv[0]).name
    tied = [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *argv]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *tied, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=errors, env=env, cwd="/",
            pass_fds=(document,), start_new_session=True,
        )  # fmt: skip
        try:
            status = await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            raise ScanFailed(f"{name} did not end in {timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if status != 0:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 400))
            why = one_line(errors.read().decode("utf-8", "replace"), 400)
            raise ScanFailed(f"{name} failed with status {status}", why=why, fix="does it have its database yet?")
        size = output.seek(0, os.SEEK_END)
        if size > MAX_OUTPUT:
            raise ScanFailed(f"{name} wrote {size} bytes", why=f"at most {MAX_OUTPUT} are read")
        output.seek(0)
        return output.read()


def _trivy(output: bytes, known: _Known) -> list[Finding]:
    report = _decode(output, _TrivyReport, "trivy")
    if report.schema_version != 2:
        raise ScanFailed(f"trivy writes version {report.schema_version} of its report", why="version 2 is read")
    return [
        _finding(
            each.vulnerability_id, known, (each.pkg_identifier.bom_ref, each.pkg_identifier.purl), each.severity,
            each.title, each.primary_url, each.fixed_version.replace(" ", "").split(","), (),
        )
        for result in report.results or ()
        for each in result.vulnerabilities or ()
    ]  # fmt: skip


def _grype(output: bytes, known: _Known) -> list[Finding]:
    return [
        _finding(
            match.vulnerability.id, known, (match.artifact.purl,), match.vulnerability.severity,
            match.vulnerability.description, match.vulnerability.data_source, match.vulnerability.fix.versions or (),
            [related.id for related in match.related_vulnerabilities or ()],
        )
        for match in _decode(output, _GrypeReport, "grype").matches
    ]  # fmt: skip


_READERS: dict[Tool, Callable[[bytes, _Known], list[Finding]]] = {"trivy": _trivy, "grype": _grype}


def _decode(output: bytes, kind: type[T], tool: str) -> T:
    try:
        return msgspec.json.decode(output, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ScanFailed(f"{tool} does not write what it documents", why=str(error)[:200]) from error


def _finding(
    name: str, known: _Known, purls: Sequence[str], word: str, prose: str, url: str, fixes: Sequence[str],
    aliases: Sequence[str],
) -> Finding:  # fmt: skip
    package = known.find(*purls)
    if package is None or not is_id(name):
        # It answers for something else than it was asked for, so nothing it says can be relied on.
        where = one_line(" ".join(purls))
        raise ScanFailed(f"the scanner finds {one_line(name, 40)!r} in {where!r}, which the template does not have")
    return Finding(
        id=name, severity=level_of_word(word), kind=package.kind, package=package.name, version=package.version,
        purl=package.purl, aliases=tuple(sorted({alias for alias in aliases if is_id(alias)} - {name})),
        summary=one_line(prose, 300), fixed_in=tuple(fix for fix in fixes if fix and fix.isprintable()),
        paths=package.paths[:10], url=url if url.startswith("https://") and url.isprintable() else "",
    )  # fmt: skip
