"""Known vulnerabilities of a template's packages, and a policy for what blocks.

The node scans a template's inventory against an OSV database on disk or, where somebody asks for it, OSV's service,
or by way of Trivy or Grype. Nothing here reaches for the network by itself, and what could not be checked is part
of the answer: a report with gaps is no clean report.
"""

from __future__ import annotations

from tartarus.images.scan.database import OsvDatabase
from tartarus.images.scan.findings import Finding, ScanFailed, ScanReport, Severity
from tartarus.images.scan.policy import Ignore, ScanPolicy, Verdict, judge
from tartarus.images.scan.report import report_document, scan
from tartarus.images.scan.service import OsvService
from tartarus.images.scan.tools import scan_with_tool

__all__ = [
    "Finding",
    "Ignore",
    "OsvDatabase",
    "OsvService",
    "ScanFailed",
    "ScanPolicy",
    "ScanReport",
    "Severity",
    "Verdict",
    "judge",
    "report_document",
    "scan",
    "scan_with_tool",
]
