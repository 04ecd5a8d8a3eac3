"""Skips only for a declared need (tests/needs.py); in CI, never for one that CI is known to meet."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from tests.needs import NEEDS, missing

if TYPE_CHECKING:
    from collections.abc import Generator

IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
_DECLARED = "needs: "


def pytest_configure() -> None:
    """Take back the defaults of signals that a shell's background or nohup makes us, and our commands, ignore."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def anyio_backend() -> str:
    """Asyncio is the loop that the product runs on."""
    return "asyncio"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs are unmet, or fail it where CI should have met them."""
    for marker in item.iter_markers("needs"):
        for need in marker.args:
            if need not in NEEDS:
                pytest.fail(f"unknown need {need!r}: add it to tests/needs.py", pytrace=False)
            lack = missing(need)
            if lack and IN_CI and NEEDS[need].in_ci:
                pytest.fail(f"CI must have {need!r}, but: {lack}", pytrace=False)
            if lack:
                pytest.skip(f"{_DECLARED}{need}: {lack}")


# What takes longest goes first, so that no process is left with it alone at the end.
_SLOW = (
    "tests/shipped/", "tests/faults/test_soak.py", "tests/escape/test_escape.py", "tests/faults/", "tests/node/",
    "tests/escape/", "tests/microvm/", "tests/gvisor/", "tests/project/", "tests/compat/", "tests/cli/",
)  # fmt: skip


def _slowness(item: pytest.Item) -> int:
    place = item.nodeid
    return next((number for number, prefix in enumerate(_SLOW) if place.startswith(prefix)), len(_SLOW))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow ones."""
    items.sort(key=_slowness)


def _refuse_undeclared(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not (IN_CI and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if _DECLARED not in reason:
        report.outcome = "failed"
        report.longrepr = f"skipped without a declared need (use @pytest.mark.needs): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn an undeclared skip into a failure in CI."""
    report = yield
    _refuse_undeclared(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, Any]:
    """The same for whole modules, as `pytest.importorskip` skips them."""
    report = yield
    _refuse_undeclared(report)
    return report
