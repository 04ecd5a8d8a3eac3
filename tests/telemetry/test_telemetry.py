"""Metrics under the roadmap's names, and a log that stays JSON, private and small."""

from __future__ import annotations

import json
import logging
import stat
import sys
from typing import TYPE_CHECKING

import pytest
import structlog

from tartarus.model.sandbox import Isolation, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.telemetry import logs
from tartarus.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def ended(state: State, *, started: bool = True) -> SandboxRecord:
    return SandboxRecord(
        id="sbx-1", tenant="uid-1", name="", template="host", isolation=Isolation.PROCESS, isolation_reason="",
        state=state, spec=SandboxSpec(), created_at=1.0, started_at=1.0 if started else None, ended_at=2.0,
    )  # fmt: skip


def test_every_metric_of_the_roadmap_that_exists() -> None:
    metrics = Metrics("n1")
    metrics.launched("host", 0.004, warm=True)
    metrics.launched("host", 0.04, warm=False)
    metrics.ended(ended(State.SUCCEEDED))
    metrics.ended(ended(State.FAILED, started=False))
    text = metrics.render().decode()
    for line in (
        'tartarus_sandbox_launch_duration_seconds_bucket{le="0.005",node="n1",template="host"} 1.0',
        'tartarus_sandbox_launch_duration_seconds_count{node="n1",template="host"} 2.0',
        'tartarus_sandbox_active_count{node="n1",template="host"} 1.0',
        'tartarus_sandbox_total{status="succeeded",template="host"} 1.0',
        'tartarus_sandbox_total{status="failed",template="host"} 1.0',
        'tartarus_snapshot_cache_hits_total{template="host"} 1.0',
        'tartarus_snapshot_cache_misses_total{template="host"} 1.0',
    ):
        assert line in text.splitlines()


def test_two_nodes_in_one_process_do_not_mix() -> None:
    one, other = Metrics("n1"), Metrics("n2")
    one.launched("host", 0.1, warm=True)
    assert b'node="n1"' not in other.render()


@pytest.fixture
def quiet() -> Iterator[None]:
    """Give logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_is_one_json_line(tmp_path: Path, quiet: None) -> None:
    path = tmp_path / "daemon.log"
    logs.configure(path, max_bytes=1_000_000, files=2)
    structlog.get_logger("tartarus.x").info("made", sandbox="sbx-1", path=tmp_path, odd=b"\xff", text="two\nlines")
    logging.getLogger("somebody.else").warning("plain %s", "words")
    structlog.get_logger("tartarus.x").debug("not wanted")
    try:
        raise ValueError("boom")
    except ValueError:
        structlog.get_logger("tartarus.x").exception("failed")
    made, plain, failed = lines(path)
    assert (made["event"], made["sandbox"], made["level"], made["logger"]) == ("made", "sbx-1", "info", "tartarus.x")
    assert str(made["time"]).endswith("Z")
    assert plain["event"] == "plain words"
    assert "ValueError: boom" in str(failed["exception"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_log_never_grows_beyond_its_files(tmp_path: Path, quiet: None) -> None:
    path = tmp_path / "daemon.log"
    logs.configure(path, max_bytes=10_000, files=3)
    log = structlog.get_logger("tartarus.x")
    for number in range(1000):
        log.info("line", number=number)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["daemon.log", "daemon.log.1", "daemon.log.2"]
    assert all(file.stat().st_size <= 10_000 and stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert lines(path)[-1]["number"] == 999


def test_the_foreground_logs_to_standard_error(capsys: pytest.CaptureFixture[str], quiet: None) -> None:
    logs.configure(None, max_bytes=1, files=1)
    structlog.get_logger("tartarus.x").info("here")
    sys.stderr.flush()
    assert json.loads(capsys.readouterr().err)["event"] == "here"
